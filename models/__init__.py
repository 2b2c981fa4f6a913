"""The architectures by name. Every model is an nn.Sequential of named blocks, so that model[:k] is an encoder,
model[k:] its decoder, and a tap is a forward hook on a block."""

from collections.abc import Iterable

from torch import nn

from models import cifarnet, convnext, mlp, mnistnet, resnet

ARCHITECTURES = {
    "MLP": mlp.build,
    "MNISTNet": mnistnet.build,
    "CIFARNet": cifarnet.build,
    "ConvNeXt": convnext.build,
    "ResNet": resnet.build,
}


def build(name: str, input_shape: tuple[int, ...], num_classes: int, **options) -> nn.Sequential:
    """A freshly initialised model for inputs of input_shape, drawing from torch's global generator.

    Raises ValueError for an unknown name, for inputs that are no images where the model convolves, and for options that
    the architecture refuses.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    if name in ("MNISTNet", "CIFARNet", "ConvNeXt", "ResNet") and len(input_shape) != 3:
        size = " x ".join(map(str, input_shape))
        raise ValueError(f"{name} convolves images, channels x height x width, and these inputs are {size}: use MLP")
    return ARCHITECTURES[name](input_shape, num_classes, **options)


def taps(model: nn.Sequential) -> dict[str, nn.Module]:
    """The blocks whose outputs NC1 measures, by name, in order of depth."""
    return {name: model.get_submodule(name) for name in model.tap_names}


def splits(model: nn.Sequential, names: Iterable[str] | None = None) -> dict[str, int]:
    """Where DIB cuts the model into encoder model[:k] and decoder model[k:]: each k by the name of the encoder's last
    block; `input` is 0, no encoder. By default the cuts that the architecture names; any block may be asked for.

    Raises ValueError for a name that is no block of the model.
    """
    depth = {"input": 0} | {name: k for k, (name, _) in enumerate(model.named_children(), 1)}
    depth.popitem()  # after the classifier there is no decoder left
    names = ("input", *model.split_names) if names is None else tuple(names)
    for name in names:
        if name not in depth:
            raise ValueError(f"this model has no split {name!r}: expected some of {', '.join(depth)}")
    return {name: k for name, k in depth.items() if name in names}
