"""Samples: the inputs and labels of a set, as two tensors. A batch is read by indexing both."""

import os

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from layerwise.devices import is_out_of_memory

READ_BATCH_SIZE = 256  # samples per read of a Dataset


class Samples:
    """The inputs (N, ...) and the labels (N,) of a set, on one device.

    inputs: of any dtype. labels: integers, converted to int64. mean, std: (channels, 1, 1). If they are given, `batch`
    normalises integer images with them. Raises ValueError if inputs or labels are not valid.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, mean: Tensor | None = None, std: Tensor | None = None):
        for what, tensor in (("inputs", inputs), ("labels", labels)):
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{what} must be a tensor, got {type(tensor).__name__}")
        is_integer = not labels.is_floating_point() and not labels.is_complex()
        if not is_integer or labels.dim() != 1 or labels.shape != inputs.shape[:1] or not len(labels):
            given = f"inputs {tuple(inputs.shape)} and {labels.dtype} labels {tuple(labels.shape)}"
            raise ValueError(f"labels must be an integer tensor (N,) with N = len(inputs) >= 1, got {given}")
        if labels.device != inputs.device:
            raise ValueError(f"inputs are on {inputs.device} and labels on {labels.device}: expected one device")
        self.inputs, self.labels, self.mean, self.std = inputs, labels.long(), mean, std

    @classmethod
    def of(cls, source: Dataset | DataLoader, device: torch.device | str = "cpu") -> "Samples":
        """Read all samples of a torch Dataset or DataLoader once, and put them on the device.

        Random transforms are applied once, when the samples are read. Raises ValueError for samples that are not
        (input, label), that differ in shape, or that do not fit in memory.
        """
        return cls(*read_all(source, device))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs (B, ...) and labels (B,) of the samples with these indices. Normalised images are float32."""
        x = self.inputs[indices]
        if self.mean is not None and not x.is_floating_point():
            x = ((x - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        return x, self.labels[indices]

    def choose(self, size: int, num_classes: int, what: str) -> "Samples":
        """Return a subset of `size` samples, the same number from each class. See choose_evenly."""
        chosen = choose_evenly(self.labels.cpu(), size, num_classes, what).to(self.labels.device)
        return Samples(self.inputs[chosen], self.labels[chosen], self.mean, self.std)


def choose_per_class(labels: Tensor, sizes: list[int]) -> Tensor:
    """Return a boolean mask (N,) of sizes[c] samples of each class c. The choice is random with a fixed seed.

    numpy guarantees the random numbers of RandomState (NEP 19), so every version chooses the same samples.
    """
    shuffled = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c, size in enumerate(sizes):
        chosen[shuffled[labels[shuffled] == c][:size]] = True
    return chosen


def choose_evenly(labels: Tensor, size: int, num_classes: int, what: str) -> Tensor:
    """Return a boolean mask (N,) of `size` samples, the same number from each class. The same are chosen each time.

    Raises ValueError if size is not a multiple of num_classes, or if a class has too few samples. The message begins
    with `what`.
    """
    each, rest = divmod(size, num_classes)
    most = num_classes * torch.bincount(labels, minlength=num_classes).min().item()
    if rest or not 0 < size <= most:
        raise ValueError(f"{what} must be a multiple of {num_classes} up to {most}, got {size}")
    return choose_per_class(labels, [each] * num_classes)


def read_all(source: Dataset | DataLoader, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Read all samples of the source in order. Return inputs (N, ...) and labels (N,) on the device."""
    device = torch.device(device)
    if isinstance(source, DataLoader):
        loader = source
    else:  # with a generator: without one a DataLoader draws from torch's global generator
        loader = DataLoader(source, READ_BATCH_SIZE, generator=torch.Generator())
    read = []
    try:
        for batch in tqdm(loader, "reading samples", leave=False, disable=None, delay=1):
            x, y = validate_pair(batch)
            if not read:
                validate_size(loader, x, device)
            read.append((x.to(device), y.to(device)))
        if not read:
            raise ValueError("there are no samples to read")
        inputs, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
    except (TypeError, RuntimeError) as error:  # from the loader, which stacks samples, or from an allocation
        if is_out_of_memory(error):
            raise ValueError(f"the samples do not fit in the memory of {device}, after {len(read)} batches") from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the samples cannot be stacked (images must be transformed to tensors of the same size): {reason}"
        ) from error
    return inputs, labels


def validate_pair(batch: object) -> tuple[Tensor, Tensor]:
    """Return a batch as (inputs, labels); raise ValueError for anything else."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
        return tuple(batch)
    got = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        got += " of " + ", ".join(type(t).__name__ for t in batch)
    raise ValueError(f"each sample must be (input, label), a tensor and a number, got batches of type {got}")


def validate_size(loader: DataLoader, x: Tensor, device: torch.device) -> None:
    """Raise ValueError if batches like x and their concatenation do not fit in the memory of the device."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 2 * x.nbytes * len(loader) if hasattr(loader.dataset, "__len__") else 0
    if needed > memory:
        raise ValueError(
            f"reading {len(loader.dataset)} samples of {tuple(x.shape[1:])} {x.dtype} needs {needed / 1e9:.3g} GB, but "
            f"{device} has only {memory / 1e9:.3g} GB: use a torch.utils.data.Subset or smaller inputs"
        )
