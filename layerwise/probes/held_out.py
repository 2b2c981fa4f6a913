"""Held-out loss: the probes of the original labels, trained on one set, are scored on the samples of another.

A probe that is trained to the end memorises its samples, and so does one with little regularisation. So the samples
held out are scored at several moments of the training, or for several strengths of the regularisation. They are divided
into two halves. Each sample is scored at the moment, or for the strength, that is best on the half without the sample.
"""

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise.probes.encodings import Source
from layerwise.probes.group import ProbeGroup
from layerwise.probes.linear import Basis, make_minimiser

MOMENTS = 10  # number of moments
STRENGTHS = torch.logspace(2, -6, 10, dtype=torch.float64).tolist()  # of the L2 penalty
RIDGE_ITERATIONS = 50  # of L-BFGS for each strength


@dataclass(frozen=True)
class HeldOut:
    """The samples that are held out.

    inputs: indices (B,) -> inputs (B, ...). labels: (N,) int64. in_first: whether a sample is in the first half, (N,).
    """

    inputs: Source
    labels: Tensor
    in_first: Tensor


def choose_half(labels: Tensor, seed: int) -> Tensor:
    """Return a mask (N,) of a random half of the samples. For each class, the halves differ by at most one sample."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = order[labels[order].argsort(stable=True)]
    chosen = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    chosen[by_class[::2]] = True
    return chosen


def cross_fit(losses: Tensor, in_first: Tensor) -> Tensor:
    """Return the mean loss of all samples. Each is scored with the row that is best on the half without the sample.

    losses: (M, N), of M moments or strengths. in_first: (N,), not all equal. Rows that are not finite are not best.
    """
    comparable = losses.nan_to_num(nan=torch.inf)
    best_on_first, best_on_second = (comparable[:, half].mean(1).argmin() for half in (in_first, ~in_first))
    return losses[best_on_second].where(in_first, losses[best_on_first]).mean()


def list_moments(steps: int) -> set[int]:
    """Return MOMENTS numbers of steps with about constant ratios, from 1 to all. There are fewer if steps are few."""
    return {ceil(steps ** (i / (MOMENTS - 1))) for i in range(MOMENTS)}


class Recorder:
    """The losses on the held-out samples at several moments, of the probes of the original labels in a group.

    sources: {k: the source of the encodings of the held-out samples at split k}.
    """

    def __init__(self, held_out: HeldOut, sources: dict[int, Source], batch_size: int):
        self.held_out, self.sources, self.batch_size = held_out, sources, batch_size
        self.losses: list[Tensor] = []  # a tensor (P, N) for each moment, with a row for each probe

    @torch.no_grad()
    def record(self, group: ProbeGroup, recompute: bool) -> None:
        """Compute the losses with the present weights. recompute: whether to recompute BatchNorm statistics.

        The group does not change: its probes are copied.
        """
        probes = group.copy_probes(0)
        if recompute:
            N = len(group.targets)
            order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).to(group.targets.device)
            probes.recompute_batchnorm_statistics(order.tensor_split(ceil(N / self.batch_size)))
        labels = self.held_out.labels
        probes.sources = {k: self.sources[k] for k in probes.probes}
        probes.targets = labels[:, None]
        for probe in probes.modules():
            probe.eval()
        batches = torch.arange(len(labels), device=labels.device).split(self.batch_size)
        self.losses.append(torch.cat([probes.compute_sample_losses(indices) for indices in batches], dim=1).double())

    def select_rows(self, learns: Tensor, rows: Tensor) -> None:
        """Keep the losses of the probes in these rows of the group. learns: the labeling of each probe of the group."""
        before, after = (learns == 0).nonzero().flatten(), rows[learns[rows] == 0]
        self.losses = [losses[torch.searchsorted(before, after)] for losses in self.losses]

    def compute_held_out_losses(self) -> list[float]:
        """Return the cross-fitted loss of each probe, in nats."""
        return [cross_fit(losses, self.held_out.in_first).item() for losses in torch.stack(self.losses, dim=1)]


def compute_ridge_losses(basis: Basis, labels: Tensor, z: Tensor, held_out: Tensor, C: int, bias: bool) -> Tensor:
    """Return the losses (strengths, N) of linear probes with an L2 penalty on the samples held out, in nats.

    The probes minimise the mean cross-entropy on the training set plus strength / 2 times the sum of the squared
    weights of the standardised features. The bias has no penalty.

    basis: of the features of the training set. labels: of the training set. z, held_out: features (N, d) in float64 and
    labels (N,) of the samples held out.
    """
    U, S, V = basis.U, basis.S, basis.V
    trained, tested = U * S, (z - basis.mean) / basis.scale @ V  # (N, r), standardised features in the basis V
    A, b = U.new_zeros(len(S), C), U.new_zeros(1, C)
    losses = []
    for strength in STRENGTHS:
        # B = A / size has a penalty and a curvature of similar size in all directions
        size = (strength + S.square() / len(U) / C).rsqrt()[:, None]
        features = trained * size.T
        B = torch.cat([A / size, b])

        def compute_loss(strength=strength, size=size, features=features, B=B) -> Tensor:
            logits = features @ B[:-1] + (B[-1:] if bias else 0)
            return F.cross_entropy(logits, labels) + strength / 2 * (size * B[:-1]).square().sum()

        make_minimiser(B, compute_loss, tolerance=1e-4)(RIDGE_ITERATIONS)
        A, b = size * B[:-1], B[-1:]  # the next strength starts here
        losses.append(F.cross_entropy(tested @ A + (b if bias else 0), held_out, reduction="none"))
    return torch.stack(losses)
