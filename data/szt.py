"""SZT: the 4096 patterns of Shwartz-Ziv & Tishby (2017, arXiv 1703.00810), regenerated from their rule."""

import torch
from torch import Tensor

from data.stratify import choose

TEST_SHARE = 0.15


def patterns() -> tuple[Tensor, Tensor]:
    """All 12-bit inputs (4096, 12) float32, in binary order with input 0 the most significant, and labels (4096,).

    Input i sits at vertex v_i of a regular icosahedron on the unit sphere. The label is 1 iff
    n + ||sum of the active v_i|| > 7.63, n being the number of active inputs. This gives the published labels.
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
    """Train inputs and labels, test inputs and labels, number of classes. Nothing is read: the rule is the data set.

    85 % of each class is for training, drawn once and for all; both sets keep the binary order.
    """
    x, y = patterns()
    test = choose(y, [round(TEST_SHARE * n) for n in torch.bincount(y).tolist()])
    return x[~test], y[~test], x[test], y[test], 2
