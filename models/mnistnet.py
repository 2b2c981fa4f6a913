"""MNISTNet: the small convolutional network of github.com/tuomaso/train_mnist_fast (last notebook)."""

from torch import nn


def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Build the blocks conv1, conv2 (convolution, max-pooling, ReLU), hidden1 (256 units, ReLU) and classifier."""
    channels, height, width = input_shape
    features = 32 * (((height - 4) // 2 - 2) // 2) * (((width - 4) // 2 - 2) // 2)  # 800 for 28 x 28
    model = nn.Sequential()
    model.add_module("conv1", nn.Sequential(nn.Conv2d(channels, 24, 5), nn.MaxPool2d(2), nn.ReLU()))
    model.add_module("conv2", nn.Sequential(nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU()))
    model.add_module("hidden1", nn.Sequential(nn.Flatten(), nn.Linear(features, 256), nn.ReLU()))
    model.add_module("classifier", nn.Linear(256, num_classes))
    model.layer_names = model.split_names = ("conv1", "conv2", "hidden1")
    return model
