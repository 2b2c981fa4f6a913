"""The architectures by name. Every model is an nn.Sequential of named blocks, so that model[:k] is an encoder,
model[k:] its decoder, and a tap is a forward hook on a block."""

from torch import nn

from models import mlp

ARCHITECTURES = {"MLP": mlp.build}


def build(name: str, input_shape: tuple[int, ...], num_classes: int, **options) -> nn.Sequential:
    """A freshly initialised model for inputs of input_shape, drawing from torch's global generator.

    Raises ValueError for an unknown name and for options that the architecture refuses.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name](input_shape, num_classes, **options)


def taps(model: nn.Sequential) -> dict[str, nn.Module]:
    """The blocks whose outputs NC1 measures, by name, in order of depth."""
    return {name: model.get_submodule(name) for name in model.tap_names}


def splits(model: nn.Sequential) -> dict[str, int]:
    """Where DIB cuts the model into encoder model[:k] and decoder model[k:]: each k by the name of the encoder's last
    block. `input` is 0: no encoder."""
    depth = {name: k for k, (name, _) in enumerate(model.named_children(), 1)}
    return {"input": 0} | {name: depth[name] for name in model.split_names}
