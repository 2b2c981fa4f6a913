"""NC1, within-class variability collapse, at every tap of a model: tr(Sigma_W pinv(Sigma_B)).

N samples, C classes, n_c samples of class c, h in R^d the flattened activation at a tap. With mu_c the class means, mu
the mean over all samples and M = [mu_1 - mu, ..., mu_C - mu] (d x C),

    Sigma_B = M M^T / C        Sigma_W = (1/N) sum_i (h_i - mu_c(i)) (h_i - mu_c(i))^T.

d reaches 10^5, so neither is ever formed. With the singular value decomposition M = U S V^T, of rank r <= C - 1, and
P = S^-1 U^T (r x d),

    tr(Sigma_W pinv(Sigma_B)) = (C/N) sum_i || P (h_i - mu_c(i)) ||^2.

The trace is not divided by C; Papyan, Han & Donoho (PNAS 2020) divide. `collapse` is this on one matrix of activations;
`measure` takes it from all taps of a model in batches: one pass over the samples for the class means, one for the sum.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

import checks
import devices
import ranks

# Singular values of M below so many eps of the activations, times the largest, are taken for rounding: 1e-6 in float32,
# where rounding was seen at 5e-9 to 6e-6. No rule is right everywhere, so that the value comes with kept and dropped.
RANK_TOLERANCE = 8

# A plain network, of these layers and no others, with up to so many parameters is measured in float64: in float32
# rounding hides directions of the means of deep saturated layers or adds some, and NC1 changes by orders of magnitude.
# It takes 1.5 to 2.2 times as long, at this size 0.1 s instead of 0.05 s for 7,000 samples on a core.
SMALL = 200_000  # parameters
ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
PLAIN = (nn.Sequential, nn.Flatten, nn.Identity, nn.Dropout, nn.Linear, *ELEMENTWISE)

KEEP_BYTES = devices.KEEP_BYTES  # activations kept from the first pass
# Of activations turned into float64 at a time: on a CPU larger chunks were slower; on CUDA 8 MiB would pass in less
# time than the launch of a kernel takes (by estimate).
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class Collapse(NamedTuple):
    """NC1 of a layer, and how sure its rank is.

    kept and dropped: the smallest singular value of M that counts and the largest that does not, as shares of the
    largest. At full rank, min(d, C - 1), dropped is 0; at rank 0 nc1 and kept are NaN, and dropped is 1, NaN if M is 0.
    """

    dim: int
    rank: int
    nc1: float
    kept: float
    dropped: float


def collapse(h: Tensor, y: Tensor, num_classes: int) -> Collapse:
    """NC1 of activations h (N, d), floating-point, of classes y (N,) in 0 .. C - 1, each with a sample."""
    (N, d), C = h.shape, num_classes
    counts = torch.bincount(y, minlength=C).double()  # n_c
    means = h.new_zeros(C, d, dtype=torch.float64).index_add_(0, y, h.double()) / counts[:, None]  # mu_c
    P, kept, dropped = projection(means, counts, torch.finfo(h.dtype).eps)  # (r, d)
    total = (P @ (h.double() - means[y]).T).square().sum()  # (r, N)
    return Collapse(d, len(P), C / N * total.item() if len(P) else float("nan"), kept, dropped)


def projection(means: Tensor, counts: Tensor, eps: float, origin: Tensor | None = None) -> tuple[Tensor, float, float]:
    """P = S^-1 U^T (r, d) of M = U S V^T, and kept and dropped of Collapse; r is the rank of M.

    means: the class means (C, d) less origin, which M does not depend on; counts: n_c (C,); both float64. eps: that of
    the activations. A direction counts towards the rank if its singular value exceeds RANK_TOLERANCE eps times the
    largest, and sqrt(C) eps times the length of the longest class mean: the most that M has where each number in the
    class means is off by eps.
    """
    C, d = means.shape
    mu = counts @ means / counts.sum()  # (d,)
    Mt = (means - mu).cpu()  # (C, d): small, and LAPACK's singular values give the same rank on every device
    _, S, Ut = torch.linalg.svd(Mt, full_matrices=False)  # M^T = V S U^T: (min(d, C),), (min(d, C), d)
    longest = (means if origin is None else means + origin).norm(dim=1).max().item()
    floor = max(RANK_TOLERANCE * eps * S[0].item(), C**0.5 * eps * longest)
    most = min(d, C - 1)  # the counts times the columns of M add up to 0
    r, shares = int((S[:most] > floor).sum()), (S / S[0]).tolist()
    P = (Ut[:r] / S[:r, None]).to(means.device)
    return P, shares[r - 1] if r else float("nan"), shares[r] if r < most else 0.0


@devices.exact_float32()
def measure(
    model: nn.Module,
    taps: dict[str, nn.Module],
    samples,
    num_classes: int,
    batch_size: int = 400,
    keep_bytes: int = KEEP_BYTES,
) -> dict[str, Collapse]:
    """NC1 of every tap of some samples: what `collapse` gives for its outputs, whatever the batch size.

    taps: modules of the model, each called once a forward pass with an output (B, ...). samples: len(), .labels (N,) of
    integers, .batch(indices) -> (inputs, labels), on the labels' device, the same whenever and in whatever order they
    are asked for. The model is measured in eval mode with the weights it has, and left in the mode it was in; a network
    of PLAIN layers alone and up to SMALL float32 parameters runs in float64. The value has no unit. Activations of the
    deepest taps are kept for the second pass as far as keep_bytes allows; for the others the model runs again, no
    deeper than needed. Processes that torchrun started share the batches, and must all call.
    Raises ValueError for labels that are not such a tensor or not those of the batches, lie outside 0 .. C - 1 or leave
    a class without samples, and naming the layer for a tap not called exactly once, and for outputs that are not
    floating-point tensors, have no row for each sample, depend on the samples beside it, or are not finite.
    """
    if not isinstance(taps, dict) or batch_size < 1:
        raise ValueError(f"NC1: expected taps in a dict and batches of at least 1, got {type(taps)} and {batch_size}")
    labels = _labels(samples, num_classes)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(labels.device.type, enabled=False):
            return _measure(_in_float64(model), taps, samples, labels, num_classes, batch_size, keep_bytes)
    finally:
        for module, training in modes:
            module.training = training


def _measure(run, taps, samples, labels, C, batch_size, keep_bytes) -> dict[str, Collapse]:
    run, layers = _probe(run, taps, checks.inputs(samples, labels, "NC1"), C)
    by_depth = list(layers)
    for tap in reversed(by_depth):
        needed = len(labels) * layers[tap].row_bytes
        if needed > keep_bytes:
            break  # the passes have to go through what lies before anyway
        layers[tap].keeps, keep_bytes = True, keep_bytes - needed

    batches = _batches(samples, labels, batch_size, "NC1 class means")
    _visit(run, taps, by_depth, batches, lambda tap, h, y: layers[tap].add(h, y))
    for layer in layers.values():
        layer.add_sums(layer.kept)
    ranks.add_up(*(layer.sums for layer in layers.values()))
    counts = torch.bincount(labels, minlength=C).double()
    for tap in by_depth:  # the first layer that is not finite spoils the deeper ones
        if not layers[tap].sums.isfinite().all():
            raise ValueError(f"NC1: the activations of layer {tap!r} are not finite")
        layers[tap].project(counts)

    for layer in layers.values():
        layer.add_distances(layer.kept)
    again = [tap for tap in by_depth if not layers[tap].keeps]
    if again:
        batches = _batches(samples, labels, batch_size, "NC1 distances")
        _visit(run, taps, again, batches, lambda tap, h, y: layers[tap].add_distances([(h, y)]))
    ranks.add_up(*(layer.total for layer in layers.values()))
    return {tap: layers[tap].result(len(labels), C) for tap in taps}


class _Layer:
    """`collapse` batch by batch: all are added once for the class means and, after project, again for the sum."""

    def __init__(self, h: Tensor, C: int, overwritten: bool):
        """h: the output for one sample, (1, d); of several processes that of the first counts. overwritten: whether a
        layer that comes later works on the output in place."""
        self.eps, self.row_bytes = torch.finfo(h.dtype).eps, h.nbytes
        # sums of float64 numbers far from 0 lose digits that those have, so that they start from one of them
        self.origin = h if h.dtype == torch.float64 else None
        ranks.from_first(*([h] if h.dtype == torch.float64 else []))
        self.sums = h.new_zeros(C, h.shape[1], dtype=torch.float64)
        self.total = h.new_zeros((), dtype=torch.float64)
        self.keeps, self.kept, self.overwritten = False, [], overwritten

    def add(self, h: Tensor, y: Tensor) -> None:
        if self.keeps:
            self.kept.append((h.clone() if self.overwritten else h, y))
        else:
            self.add_sums([(h, y)])

    def add_sums(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        for h, y in _float64(batches, self.origin):
            self.sums.index_add_(0, y, h)

    def project(self, counts: Tensor) -> None:
        counts = counts.to(self.sums.device)
        self.means = self.sums.div_(counts[:, None])  # mu_c less origin, (C, d)
        self.P, *self.evidence = projection(self.means, counts, self.eps, self.origin)  # (r, d)

    def add_distances(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """As || P h_i - P mu_c(i) ||^2: what float64 loses in that difference is below the rounding of h."""
        centers = self.P @ self.means.T  # (r, C)
        for h, y in _float64(batches, self.origin):
            self.total += (self.P @ h.T - centers[:, y]).square().sum()  # (r, b)

    def result(self, N: int, C: int) -> Collapse:
        r, d = self.P.shape
        return Collapse(d, r, C / N * self.total.item() if r else float("nan"), *self.evidence)


def _float64(batches: list[tuple[Tensor, Tensor]], origin: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The same samples in float64, less origin (1, d) if there is one.

    Batches are joined or cut so that a copy has at most CHUNK_BYTES, if not one row.
    """
    if not batches:
        return
    B, d = batches[0][0].shape
    rows = max(1, CHUNK_BYTES.get(batches[0][0].device.type, CHUNK_BYTES["cpu"]) // (8 * d))
    together = max(1, rows // B)  # batches
    for i in range(0, len(batches), together):
        h, y = map(torch.cat, zip(*batches[i : i + together], strict=True)) if together > 1 else batches[i]
        for some_h, some_y in zip(h.split(rows), y.split(rows), strict=True):
            yield some_h.double() if origin is None else some_h - origin, some_y


def _labels(samples, num_classes: int) -> Tensor:
    """(N,) int64, every class present."""
    labels = checks.labels(samples, "NC1")
    if num_classes < 2:
        raise ValueError(f"NC1: num_classes has to be at least 2, got {num_classes}")
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"NC1: labels must lie in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}"
        )
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"NC1: every class needs samples, got none of class {', '.join(map(str, empty))}")
    return labels


