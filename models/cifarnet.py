"""CIFARNet: the network of github.com/KellerJordan/cifar10-airbench (arXiv 2404.00498)."""

import torch
from torch import Tensor, nn

WIDTHS = (64, 256, 256)


def build(input_shape: tuple[int, ...], num_classes: int, whitening: Tensor | None = None) -> nn.Sequential:
    """Build the blocks whiten (frozen 2 x 2 filters with a bias, GELU), group1 .. group3, pool (to 256 features) and
    classifier.

    whitening: the frozen filters (see compute_whitening). If None, they are random.
    """
    channels = input_shape[0]
    first = nn.Conv2d(channels, 8 * channels, 2)
    first.weight.requires_grad = False
    if whitening is not None:
        first.weight.data.copy_(whitening)
    model = nn.Sequential()
    model.add_module("whiten", nn.Sequential(first, nn.GELU()))
    fan_in = 8 * channels
    for i, width in enumerate(WIDTHS, 1):
        model.add_module(f"group{i}", _build_group(fan_in, width))
        fan_in = width
    model.add_module("pool", nn.Sequential(nn.MaxPool2d(3), nn.Flatten()))
    classifier = nn.Linear(fan_in, num_classes, bias=False)
    classifier.weight.data /= classifier.weight.data.std()
    model.add_module("classifier", nn.Sequential(_Divide(fan_in), classifier))
    model.layer_names = ("group1", "group2", "group3", "pool")
    model.split_names = ("group1", "group2", "group3")
    return model


def compute_whitening(images: Tensor) -> Tensor:
    """Return the whitening filters (8 channels, channels, 2, 2) of images (N, channels, height, width).

    The filters are the eigenvectors of the second moments of all 2 x 2 patches, each divided by
    sqrt(eigenvalue + 5e-4), and their negatives. As in the original code, the mean is not subtracted. For normalised
    images it is nearly 0.
    """
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).movedim(1, 3).flatten(0, 2).flatten(1).double()  # (patches, d)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    scaled = (eigenvectors / (eigenvalues + 5e-4).sqrt()).T.reshape(-1, images.shape[1], 2, 2).float()
    return torch.cat([scaled, -scaled])


def _build_group(fan_in: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *(_build_conv(fan_in, width), nn.MaxPool2d(2), _build_norm(width), nn.GELU()),
        *(_build_conv(width, width), _build_norm(width), nn.GELU()),
    )


def _build_conv(fan_in: int, width: int) -> nn.Conv2d:
    """Build a 3 x 3 convolution without bias. The first fan_in filters are the identity at construction."""
    conv = nn.Conv2d(fan_in, width, 3, padding="same", bias=False)
    filters = conv.weight.data[:fan_in]
    filters.zero_()  # nn.init.dirac_ is slow on CUDA: it launches a kernel for each number
    filters[:, :, 1, 1] = torch.eye(*filters.shape[:2])
    return conv


def _build_norm(width: int) -> nn.BatchNorm2d:
    """Build a BatchNorm with a trained shift, no trained scale, and momentum and epsilon of the original code."""
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    del norm.weight
    norm.register_buffer("weight", torch.ones(width))
    return norm


class _Divide(nn.Module):
    """Divide by a constant. The original code divides the logits instead: the same, as 256 is a power of two."""

    def __init__(self, by: float):
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x / self.by
