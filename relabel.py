"""Labelings that distinguish the samples of each class, computed in integer arithmetic."""

import torch
from torch import Tensor


def relabel(labels: Tensor, num_classes: int) -> Tensor:
    """Return the index of each sample within its class, written in base C. Digit j of all samples is labeling j.

    The samples of each class are enumerated 0 .. n_c - 1 in data order. The index is written with the most significant
    digit first, padded to D = max(1, ceil(log_C(max_c n_c))) digits. Together, the D labelings identify every sample
    of a class. Each labeling has at most C different labels.

    labels: (N,) int64 in 0 .. C - 1, in any order; a class may be absent.
    Returns (N, D) int64, digits in 0 .. C - 1.
    Raises ValueError for C < 2, for labels that are not 1-D, not int64 or outside 0 .. C - 1.
    Source: Dubois et al., "Learning optimal representations with the decodable information bottleneck", NeurIPS 2020
    (arXiv 2009.12789), Algorithm 1, with two changes. The samples are enumerated in data order. D is computed without
    logarithms, which in floating point give the wrong D if max_c n_c is a power of C.
    """
    C = num_classes
    if C < 2:
        raise ValueError(f"num_classes must be at least 2, got {C}")
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise ValueError(f"labels must be 1-D int64, got {labels.dtype} of shape {tuple(labels.shape)}")
    if len(labels) and not (0 <= labels.min() and labels.max() < C):
        raise ValueError(f"labels must lie in 0..{C - 1}, got {labels.min().item()}..{labels.max().item()}")

    counts = torch.bincount(labels, minlength=C)  # (C,)
    order = labels.argsort(stable=True)  # the samples, class by class, in data order
    first = (counts.cumsum(0) - counts)[labels[order]]  # position in `order` where the class of each sample begins
    index = torch.empty_like(labels)
    index[order] = torch.arange(len(labels), device=labels.device) - first

    largest, D = counts.max().item(), 1
    while C**D < largest:
        D += 1
    return torch.stack([index // C**j % C for j in reversed(range(D))], dim=1)  # (N, D)