def _in_float64(model: nn.Module) -> Callable:
    """The model, or a function that runs it with its parameters in float64 where it is small and plain."""
    for m in model.modules():
        if type(m) not in PLAIN or m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return model
    params = dict(model.named_parameters())
    small = 0 < sum(p.numel() for p in params.values()) <= SMALL
    if not small or any(p.dtype != torch.float32 for p in params.values()):
        return model
    params = {name: p.detach().double() for name, p in params.items()}
    return lambda x: functional_call(model, params, (x.double(),))


def _batches(samples, labels: Tensor, batch_size: int, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, classes y (B,)) in data order, this process's share; a bar where it takes long and somebody looks."""
    shares = ranks.share(torch.arange(len(labels), device=labels.device).split(batch_size))
    differ = torch.zeros((), dtype=torch.bool, device=labels.device)
    for indices in tqdm(shares, title, leave=False, disable=None, delay=1):
        x, y = samples.batch(indices)
        differ |= (y != labels[indices]).any()
        yield x, labels[indices]
    if differ:  # looked at once, as CUDA would wait for it
        raise ValueError("NC1: samples.batch(indices) gives other labels than samples.labels[indices]")


class _Enough(BaseException):
    """Raised in the deepest tap that is asked for, to end the forward pass there; no `except Exception` stops it."""


