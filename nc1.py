"""NC1, within-class variability collapse, at the layers of a model: tr(Sigma_W pinv(Sigma_B)).

Let N be the number of samples, C the number of classes, n_c the number of samples of class c, and h in R^d the
flattened activation of a layer. With mu_c the class means, mu the mean over all samples and
M = [mu_1 - mu, ..., mu_C - mu] (d x C),

    Sigma_B = M M^T / C        Sigma_W = (1/N) sum_i (h_i - mu_c(i)) (h_i - mu_c(i))^T.

d can be 10^5, so the d x d matrices are not formed. Instead, with the singular value decomposition M = U S V^T, of rank
r <= C - 1, and P = S^-1 U^T (r x d),

    tr(Sigma_W pinv(Sigma_B)) = (C/N) sum_i || P (h_i - mu_c(i)) ||^2.

NC1 has no unit. Unlike in Papyan, Han & Donoho (PNAS 2020), it is not divided by C. `collapse` computes it for one
matrix of activations. `measure` computes it for the layers of a model, in two passes over the activations: the first
computes the class means (ClassMeans), the second the sum above (Scatter).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerwise import checks, devices, processes
from layerwise.activations import ActivationRecorder, count_chunk_rows, make_forward
from layerwise.modes import set_eval_mode
from layerwise.samples import Samples

__all__ = ["ClassMeans", "Collapse", "Samples", "Scatter", "collapse", "measure"]

# Singular values of M below RANK_TOLERANCE * eps times the largest are treated as zero. eps is that of the dtype of the
# activations: in float32 the threshold is 1e-6. In experiments, rounding errors were 5e-9 to 6e-6 of the largest
# singular value. No single tolerance suits all networks, so `kept` and `dropped` are reported together with NC1.
RANK_TOLERANCE = 8


class Collapse(NamedTuple):
    """NC1 of a layer, the rank of its class means, and how reliable that rank is."""

    dim: int  # d
    rank: int  # of M
    nc1: float  # NaN at rank 0
    # Shares of the largest singular value of M:
    kept: float  # the smallest singular value that counts towards the rank; NaN at rank 0
    dropped: float  # the largest singular value that does not count; 0 at full rank min(d, C - 1), NaN if M is 0


def collapse(h: Tensor, y: Tensor, num_classes: int) -> Collapse:
    """Return NC1 of floating-point activations h (N, d) with classes y (N,). Every class 0 .. C - 1 has a sample."""
    (N, d), C = h.shape, num_classes
    counts = torch.bincount(y, minlength=C).double()  # n_c
    means = h.new_zeros(C, d, dtype=torch.float64).index_add_(0, y, h.double()) / counts[:, None]  # mu_c
    P, kept, dropped = compute_projection(means, counts, torch.finfo(h.dtype).eps)  # (r, d)
    total = (P @ (h.double() - means[y]).T).square().sum()  # (r, N)
    return Collapse(d, len(P), C / N * total.item() if len(P) else float("nan"), kept, dropped)


def compute_projection(
    means: Tensor, counts: Tensor, eps: float, origin: Tensor | None = None
) -> tuple[Tensor, float, float]:
    """Return (P, kept, dropped). P = S^-1 U^T (r, d), of the r singular values of M = U S V^T that count.

    means: the class means (C, d) minus origin, float64. counts: n_c (C,), float64. eps: machine epsilon of the dtype of
    the activations. A singular value counts if it exceeds RANK_TOLERANCE eps times the largest, and sqrt(C) eps times
    the length of the longest class mean. The second is the largest singular value that a relative error of eps in the
    class means can give M.
    """
    C, d = means.shape
    mu = counts @ means / counts.sum()  # (d,)
    Mt = (means - mu).cpu()  # (C, d): a small matrix. On the CPU the rank is the same for every device
    _, S, Ut = torch.linalg.svd(Mt, full_matrices=False)  # M^T = V S U^T: (min(d, C),), (min(d, C), d)
    longest = (means if origin is None else means + origin).norm(dim=1).max().item()
    floor = max(RANK_TOLERANCE * eps * S[0].item(), C**0.5 * eps * longest)
    most = min(d, C - 1)  # the columns of M, weighted by n_c, sum to 0
    r, shares = int((S[:most] > floor).sum()), (S / S[0]).tolist()
    P = (Ut[:r] / S[:r, None]).to(means.device)
    return P, shares[r - 1] if r else float("nan"), shares[r] if r < most else 0.0


class ClassMeans:
    """Accumulate the class means of the activations of a layer.

    first: the activation of one sample, (1, d); in float64 that of the first process. counts: n_c (C,).
    """

    def __init__(self, first: Tensor, counts: Tensor):
        self.eps, self.counts = torch.finfo(first.dtype).eps, counts.double().to(first.device)
        # float64 activations are shifted by an origin: the sum of numbers far from 0 is less accurate than the numbers.
        self.origin = first if first.dtype == torch.float64 else None
        if self.origin is not None:
            processes.broadcast(self.origin)
        self.sums = first.new_zeros(len(counts), first.shape[1], dtype=torch.float64)

    def update(self, h: Tensor, y: Tensor) -> None:
        """Add activations h (B, d) of classes y (B,)."""
        for h_part, y_part in convert_to_float64(h, y, self.origin):
            self.sums.index_add_(0, y_part, h_part)

    def compute(self) -> Tensor:
        """Return mu_c minus the origin, (C, d) float64, over all processes. Not finite if an activation is not."""
        sums = self.sums.clone()  # the sums of this process stay, so that compute can be called again
        processes.all_reduce_sum(sums)
        return sums.div_(self.counts[:, None])


class Scatter:
    """Accumulate sum_i || P (h_i - mu_c(i)) ||^2. means: what class_means.compute() returned."""

    def __init__(self, class_means: ClassMeans, means: Tensor):
        self.origin, counts = class_means.origin, class_means.counts
        self.N, (self.C, self.d) = counts.sum().item(), means.shape
        self.P, self.kept, self.dropped = compute_projection(means, counts, class_means.eps, self.origin)  # (r, d)
        self.centres = self.P @ means.T  # (r, C)
        self.total = means.new_zeros(())

    def update(self, h: Tensor, y: Tensor) -> None:
        """Add activations h (B, d) of classes y (B,).

        The sum uses || P h - P mu_c ||^2. Its rounding error in float64 is smaller than that of h.
        """
        for h_part, y_part in convert_to_float64(h, y, self.origin):
            self.total += (self.P @ h_part.T - self.centres[:, y_part]).square().sum()  # (r, b)

    def compute(self) -> Collapse:
        """Return NC1 over all processes."""
        total, r = self.total.clone(), len(self.P)
        processes.all_reduce_sum(total)
        nc1 = self.C / self.N * total.item() if r else float("nan")
        return Collapse(self.d, r, nc1, self.kept, self.dropped)


@devices.disable_tf32()
def measure(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Samples,
    num_classes: int,
    batch_size: int = 400,
    cache_bytes: int = devices.CACHE_BYTES,
) -> dict[str, Collapse]:
    """Return {name: NC1 of the output of that layer}. The result does not depend on batch_size.

    Parameters:
        model: is measured in eval mode. A network of linear and elementwise layers with at most 200,000 float32
            parameters runs in float64.
        layers: modules of the model by name. Each is called once in a forward pass, with an output (B, ...).
        samples: an object with len(), .labels (N,) of integers in 0 .. C - 1, each class present, and
            .batch(indices) -> (inputs, labels), which returns the same for a sample each time.
        num_classes: C.
        batch_size: the number of samples in a forward pass.
        cache_bytes: the number of bytes of activations that are cached in the first pass, the deepest layers first. For
            the other layers the model runs a second time.

    With torchrun, every process must call this function. The processes share the batches. The model, the modes of its
    modules and the samples are not changed.

    Raises:
        ValueError: if labels are not valid, if a class has no samples, if a layer is not called exactly once, or if its
            output is not a finite floating-point tensor (B, ...) that is independent of the other samples.
    """
    if not isinstance(layers, dict):
        raise ValueError(f"NC1: layers must be a dict, got {type(layers).__name__}")
    if batch_size < 1:
        raise ValueError(f"NC1: batch_size must be at least 1, got {batch_size}")
    labels = validate_classes(samples, num_classes)
    if not layers:
        return {}
    with set_eval_mode(model), torch.autocast(labels.device.type, enabled=False):
        recorder = ActivationRecorder(make_forward(model), layers, checks.read_trial_inputs(samples, labels, "NC1"))
        recorder.choose_cached(len(labels), cache_bytes)
        found = run_passes(recorder, samples, labels, num_classes, batch_size)
    return {name: found[name] for name in layers}


def run_passes(
    recorder: ActivationRecorder, samples: Samples, labels: Tensor, num_classes: int, batch_size: int
) -> dict[str, Collapse]:
    """Return {name: NC1} by depth: add all activations to the class means, then to the scatter."""
    counts = torch.bincount(labels, minlength=num_classes)
    class_means = {name: ClassMeans(first, counts) for name, first in recorder.first.items()}
    batches = iterate_batches(samples, labels, batch_size, "NC1 class means")
    recorder.run_pass(batches, lambda name, h, y: class_means[name].update(h, y))
    scatter = {}
    for name in recorder.layers:  # the first layer that is not finite is reported: the deeper ones follow from it
        means = class_means[name].compute()
        if not means.isfinite().all():
            raise ValueError(f"NC1: the activations of layer {name!r} are not finite")
        scatter[name] = Scatter(class_means.pop(name), means)  # pop: the memory of the sums is free again
    batches = iterate_batches(samples, labels, batch_size, "NC1 distances")
    recorder.run_pass(batches, lambda name, h, y: scatter[name].update(h, y))
    return {name: of_layer.compute() for name, of_layer in scatter.items()}


def validate_classes(samples: Samples, num_classes: int) -> Tensor:
    """Return the labels (N,) int64. Raises ValueError for labels outside 0 .. C - 1 and for a class without samples."""
    labels = checks.validate_labels(samples, "NC1")
    if num_classes < 2:
        raise ValueError(f"NC1: num_classes must be at least 2, got {num_classes}")
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(
            f"NC1: labels must lie in 0..{num_classes - 1}, got {labels.min().item()}..{labels.max().item()}"
        )
    empty = (torch.bincount(labels, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"NC1: expected a sample of every class, got none of class {', '.join(map(str, empty))}")
    return labels


def iterate_batches(samples: Samples, labels: Tensor, batch_size: int, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, classes (B,)) of the batches of this process, in data order, and show a progress bar.

    Raises ValueError for inputs without a row for each index, and after the last batch if samples.batch returned labels
    that differ from `labels`.
    """
    shares = processes.take_share(torch.arange(len(labels), device=labels.device).split(batch_size))
    differ = torch.zeros((), dtype=torch.bool, device=labels.device)
    for indices in tqdm(shares, title, leave=False, disable=None, delay=1):
        x, y = samples.batch(indices)
        if len(x) != len(indices):
            raise ValueError(f"NC1: samples.batch(indices) returns {len(x)} inputs for {len(indices)} indices")
        differ |= (y != labels[indices]).any()
        yield x, labels[indices]
    if differ:  # checked once, after the last batch, because reading it synchronises CUDA
        raise ValueError("NC1: samples.batch(indices) must return samples.labels[indices], got different labels")


def convert_to_float64(h: Tensor, y: Tensor, origin: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (h - origin, y) in chunks of rows, with h (B, d) converted to float64. None as origin is 0."""
    rows = count_chunk_rows(h)
    for h_part, y_part in zip(h.split(rows), y.split(rows), strict=True):
        yield h_part.double() if origin is None else h_part - origin, y_part
