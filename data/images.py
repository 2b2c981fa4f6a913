"""CIFAR10, FashionMNIST and MNIST, read by torchvision and handed on as uint8 tensors."""

import os

import numpy as np
import torch
import torchvision
from torch import Tensor

NUM_CLASSES = 10
# name: shape of an image, number of training and of test images
FACTS = {
    "CIFAR10": ((3, 32, 32), 50_000, 10_000),
    "FashionMNIST": ((1, 28, 28), 60_000, 10_000),
    "MNIST": ((1, 28, 28), 60_000, 10_000),
}
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "FashionMNIST": "FashionMNIST/raw", "MNIST": "MNIST/raw"}


def load(name: str, root: str, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Train inputs (N, channels, height, width) uint8 and labels (N,) int64, test inputs and labels, number of classes.

    Raises ValueError where the files are missing, cannot be read or do not hold the published number of images.
    """
    return (*_read(name, root, True, download), *_read(name, root, False, download), NUM_CLASSES)


def _read(name: str, root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    place = os.path.abspath(os.path.join(root, FOLDERS[name]))
    try:
        source = getattr(torchvision.datasets, name)(root, train=train, download=download)
    except Exception as error:  # torchvision raises eight kinds for files that are absent, altered or something else
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # on one line
        if download:
            raise ValueError(f"{name} could not be downloaded to {place}: {reason}") from error
        raise ValueError(
            f"{name} was not found intact in {place} ({reason}): "
            f"run once with --download, or name the folder that holds {FOLDERS[name]} with --data-dir"
        ) from error
    x, y = torch.as_tensor(np.asarray(source.data)), torch.as_tensor(np.asarray(source.targets))
    x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()  # (N, channels, height, width)
    shape, *sizes = FACTS[name]
    expected = (sizes[0 if train else 1], *shape)
    if tuple(x.shape) != expected or len(y) != len(x):
        raise ValueError(f"{name} in {place} holds {tuple(x.shape)} images and {len(y)} labels, expected {expected}")
    if not (0 <= y.min() and y.max() < NUM_CLASSES):
        raise ValueError(f"{name} in {place} holds labels {y.min()}..{y.max()}, expected 0..{NUM_CLASSES - 1}")
    return x, y.long()
