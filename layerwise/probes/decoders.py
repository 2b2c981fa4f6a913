"""Inspect a decoder: list its layers, which are the modules in its Sequentials, and classify it as MLP or linear."""

from itertools import takewhile

from torch import nn
from torch.nn.modules.module import _has_any_global_hook  # torch has no public way to list global hooks

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
TORCHVISION_NORM = "torchvision.models.convnext.LayerNorm2d"  # compared by name: torchvision is not imported


def get_unmodified_type(module: nn.Module) -> type | None:
    """Return type(module), or None if a hook or a replaced forward may change what the module computes."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    modified = any(hooks) or "forward" in vars(module) or _has_any_global_hook()
    return None if modified else type(module)


def list_layers(decoder: nn.Module) -> list[nn.Module]:
    """Return the layers of a decoder in order. Nested Sequentials are flattened."""
    if get_unmodified_type(decoder) is not nn.Sequential:
        return [decoder]
    return [layer for child in decoder for layer in list_layers(child)]


def is_flatten(layer: nn.Module) -> bool:
    """Return whether the layer flattens each sample to a vector."""
    return get_unmodified_type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def is_norm(layer: nn.Module) -> bool:
    """Return whether the layer is a norm. Weight and bias, if any, are per feature or channel."""
    kind = get_unmodified_type(layer)
    return kind in NORMS or (kind is not None and f"{kind.__module__}.{kind.__qualname__}" == TORCHVISION_NORM)


def list_matrices(decoder: nn.Module) -> dict[str, tuple[int, int]]:
    """Return {name: (m, n)} of the parameters of several dimensions: m outputs, n inputs of an output."""
    return {name: tuple(p.flatten(1).shape) for name, p in decoder.named_parameters() if p.dim() > 1}


def is_trainable(decoder: nn.Module) -> bool:
    """Return whether any parameter requires gradients."""
    return any(p.requires_grad for p in decoder.parameters())


def shares_parameters(decoder: nn.Module) -> bool:
    """Return whether any parameter of the decoder is used in two places."""
    uses = [p for _, p in decoder.named_parameters(remove_duplicate=False)]
    return len(set(uses)) < len(uses)


def is_mlp(decoder: nn.Sequential) -> bool:
    """Return whether the decoder is a trainable MLP: linear layers and elementwise functions, each used once.

    A Flatten may come first. No layer before the first linear layer may work in place: it would change the encodings of
    the other probes.
    """
    layers = list_layers(decoder)
    if is_flatten(layers[0]):
        layers = layers[1:]
    for layer in takewhile(lambda layer: get_unmodified_type(layer) is not nn.Linear, layers):
        if getattr(layer, "inplace", False):
            return False
    used_once = len(set(layers)) == len(layers) and not shares_parameters(decoder)
    known = all(get_unmodified_type(layer) in (nn.Linear, *ELEMENTWISE) for layer in layers)
    return used_once and known and is_trainable(decoder)


def is_linear(decoder: nn.Sequential) -> bool:
    """Return whether the decoder is a trainable linear layer after layers without parameters and buffers.

    A norm directly before the linear layer is allowed: the linear layer can absorb its weight and bias.
    """
    *before, last = list_layers(decoder)
    if get_unmodified_type(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return False
    while before and get_unmodified_type(before[-1]) is nn.Flatten:
        before.pop()
    if before and is_norm(before[-1]) and last.bias is not None:
        norm = before.pop()
        if norm.weight is not None and not norm.weight.all():  # the linear layer cannot undo a weight of 0
            return False
    return not any([*layer.parameters(), *layer.buffers()] for layer in before)
