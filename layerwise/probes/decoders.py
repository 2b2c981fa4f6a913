"""What a decoder consists of: its layers, its parameters, and whether it is an MLP or linear."""

from itertools import takewhile

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
TORCHVISION_NORM = "torchvision.models.convnext.LayerNorm2d"  # by name: torchvision need not be installed


def get_type(module: nn.Module) -> type | None:
    """Return the type of a module that computes what its type computes.

    Return None if a hook or a forward of its own may change that.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    changed = any(hooks) or "forward" in vars(module) or _has_any_global_hook()
    return None if changed else type(module)


def list_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers in the order in which they run, without the Sequentials around them."""
    if get_type(decoder) is not nn.Sequential:
        return [decoder]
    return [layer for child in decoder for layer in list_layers(child)]


def is_flatten(layer: nn.Module) -> bool:
    """Return whether the layer flattens each sample to a vector."""
    return get_type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def is_norm(layer: nn.Module) -> bool:
    """Return whether the layer is a norm with a weight and a bias for each feature or channel."""
    kind = get_type(layer)
    return kind in NORMS or (kind is not None and f"{kind.__module__}.{kind.__qualname__}" == TORCHVISION_NORM)


def is_trainable(decoder: nn.Module) -> bool:
    """Return whether any parameter requires gradients."""
    return any(p.requires_grad for p in decoder.parameters())


def shares_parameters(decoder: nn.Module) -> bool:
    """Return whether any parameter of the decoder is used in two places."""
    uses = [p for _, p in decoder.named_parameters(remove_duplicate=False)]
    return len(set(uses)) < len(uses)


def is_mlp(decoder: nn.Sequential) -> bool:
    """Return whether the decoder is linear layers and elementwise functions one after another, each used once.

    A layer before the first linear layer that works in place is refused: it would change the encodings of all probes.
    """
    layers = list_layers(decoder)
    if is_flatten(layers[0]):
        layers = layers[1:]
    for layer in takewhile(lambda layer: get_type(layer) is not nn.Linear, layers):
        if getattr(layer, "inplace", False):
            return False
    used_once = len(set(layers)) == len(layers) and not shares_parameters(decoder)
    known = all(get_type(layer) in (nn.Linear, *ELEMENTWISE) for layer in layers)
    return used_once and known and is_trainable(decoder)


def is_linear(decoder: nn.Sequential) -> bool:
    """Return whether the decoder is a trainable linear layer after layers without parameters.

    A norm just before the linear layer is allowed: the linear layer can absorb its weight and bias.
    """
    *before, last = list_layers(decoder)
    if get_type(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return False
    while before and get_type(before[-1]) is nn.Flatten:
        before.pop()
    if before and is_norm(before[-1]) and last.bias is not None:
        norm = before.pop()
        if norm.weight is not None and not norm.weight.all():  # the linear layer cannot undo a weight of 0
            return False
    return not any([*layer.parameters(), *layer.buffers()] for layer in before)
