"""SZT: the 4096 patterns of Shwartz-Ziv & Tishby (2017, arXiv 1703.00810), regenerated from their rule."""

import torch
from torch import Tensor

from layerwise.samples import choose_per_class

TEST_SHARE = 0.15


def make_patterns() -> tuple[Tensor, Tensor]:
    """Return all 12-bit inputs (4096, 12) float32 in binary order, input 0 the highest bit, and labels (4096,).

    Input i belongs to vertex v_i of a regular icosahedron on the unit sphere. The label is 1 if and only if
    n + ||sum of the active v_i|| > 7.63, where n is the number of active inputs. These are the published labels.
    """
    f = (1 + 5**0.5) / 2
    vertices = [
        (0, 1, f), (1, f, 0), (0, 1, -f), (-1, f, 0), (f, 0, -1), (0, -1, f),
        (1, -f, 0), (-1, -f, 0), (-f, 0, -1), (0, -1, -f), (-f, 0, 1), (f, 0, 1),
    ]  # fmt: skip
    v = torch.tensor(vertices, dtype=torch.float64) / (1 + f**2) ** 0.5  # (12, 3)
    x = torch.arange(4096)[:, None] >> torch.arange(11, -1, -1) & 1  # (4096, 12)
    score = x.sum(1) + (x.double() @ v).norm(dim=1)
    return x.float(), (score > 7.63).long()


def load(root: str, download: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Return train inputs and labels, test inputs and labels, and the number of classes. No file is read.

    The training set has 85 % of each class, the same patterns each time. Both sets are in binary order.
    """
    x, y = make_patterns()
    test = choose_per_class(y, [round(TEST_SHARE * n) for n in torch.bincount(y).tolist()])
    return x[~test], y[~test], x[test], y[test], 2
