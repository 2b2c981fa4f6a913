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
