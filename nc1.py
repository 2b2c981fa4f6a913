"""NC1, within-class variability collapse, at every tap of a model: tr(Sigma_W pinv(Sigma_B)).

N samples, C classes, n_c samples of class c, h in R^d the flattened activation at a tap. With mu_c the class means, mu
the mean over all samples and M = [mu_1 - mu, ..., mu_C - mu] (d x C),

    Sigma_B = M M^T / C        Sigma_W = (1/N) sum_i (h_i - mu_c(i)) (h_i - mu_c(i))^T.

d reaches 10^5, so neither is ever formed. With the singular value decomposition M = U S V^T, of rank r <= C - 1,

    tr(Sigma_W pinv(Sigma_B)) = (C/N) sum_i || S^-1 U^T (h_i - mu_c(i)) ||^2,

which takes one pass over the samples for the class means and one for the sum. The trace is not divided by C; Papyan,
Han & Donoho (PNAS 2020) divide.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn
from tqdm import tqdm

import devices
import ranks

# Singular values of M below this share of the largest are taken for rounding: activations are float32, of relative
# precision 6e-8, so that a direction which the means do not have appears at about 1e-7 of the largest.
RANK_TOLERANCE = 1e-6
# So are those below this share of the means' own length: class means that coincide, but for rounding, have rank 0.
MEAN_TOLERANCE = torch.finfo(torch.float32).eps

KEEP_BYTES = devices.KEEP_BYTES  # activations kept from the first pass
CHUNK_BYTES = 8 * 2**20  # activations turned into float64 at a time: larger chunks were slower, and stay in memory
ON_CUDA = 8  # times as many there, where 8 MiB pass in less than the launch of a kernel takes (by estimate)


@devices.exact_float32()
def measure(
    model: nn.Module,
    taps: dict[str, nn.Module],
    split,
    num_classes: int,
    batch_size: int = 400,
    keep_bytes: int = KEEP_BYTES,
) -> dict[str, tuple[int, int, float]]:
    """NC1 of every tap on one split: {tap: (d, rank of M, tr(Sigma_W pinv(Sigma_B)))}.

    taps: modules of the model, each called once a forward pass. split: len(), .labels (N,) int64, .batch(indices) ->
    (inputs, labels). The model is measured in eval mode with the weights it has, and left in the mode it was in. The
    value has no unit; it is NaN where the rank is 0: class means that coincide have no NC1. Sums are float64 and agree
    with the dense formula whatever the batch size. Activations of the deepest taps are kept for the second pass as far
    as keep_bytes allows; for the others the model runs again, no deeper than needed. Processes that torchrun started
    share the batches, and must all call.
    Raises ValueError for a class with no samples, labels outside 0 .. C - 1, a tap not called exactly once or
    overwritten in place, and activations that are not finite.
    """
    counts = _class_counts(split.labels, num_classes)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        sums, kept = _first_pass(model, taps, split, num_classes, batch_size, keep_bytes)
        means, projections = {tap: sums[tap].div_(counts[:, None]) for tap in sums}, {}  # (C, d)
        for tap in reversed(means):  # the first layer that is not finite spoils the deeper ones
            if not means[tap].isfinite().all():
                raise ValueError(f"NC1: the activations of layer {tap!r} are not finite")
            projections[tap] = whitening(means[tap], counts)  # (r, d)
        totals = _second_pass(model, taps, split, batch_size, kept, means, projections)
    finally:
        for module, training in modes:
            module.training = training

    result = {}
    for tap in taps:
        r, d = projections[tap].shape
        result[tap] = (d, r, num_classes / len(split) * totals[tap].item() if r else float("nan"))
    return result


def _first_pass(model, taps, split, num_classes, batch_size, keep_bytes) -> tuple[dict, dict]:
    """{tap: class sums (C, d) float64}, deepest tap first, and {tap: [(h, y), ...]}, the batches of those kept."""
    sums, kept, versions = {}, {}, []
    for tap, h in reversed(_probe(model, taps, split).items()):
        sums[tap] = torch.zeros(num_classes, h.shape[1], dtype=torch.float64, device=h.device)
        keep_bytes -= len(split) * h.nbytes
        if keep_bytes >= 0:
            kept[tap] = []

    def visit(tap: str, h: Tensor, y: Tensor) -> None:
        if tap in kept:
            kept[tap].append((h, y))
            versions.append((tap, h, h._version))
        else:
            add_class_sums(sums[tap], [(h, y)])

    _visit(model, taps, split, _batches(split, batch_size, "NC1 class means"), visit, deepest=next(iter(sums), None))
    for tap, h, version in versions:
        if h._version != version:
            raise ValueError(f"NC1: layer {tap!r} has its output overwritten by a layer that works in place")
    for tap, batches in kept.items():
        add_class_sums(sums[tap], batches)
    ranks.add_up(*sums.values())
    return sums, kept


def _second_pass(model, taps, split, batch_size, kept, means, projections) -> dict[str, Tensor]:
    """{tap: sum_i || S^-1 U^T (h_i - mu_c(i)) ||^2}, of the activations kept and, for the other taps, of new ones."""
    totals = {tap: squared_distances(kept.get(tap, []), means[tap], projections[tap]) for tap in means}

    def visit(tap: str, h: Tensor, y: Tensor) -> None:
        totals[tap] += squared_distances([(h, y)], means[tap], projections[tap])

    again = {tap: taps[tap] for tap in means if tap not in kept}
    if again:
        _visit(model, again, split, _batches(split, batch_size, "NC1 distances"), visit, deepest=next(iter(again)))
    ranks.add_up(*totals.values())
    return totals


def _batches(split, batch_size: int, title: str) -> Iterable[Tensor]:
    """The indices in data order, this process's share of batches; a bar where the pass is long and somebody looks."""
    indices = ranks.share(torch.arange(len(split), device=split.labels.device).split(batch_size))
    return tqdm(indices, title, leave=False, disable=None, delay=1)


