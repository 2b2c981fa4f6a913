"""A fixed, stratified choice of samples."""

import numpy as np
import torch
from torch import Tensor


def choose(labels: Tensor, sizes: list[int]) -> Tensor:
    """A mask (N,) bool of sizes[c] samples of each class c, drawn once and for all.

    RandomState's stream is frozen by numpy (NEP 19), so every version draws the same samples.
    """
    shuffled = torch.from_numpy(np.random.RandomState(0).permutation(len(labels)))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for c, size in enumerate(sizes):
        chosen[shuffled[labels[shuffled] == c][:size]] = True
    return chosen


def choose_evenly(labels: Tensor, size: int, num_classes: int, what: str) -> Tensor:
    """A mask (N,) bool of size samples, as many of each class, drawn once and for all.

    Raises ValueError, naming what is chosen, for a size that is no multiple of num_classes or that a class cannot fill.
    """
    each, rest = divmod(size, num_classes)
    most = num_classes * torch.bincount(labels, minlength=num_classes).min().item()
    if rest or not 0 < size <= most:
        raise ValueError(f"{what} must be a multiple of {num_classes} up to {most}, got {size}")
    return choose(labels, [each] * num_classes)
