"""The architectures by name. Every model is an nn.Sequential of named blocks.

Split k divides a model into the encoder model[:k] and the decoder model[k:]. The layers that NC1 measures are blocks.
"""

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
    """Return a newly initialised model for inputs of input_shape, with weights from torch's global generator.

    Raises ValueError for an unknown name, for a convolutional model of inputs that are not images, and for options that
    are not valid.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    if name in ("MNISTNet", "CIFARNet", "ConvNeXt", "ResNet") and len(input_shape) != 3:
        size = " x ".join(map(str, input_shape))
        raise ValueError(f"{name} requires images (channels, height, width), got inputs of shape {size}: use MLP")
    return ARCHITECTURES[name](input_shape, num_classes, **options)


def layers(model: nn.Sequential) -> dict[str, nn.Module]:
    """Return {name: block} of the layers that NC1 measures, in order of depth."""
    return {name: model.get_submodule(name) for name in model.layer_names}


def splits(model: nn.Sequential, names: Iterable[str] | None = None) -> dict[str, int]:
    """Return {name: k} of encoder/decoder splits, in order of depth.

    The name of a split is the name of the last block of its encoder. `input` is split 0, which has no encoder. names:
    `input` and names of blocks; the default is `input` and model.split_names. Raises ValueError for any other name.
    """
    depth = {"input": 0} | {name: k for k, (name, _) in enumerate(model.named_children(), 1)}
    depth.popitem()  # after the last block, the decoder would be empty
    names = ("input", *model.split_names) if names is None else tuple(names)
    for name in names:
        if name not in depth:
            raise ValueError(f"unknown split {name!r}: expected some of {', '.join(depth)}")
    return {name: k for name, k in depth.items() if name in names}