def add_class_sums(sums: Tensor, batches: list[tuple[Tensor, Tensor]]) -> None:
    """Add the activations h (B, d) of classes y (B,) of all batches to the sums of their classes, (C, d) float64."""
    for h, y in _float64(batches):
        sums.index_add_(0, y, h)


def whitening(means: Tensor, counts: Tensor) -> Tensor:
    """S^-1 U^T (r, d) of M = U S V^T, from the class means (C, d) and sizes (C,), both float64; r is the rank of M.

    A direction counts towards the rank if its singular value exceeds RANK_TOLERANCE times the largest one and
    MEAN_TOLERANCE times the length of the longest class mean.
    """
    mu = counts @ means / counts.sum()  # (d,)
    Mt = (means - mu).cpu()  # (C, d): small, and LAPACK's singular values give the same rank on every device
    _, S, Ut = torch.linalg.svd(Mt, full_matrices=False)  # M^T = V S U^T: (min(d, C),), (min(d, C), d)
    floor = max(RANK_TOLERANCE * S[0].item(), MEAN_TOLERANCE * means.norm(dim=1).max().item())
    r = int((S > floor).sum())
    return (Ut[:r] / S[:r, None]).to(means.device)


def squared_distances(batches: list[tuple[Tensor, Tensor]], means: Tensor, P: Tensor) -> Tensor:
    """sum_i || P (h_i - mu_c(i)) ||^2 over all batches h (B, d), y (B,), for P = S^-1 U^T (r, d): float64, 0-D.

    As || P h_i - P mu_c(i) ||: what float64 loses in that difference is below float32's rounding of h itself.
    """
    centers, total = P @ means.T, means.new_zeros(())  # (r, C)
    for h, y in _float64(batches):
        total += (P @ h.T - centers[:, y]).square().sum()  # (r, b)
    return total


def _float64(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in float64, batches joined or cut so that a copy has at most CHUNK_BYTES, ON_CUDA times that
    there, if not one row."""
    B, d = batches[0][0].shape if batches else (1, 1)
    most = CHUNK_BYTES * ON_CUDA if batches and batches[0][0].is_cuda else CHUNK_BYTES
    rows = max(1, most // (8 * d))
    together = max(1, rows // B)  # batches
    for i in range(0, len(batches), together):
        h, y = map(torch.cat, zip(*batches[i : i + together], strict=True)) if together > 1 else batches[i]
        for some_h, some_y in zip(h.split(rows), y.split(rows), strict=True):
            yield some_h.double(), some_y


def _class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """n_c (C,) float64."""
    if len(labels) and not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"NC1: labels must lie in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}"
        )
    counts = torch.bincount(labels, minlength=num_classes)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"NC1: every class needs samples, got none of class {', '.join(map(str, empty))}")
    return counts.double()


class _Enough(Exception):
    """Raised in the deepest tap that is asked for, to end the forward pass there."""


@torch.no_grad()
def _visit(model: nn.Module, taps: dict[str, nn.Module], split, batches, visit: Callable, deepest: str | None) -> None:
    """Call visit(tap, h, y) with the output h (B, d) of every tap, for every batch of indices, classes y (B,)."""

    def hook(tap: str, output: Tensor) -> None:
        # the features in the order in which convolutions have them in memory, channels last: NC1 does not depend on it
        visit(tap, output.movedim(1, -1).flatten(1), y)
        if tap == deepest:
            raise _Enough

    handles = [m.register_forward_hook(lambda _, __, output, tap=tap: hook(tap, output)) for tap, m in taps.items()]
    try:
        for indices in batches:
            x, y = split.batch(indices)
            with suppress(_Enough):
                model(x)
    finally:
        for handle in handles:
            handle.remove()


def _probe(model: nn.Module, taps: dict[str, nn.Module], split) -> dict[str, Tensor]:
    """Every tap's output for one sample, (1, d), in the order in which the model calls them."""
    seen: dict[str, Tensor] = {}

    def visit(tap: str, h: Tensor, y: Tensor) -> None:
        if tap in seen:
            raise ValueError(f"NC1: layer {tap!r} is called more than once in a forward pass")
        seen[tap] = h

    _visit(model, taps, split, torch.arange(1, device=split.labels.device).split(1), visit, deepest=None)
    missing = [tap for tap in taps if tap not in seen]
    if missing:
        raise ValueError(f"NC1: layer {missing[0]!r} is not called in a forward pass")
    return seen
