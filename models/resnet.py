"""ResNet: torchvision's ResNet-18 (He et al., CVPR 2016), unpacked into a Sequential of named blocks."""

from torch import nn
from torchvision.models import resnet18


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build the blocks stem, block1 .. block8, pool (to 512 features) and classifier (linear).

    The first convolution has the number of input channels of the data.
    """
    net = resnet18(num_classes=num_classes)
    if input_shape[0] != 3:
        net.conv1 = nn.Conv2d(input_shape[0], 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool))
    blocks = [*net.layer1, *net.layer2, *net.layer3, *net.layer4]
    for i, block in enumerate(blocks, 1):
        model.add_module(f"block{i}", block)
    model.add_module("pool", nn.Sequential(net.avgpool, nn.Flatten()))
    model.add_module("classifier", net.fc)
    model.layer_names = (*(f"block{i}" for i in range(1, 9)), "pool")
    model.split_names = ("block2", "block4", "block6", "block8")  # the stages
    return model