@torch.no_grad()
def _visit(run: Callable, taps: dict, names: list[str], batches: Iterable, visit: Callable, stop: bool = True) -> None:
    """Call visit(tap, h, y) with the output h (B, d) of every tap named, for every batch of inputs and classes y (B,).

    stop: the names are in order of depth, and the last one ends the forward pass.
    """
    calls: list[str] = []

    def hook(tap: str, output: object) -> None:
        calls.append(tap)
        visit(tap, _features(tap, output, len(y)), y.to(output.device))
        if stop and tap == names[-1]:
            raise _Enough

    handles = [taps[tap].register_forward_hook(lambda _, __, output, tap=tap: hook(tap, output)) for tap in names]
    try:
        for x, y in batches:  # noqa: B007 - the hooks use y
            calls.clear()
            with suppress(_Enough):
                run(x)
            for tap in names:
                if (count := calls.count(tap)) != 1:
                    raise ValueError(f"NC1: layer {tap!r} is called {count} times in a forward pass, expected once")
    finally:
        for handle in handles:
            handle.remove()


def _features(tap: str, output: object, B: int) -> Tensor:
    """An output (B, ...) as (B, d), the features in the order in which convolutions have them in memory, channels
    last: NC1 does not depend on it."""
    good = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.numel()
    if not good or len(output) != B:
        raise ValueError(
            f"NC1: layer {tap!r} gives {checks.described(output)}, expected a floating-point tensor of shape ({B}, ...)"
        )
    return output.detach().movedim(1, -1).flatten(1)


def _probe(run: Callable, taps: dict[str, nn.Module], x: Tensor, C: int) -> tuple[Callable, dict[str, _Layer]]:
    """How to run the model, and a _Layer for every tap in the order in which the model calls them, from the inputs x of
    some samples.

    Their outputs must not depend on the samples beside them, nor on when they are computed. What is overwritten in
    place, inputs or outputs, shows here, and is copied from then on: to copy all would cost a tenth of the time.
    """
    given, seen = x.clone(), []
    for some in (given, x[::2].clone()):
        outputs: dict[str, tuple[Tensor, Tensor]] = {}
        seen.append(outputs)
        batch = some, torch.zeros(len(some), dtype=torch.int64, device=x.device)
        _visit(run, taps, list(taps), [batch], lambda tap, h, _, o=outputs: o.update({tap: (h, h.clone())}), stop=False)
    layers = {}
    for tap, (h, as_it_was) in seen[0].items():
        checks.refuse_mixing(f"NC1: layer {tap!r}", as_it_was[::2], seen[1][tap][1])
        layers[tap] = _Layer(as_it_was[:1], C, overwritten=not torch.equal(h, as_it_was))
    return (run if torch.equal(given, x) else lambda x: run(x.clone())), layers
