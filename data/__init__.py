"""The data sets by name. A whole split lives on the device as one tensor; a batch is an index into it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from data import images, reading, szt
from data.stratify import choose_evenly

SOURCES: dict[str, Callable[[str, bool], tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {
    "SZT": szt.load,
    **{name: partial(images.load, name) for name in images.FACTS},
}


class Split:
    """Inputs (N, ...), kept as they come, and labels (N,), as int64, on one device.

    mean, std: of uint8 images, (channels, 1, 1), which batch then normalises; without them it gives inputs as they are.
    Raises ValueError for labels that are not one integer for each input.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, mean: Tensor | None = None, std: Tensor | None = None):
        for what, tensor in (("inputs", inputs), ("labels", labels)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{what} must be a tensor, got {type(tensor).__name__}")
        integer = not labels.is_floating_point() and not labels.is_complex()
        if not integer or labels.dim() != 1 or labels.shape != inputs.shape[:1] or not len(labels):
            given = f"inputs {tuple(inputs.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
            raise ValueError(f"labels must be integers (N,), one for each of N inputs, at least one, got {given}")
        if labels.device != inputs.device:
            raise ValueError(f"inputs are on {inputs.device} and labels on {labels.device}: expected one device")
        self.inputs, self.labels, self.mean, self.std = inputs, labels.long(), mean, std

    @classmethod
    def of(cls, source: TorchDataset | DataLoader, device: torch.device | str = "cpu") -> "Split":
        """All samples of a torch Dataset or DataLoader, read once and put on the device: what it draws is drawn once.

        Raises ValueError for samples that are no (input, label), that differ in shape, or do not fit in memory.
        """
        return cls(*reading.collect(source, device))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs, images as normalised float32, and the labels of the samples named by indices."""
        x = self.inputs[indices]
        if self.mean is not None and not x.is_floating_point():
            x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return x, self.labels[indices]

    def some(self, size: int, num_classes: int, what: str) -> "Split":
        """So many of these samples, as many of each class, a fixed choice; `what` names them where that cannot be."""
        chosen = choose_evenly(self.labels.cpu(), size, num_classes, what).to(self.labels.device)
        return Split(self.inputs[chosen], self.labels[chosen], self.mean, self.std)


@dataclass
class Dataset:
    train: Split
    test: Split
    num_classes: int
    input_shape: tuple[int, ...]


def load(
    name: str,
    root: str = "datasets",
    device: torch.device | str = "cpu",
    download: bool = False,
    train_size: int | None = None,
) -> Dataset:
    """The data set `name` on `device`; files are looked for under `root`, and fetched there only if `download` is set.

    train_size: so many training samples instead of all, as many of each class, a fixed choice in data order.
    Raises ValueError for an unknown name, for files that are missing or not intact, and for a train_size that is not a
    multiple of the number of classes or that a class cannot fill.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: expected one of {', '.join(SOURCES)}")
    x_train, y_train, x_test, y_test, num_classes = SOURCES[name](root, download)
    if train_size is not None:
        chosen = choose_evenly(y_train, train_size, num_classes, f"the training size of {name}")
        x_train, y_train = x_train[chosen], y_train[chosen]
    mean, std = _moments(x_train)
    train, test = (Split(*(t.to(device) for t in (x, y, mean, std))) for x, y in ((x_train, y_train), (x_test, y_test)))
    return Dataset(train, test, num_classes, tuple(x_train.shape[1:]))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels of uint8 images, (channels, 1, 1) float32; 0 and 1 for floats."""
    if x.is_floating_point():
        return torch.zeros(1), torch.ones(1)
    values = torch.arange(256, dtype=torch.float64)
    # (channels, 256): how often each byte occurs, so that the moments are exact and no float copy of the set is made
    counts = torch.stack([torch.bincount(x[:, c].flatten(), minlength=256) for c in range(x.shape[1])]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).sqrt()
    return mean.float()[:, None, None], std.float()[:, None, None]
