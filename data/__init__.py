"""The data sets by name. Each has a training set and a test set: Samples on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data import images, szt
from layerwise.samples import Samples, choose_evenly

SOURCES: dict[str, Callable[[str, bool], tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {
    "SZT": szt.load,
    **{name: partial(images.load, name) for name in images.FACTS},
}


@dataclass
class Dataset:
    """A training set and a test set."""

    train: Samples
    test: Samples
    num_classes: int
    input_shape: tuple[int, ...]


def load(
    name: str,
    root: str = "datasets",
    device: torch.device | str = "cpu",
    download: bool = False,
    train_size: int | None = None,
) -> Dataset:
    """Return the data set `name` on the device.

    root: the folder of the files. download: whether to download missing files. train_size: the number of training
    samples, the same number from each class (None: all). The same samples are chosen each time, in data order. Raises
    ValueError for an unknown name, for files that are missing or damaged, and for a train_size that is not a multiple
    of the number of classes, or for which a class has too few samples.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(SOURCES)}")
    x_train, y_train, x_test, y_test, num_classes = SOURCES[name](root, download)
    if train_size is not None:
        chosen = choose_evenly(y_train, train_size, num_classes, f"the training size of {name}")
        x_train, y_train = x_train[chosen], y_train[chosen]
    mean, std = _compute_moments(x_train)
    mean, std = mean.to(device), std.to(device)
    train = Samples(x_train.to(device), y_train.to(device), mean, std)
    test = Samples(x_test.to(device), y_test.to(device), mean, std)
    return Dataset(train, test, num_classes, tuple(x_train.shape[1:]))


def _compute_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels of uint8 images, (channels, 1, 1). For floats return 0, 1."""
    if x.is_floating_point():
        return torch.zeros(1), torch.ones(1)
    values = torch.arange(256, dtype=torch.float64)
    # (channels, 256): how often each byte occurs. The moments are exact, and no float copy of the set is made.
    counts = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256) for c in range(x.shape[1])]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
