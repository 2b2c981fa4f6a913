"""ConvNeXt: torchvision's ConvNeXt-T (Liu et al., CVPR 2022), unpacked into a Sequential of named blocks."""

from torch import nn
from torchvision.models import convnext_tiny


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build the blocks stem, block1 .. block18 with down1 .. down3 between the stages, pool (to 768 features) and
    classifier (linear).

    The first convolution has the number of input channels of the data. Images smaller than 32 x 32 are padded with
    zeros to that size.
    """
    channels, height, width = input_shape
    net = convnext_tiny(num_classes=num_classes)
    stem, *stages = net.features
    if channels != 3:
        stem[0] = nn.Conv2d(channels, 96, 4, stride=4)
        nn.init.trunc_normal_(stem[0].weight, std=0.02)
        nn.init.zeros_(stem[0].bias)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(_build_padding(width, height), *stem))
    ends, i = [], 0
    for number, stage in enumerate(stages[::2], 1):
        for block in stage:
            i += 1
            model.add_module(f"block{i}", block)
        ends.append(f"block{i}")
        if number < 4:
            model.add_module(f"down{number}", stages[2 * number - 1])
    norm, flatten, linear = net.classifier
    model.add_module("pool", nn.Sequential(net.avgpool, norm, flatten))
    model.add_module("classifier", linear)
    model.layer_names = (*(f"block{n}" for n in range(1, i + 1)), "pool")
    model.split_names = tuple(ends)
    return model


def _build_padding(width: int, height: int) -> nn.ZeroPad2d:
    across, down = max(0, 32 - width), max(0, 32 - height)
    return nn.ZeroPad2d((across // 2, across - across // 2, down // 2, down - down // 2))
