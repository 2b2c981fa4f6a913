"""One tensor of inputs and one of labels from what people have: a torch Dataset or DataLoader."""

import os

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

BATCH = 256  # samples of a Dataset that are read together


def collect(source: Dataset | DataLoader, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and labels (N,) on the device, each sample as the source gives it this once, in its order.

    Raises ValueError for samples that are no pairs of an input and a label, that differ in shape, or that do not fit.
    """
    device = torch.device(device)
    # a generator of its own, as the loader else draws from the global one
    loader = source if isinstance(source, DataLoader) else DataLoader(source, BATCH, generator=torch.Generator())
    read = []
    try:
        for batch in tqdm(loader, "reading samples", leave=False, disable=None, delay=1):
            x, y = pair(batch)
            if not read:
                refuse_large(loader, x, device)
            read.append((x.to(device), y.to(device)))
        if not read:
            raise ValueError("there are no samples to read")
        inputs, labels = (torch.cat(parts) for parts in zip(*read, strict=True))
    except (TypeError, RuntimeError) as error:  # of the loader, which stacks samples, or of memory
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise ValueError(f"the samples do not fit in the memory of {device}, after {len(read)} batches") from error
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the samples cannot be put into one tensor (images need transforms to tensors of one size): {reason}"
        ) from error
    return inputs, labels


def pair(batch: object) -> tuple[Tensor, Tensor]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(t, Tensor) for t in batch):
        return tuple(batch)
    got = type(batch).__name__
    if isinstance(batch, (tuple, list)):
        got += " of " + ", ".join(type(t).__name__ for t in batch)
    raise ValueError(f"a sample must be (input, label), the input a tensor and the label a number; a batch is a {got}")


def refuse_large(loader: DataLoader, x: Tensor, device: torch.device) -> None:
    """ValueError where batches like x, and the tensor made of them, are more than the device has."""
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = 2 * x.nbytes * len(loader) if hasattr(loader.dataset, "__len__") else 0
    if needed > memory:
        raise ValueError(
            f"{len(loader.dataset)} samples of {tuple(x.shape[1:])} {x.dtype} take {needed / 1e9:.3g} GB while they "
            f"become one tensor, and {device} has {memory / 1e9:.3g}: take a Subset, or smaller inputs"
        )
