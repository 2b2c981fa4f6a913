"""CIFAR10, FashionMNIST and MNIST, read by torchvision, as uint8 tensors."""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.datasets import CIFAR10

NUM_CLASSES = 10
# name: shape of an image, number of training and of test images
FACTS = {
    "CIFAR10": ((3, 32, 32), 50_000, 10_000),
    "FashionMNIST": ((1, 28, 28), 60_000, 10_000),
    "MNIST": ((1, 28, 28), 60_000, 10_000),
}
# Checksums of the unpacked files. FashionMNIST's have the same names as MNIST's.
MD5 = {
    "CIFAR10": dict(CIFAR10.train_list + CIFAR10.test_list),
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
}
FOLDERS = {"CIFAR10": "cifar-10-batches-py", "FashionMNIST": "FashionMNIST/raw", "MNIST": "MNIST/raw"}


def load(name: str, root: str, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return train inputs (N, channels, height, width) uint8 and labels (N,) int64, test inputs and labels, and C.

    Raises ValueError if files are missing or differ from the published files.
    """
    _check_or_rename_files(name, Path(root, FOLDERS[name]), download)
    return (*_read(name, root, True, download), *_read(name, root, False, download), NUM_CLASSES)


def _check_or_rename_files(name: str, folder: Path, download: bool) -> None:
    """Raise ValueError for a file that differs from the published file.

    With download, rename the file instead, because torchvision downloads only missing files.
    """
    for file, published in MD5[name].items():
        path = folder / file
        if not path.is_file() or hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() == published:
            continue
        problem = f"{path} differs from the published file of {name}"
        if not download:
            raise ValueError(f"{problem}: run once with --download to replace it")
        aside = path.with_name(f"{file}.other")
        print(f"{problem}: renamed to {aside.name}", file=sys.stderr)
        path.replace(aside)


def _read(name: str, root: str, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Return the inputs (N, channels, height, width) uint8 and labels (N,) int64 of one set."""
    place = os.path.abspath(os.path.join(root, FOLDERS[name]))
    try:
        source = getattr(torchvision.datasets, name)(root, train=train, download=download)
    except Exception as error:  # torchvision raises many types for files that are missing or damaged
        reason = " ".join(str(error).split())[:200] or type(error).__name__  # on one line
        if download:
            raise ValueError(f"{name} could not be downloaded to {place}: {reason}") from error
        raise ValueError(
            f"{name} was not found intact in {place} ({reason}): "
            f"run once with --download, or set --data-dir to the folder that holds {FOLDERS[name]}"
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
