"""The architectures by name. Every model is an nn.Sequential of named blocks.

model[:k] is an encoder, model[k:] its decoder, and a layer is measured by a forward hook on a block.
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

    Raises ValueError for an unknown name, for inputs that are not images if the model convolves, and for options that
    the architecture refuses.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    if name in ("MNISTNet", "CIFARNet", "ConvNeXt", "ResNet") and len(input_shape) != 3:
        size = " x ".join(map(str, input_shape))
        raise ValueError(f"{name} convolves images, channels x height x width, and these inputs are {size}: use MLP")
    return ARCHITECTURES[name](input_shape, num_classes, **options)


def layers(model: nn.Sequential) -> dict[str, nn.Module]:
    """Return {name: block} of the blocks whose outputs NC1 measures, in order of depth."""
    return {name: model.get_submodule(name) for name in model.layer_names}


def splits(model: nn.Sequential, names: Iterable[str] | None = None) -> dict[str, int]:
    """Return {name: k} of encoder/decoder splits, into encoder model[:k] and decoder model[k:], in order of depth.

    The name of a split is that of the encoder's last block. `input` is 0: no encoder. names: any blocks; by default
    those that the architecture names. Raises ValueError for a name that is not a block of the model.
    """
    depth = {"input": 0} | {name: k for k, (name, _) in enumerate(model.named_children(), 1)}
    depth.popitem()  # after the classifier no decoder is left
    names = ("input", *model.split_names) if names is None else tuple(names)
    for name in names:
        if name not in depth:
            raise ValueError(f"this model has no split {name!r}: expected some of {', '.join(depth)}")
    return {name: k for name, k in depth.items() if name in names}
