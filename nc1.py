"""NC1, within-class variability collapse, at the layers of a model: tr(Sigma_W pinv(Sigma_B)).

N samples, C classes, n_c samples of class c, h in R^d the flattened activation of a layer. With mu_c the class means,
mu the mean over all samples and M = [mu_1 - mu, ..., mu_C - mu] (d x C),

    Sigma_B = M M^T / C        Sigma_W = (1/N) sum_i (h_i - mu_c(i)) (h_i - mu_c(i))^T.

d reaches 10^5, so no d x d matrix is formed. With the singular value decomposition M = U S V^T, of rank r <= C - 1, and
P = S^-1 U^T (r x d),

    tr(Sigma_W pinv(Sigma_B)) = (C/N) sum_i || P (h_i - mu_c(i)) ||^2.

NC1 has no unit. It is not divided by C; Papyan, Han & Donoho (PNAS 2020) divide. `collapse` computes it for one matrix
of activations. `measure` computes it for the layers of a model, in two passes over the samples: one for the class means
(ClassMeans), one for the sum (Scatter).
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from layerwise import checks, devices, processes
from layerwise.samples import Samples

__all__ = ["ClassMeans", "Collapse", "Samples", "Scatter", "collapse", "measure"]

# Singular values of M below so many eps of the activations, times the largest, count as rounding: 1e-6 in float32.
# Rounding was seen at 5e-9 to 6e-6. No tolerance is right for all networks, so `kept` and `dropped` stand beside NC1.
RANK_TOLERANCE = 8

# Networks of these layers alone, with at most SMALL parameters, run in float64. In float32 rounding hides directions of
# the class means of deep saturated layers, or adds some, and NC1 changes by orders of magnitude. float64 takes 1.5 to
# 2.2 times as long: at this size 0.1 s instead of 0.05 s for 7,000 samples on a core.
SMALL = 200_000
ELEMENTWISE = (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
MLP_LAYERS = (nn.Sequential, nn.Flatten, nn.Identity, nn.Dropout, nn.Linear, *ELEMENTWISE)

# Bytes of activations that are converted to float64 at a time. Larger chunks were slower on a CPU. On CUDA 8 MiB take
# less time than the launch of a kernel (an estimate).
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}


class Collapse(NamedTuple):
    """NC1 of a layer, and how reliable its rank is.

    kept and dropped: the smallest singular value of M that counts towards the rank and the largest that does not, as
    shares of the largest. At full rank, min(d, C - 1), dropped is 0. At rank 0, nc1 and kept are NaN, and dropped is 1,
    or NaN if M is 0.
    """

    dim: int
    rank: int
    nc1: float
    kept: float
    dropped: float


def collapse(h: Tensor, y: Tensor, num_classes: int) -> Collapse:
    """Return NC1 of activations h (N, d), floating-point, of classes y (N,) in 0 .. C - 1, each with a sample."""
    (N, d), C = h.shape, num_classes
    counts = torch.bincount(y, minlength=C).double()  # n_c
    means = h.new_zeros(C, d, dtype=torch.float64).index_add_(0, y, h.double()) / counts[:, None]  # mu_c
    P, kept, dropped = compute_projection(means, counts, torch.finfo(h.dtype).eps)  # (r, d)
    total = (P @ (h.double() - means[y]).T).square().sum()  # (r, N)
    return Collapse(d, len(P), C / N * total.item() if len(P) else float("nan"), kept, dropped)


def compute_projection(
    means: Tensor, counts: Tensor, eps: float, origin: Tensor | None = None
) -> tuple[Tensor, float, float]:
    """Return P = S^-1 U^T (r, d) of M = U S V^T, and kept and dropped of Collapse. r is the rank of M.

    means: the class means (C, d) minus origin, float64. counts: n_c (C,), float64. eps: that of the dtype of the
    activations. A singular value counts towards the rank if it exceeds RANK_TOLERANCE eps times the largest, and
    sqrt(C) eps times the length of the longest class mean. The latter is the largest singular value that M can have
    if each number in the class means is off by eps.
    """
    C, d = means.shape
    mu = counts @ means / counts.sum()  # (d,)
    Mt = (means - mu).cpu()  # (C, d): small, and LAPACK gives the same rank for every device
    _, S, Ut = torch.linalg.svd(Mt, full_matrices=False)  # M^T = V S U^T: (min(d, C),), (min(d, C), d)
    longest = (means if origin is None else means + origin).norm(dim=1).max().item()
    floor = max(RANK_TOLERANCE * eps * S[0].item(), C**0.5 * eps * longest)
    most = min(d, C - 1)  # the columns of M times n_c sum to 0
    r, shares = int((S[:most] > floor).sum()), (S / S[0]).tolist()
    P = (Ut[:r] / S[:r, None]).to(means.device)
    return P, shares[r - 1] if r else float("nan"), shares[r] if r < most else 0.0


class ClassMeans:
    """Accumulate the class means of the activations of a layer.

    first: the activation of one sample, (1, d). All processes use that of the first process. counts: n_c (C,).
    """

    def __init__(self, first: Tensor, counts: Tensor):
        self.eps, self.counts = torch.finfo(first.dtype).eps, counts.double().to(first.device)
        # Sums of float64 numbers far from 0 lose digits that the numbers have, so they are taken from an origin.
        self.origin = first if first.dtype == torch.float64 else None
        if self.origin is not None:
            processes.broadcast(self.origin)
        self.sums = first.new_zeros(len(counts), first.shape[1], dtype=torch.float64)

    def update(self, h: Tensor, y: Tensor) -> None:
        """Add activations h (B, d) of classes y (B,)."""
        for h_part, y_part in convert_to_float64(h, y, self.origin):
            self.sums.index_add_(0, y_part, h_part)

    def compute(self) -> Tensor:
        """Return mu_c minus the origin, (C, d) float64, over all processes; not finite if an activation is not."""
        processes.all_reduce_sum(self.sums)
        return self.sums / self.counts[:, None]


class Scatter:
    """Accumulate sum_i || P (h_i - mu_c(i)) ||^2 of a layer whose class means are known."""

    def __init__(self, class_means: ClassMeans, means: Tensor):
        self.origin, counts = class_means.origin, class_means.counts
        self.N, (self.C, self.d) = counts.sum().item(), means.shape
        self.P, self.kept, self.dropped = compute_projection(means, counts, class_means.eps, self.origin)  # (r, d)
        self.centres = self.P @ means.T  # (r, C)
        self.total = means.new_zeros(())

    def update(self, h: Tensor, y: Tensor) -> None:
        """Add activations h (B, d) of classes y (B,).

        Computed as || P h - P mu_c ||^2. What float64 loses in that difference is below the rounding of h.
        """
        for h_part, y_part in convert_to_float64(h, y, self.origin):
            self.total += (self.P @ h_part.T - self.centres[:, y_part]).square().sum()  # (r, b)

    def compute(self) -> Collapse:
        """Return NC1 over all processes."""
        processes.all_reduce_sum(self.total)
        r = len(self.P)
        nc1 = self.C / self.N * self.total.item() if r else float("nan")
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
    """Return {name: NC1 of the outputs of that layer}: what `collapse` returns for them, for any batch size.

    Parameters:
        model: in any mode. It is measured in eval mode with the weights it has. A network of MLP_LAYERS alone, with at
            most SMALL float32 parameters, runs in float64.
        layers: modules of the model by name. Each is called once in a forward pass, with an output (B, ...).
        samples: an object with len(), .labels (N,) of integers in 0 .. C - 1, each class present, and
            .batch(indices) -> (inputs, labels), which returns the same for a sample each time.
        num_classes: C.
        batch_size: of the passes.
        cache_bytes: how many bytes of activations are cached in the first pass, from the deepest layer on. For the
            other layers the model runs a second time, up to the deepest of them.

    Processes that torchrun started share the batches, and must all call. The model, its modes and the samples stay as
    they were.

    Raises:
        ValueError: for labels that are not such a tensor, for a class without samples, and, naming the layer, for a
            layer that is not called exactly once, and for outputs that are not floating-point tensors, have no row for
            each sample, depend on the other samples of the batch, or are not finite.
    """
    if not isinstance(layers, dict) or batch_size < 1:
        raise ValueError(
            f"NC1: layers must be a dict and batch_size at least 1, got {type(layers).__name__} and {batch_size}"
        )
    labels = validate_classes(samples, num_classes)
    if not layers:
        return {}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.autocast(labels.device.type, enabled=False):
            found = measure_in_eval_mode(model, layers, samples, labels, num_classes, batch_size, cache_bytes)
    finally:
        for module, training in modes:
            module.training = training
    return {name: found[name] for name in layers}


def measure_in_eval_mode(
    model: nn.Module,
    layers: dict[str, nn.Module],
    samples: Samples,
    labels: Tensor,
    num_classes: int,
    batch_size: int,
    cache_bytes: int,
) -> dict[str, Collapse]:
    """Return what `measure` returns, in order of depth, for a model in eval mode and labels that are validated."""
    run, outputs, overwritten = try_layers(make_forward(model), layers, checks.validate_inputs(samples, labels, "NC1"))
    layers = {name: layers[name] for name in outputs}  # in the order in which they are called: by depth
    counts = torch.bincount(labels, minlength=num_classes)
    class_means = {name: ClassMeans(h[:1], counts) for name, h in outputs.items()}

    cached: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in reversed(layers):
        needed = len(labels) * outputs[name][:1].nbytes
        if needed > cache_bytes:
            break  # the second pass has to go this deep in any case
        cached[name], cache_bytes = [], cache_bytes - needed

    batches = iterate_batches(samples, labels, batch_size, "NC1 class means")
    for activations, y in iterate_activations(run, layers, overwritten, batches):
        for name, h in activations.items():
            if name in cached:
                cached[name].append((h, y.to(h.device)))
            else:
                class_means[name].update(h, y.to(h.device))
    for name, its_batches in cached.items():
        for h, y in join_batches(its_batches):
            class_means[name].update(h, y)

    scatter = {}
    for name in layers:  # an activation that is not finite makes those of deeper layers not finite: name the first
        means = class_means[name].compute()
        if not means.isfinite().all():
            raise ValueError(f"NC1: the activations of layer {name!r} are not finite")
        scatter[name] = Scatter(class_means.pop(name), means)

    for name, its_batches in cached.items():
        for h, y in join_batches(its_batches):
            scatter[name].update(h, y)
    again = {name: layer for name, layer in layers.items() if name not in cached}
    if again:
        batches = iterate_batches(samples, labels, batch_size, "NC1 distances")
        for activations, y in iterate_activations(run, again, overwritten, batches):
            for name, h in activations.items():
                scatter[name].update(h, y.to(h.device))
    return {name: scatter[name].compute() for name in layers}


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
        raise ValueError(f"NC1: every class needs samples, got none of class {', '.join(map(str, empty))}")
    return labels


def make_forward(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the model, or, for a small MLP, a function that runs it with its parameters in float64."""
    for m in model.modules():
        if type(m) not in MLP_LAYERS or m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return model
    params = dict(model.named_parameters())
    is_small = 0 < sum(p.numel() for p in params.values()) <= SMALL
    if not is_small or any(p.dtype != torch.float32 for p in params.values()):
        return model
    params = {name: p.detach().double() for name, p in params.items()}
    return lambda x: functional_call(model, params, (x.double(),))


def try_layers(run: Callable, layers: dict[str, nn.Module], x: Tensor) -> tuple[Callable, dict[str, Tensor], set[str]]:
    """Run the model on a few inputs x (B, ...), and see how its layers have to be recorded.

    Returns how to run the model, the outputs {name: (B, d)} in the order in which the layers are called, and the names
    of the outputs that a later layer overwrites in place. These are copied in the passes. Copying all would take a
    tenth of the time. Raises ValueError for outputs that depend on the other samples or change from call to call.
    """
    outputs = record_outputs(run, layers, set(layers), x.clone())
    of_some = record_outputs(run, layers, set(layers), x[::2].clone())
    given = x.clone()
    afterwards = record_outputs(run, layers, set(), given)
    for name, h in outputs.items():
        checks.refuse_mixing(f"NC1: layer {name!r}", h[::2], of_some[name])
    overwritten = {name for name, h in outputs.items() if not torch.equal(h, afterwards[name])}
    return (run if torch.equal(given, x) else lambda x: run(x.clone())), outputs, overwritten


def iterate_batches(samples: Samples, labels: Tensor, batch_size: int, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, classes y (B,)) in data order, the share of this process, with a progress bar.

    Raises ValueError for inputs without a row for each index, and at the end if samples.batch returned other labels
    than `labels`.
    """
    shares = processes.take_share(torch.arange(len(labels), device=labels.device).split(batch_size))
    differ = torch.zeros((), dtype=torch.bool, device=labels.device)
    for indices in tqdm(shares, title, leave=False, disable=None, delay=1):
        x, y = samples.batch(indices)
        if len(x) != len(indices):
            raise ValueError(f"NC1: samples.batch(indices) returns {len(x)} inputs for {len(indices)} indices")
        differ |= (y != labels[indices]).any()
        yield x, labels[indices]
    if differ:  # read once, at the end: each read waits for CUDA
        raise ValueError("NC1: samples.batch(indices) returns other labels than samples.labels[indices]")


def iterate_activations(
    run: Callable, layers: dict[str, nn.Module], copied: set[str], batches: Iterator[tuple[Tensor, Tensor]]
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield ({name: activations (B, d)}, classes y (B,)) of every batch. The forward pass ends at the last layer."""
    *_, last = layers
    for x, y in batches:
        yield record_outputs(run, layers, copied, x, last), y


class _EndOfForwardPass(BaseException):
    """Raised in the deepest layer that is needed. No `except Exception` in a model catches it."""


@torch.no_grad()
def record_outputs(
    run: Callable, layers: dict[str, nn.Module], copied: set[str], x: Tensor, last: str | None = None
) -> dict[str, Tensor]:
    """Run the model on inputs x (B, ...), and return {name: output (B, d)} in the order in which layers are called.

    copied: layers whose output is copied, as a later layer overwrites it. last: the layer at which the forward pass
    ends. Raises ValueError for a layer that is not called exactly once, or whose output is not (B, ...).
    """
    outputs: dict[str, Tensor] = {}
    calls: list[str] = []

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            calls.append(name)
            h = flatten_output(name, output, len(x))
            outputs[name] = h.clone() if name in copied else h
            if name == last:
                raise _EndOfForwardPass

        return hook

    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        with suppress(_EndOfForwardPass):
            run(x)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if (count := calls.count(name)) != 1:
            raise ValueError(f"NC1: layer {name!r} is called {count} times in a forward pass, expected once")
    return outputs


def flatten_output(name: str, output: object, B: int) -> Tensor:
    """Return an output (B, ...) as (B, d). Features are in the order of memory with channels last, which is no copy."""
    is_valid = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.numel()
    if not is_valid or len(output) != B:
        raise ValueError(
            f"NC1: layer {name!r} returns {checks.describe(output)}, "
            f"expected a floating-point tensor of shape ({B}, ...)"
        )
    return output.detach().movedim(1, -1).flatten(1)


def count_chunk_rows(h: Tensor) -> int:
    """Return how many rows of activations h (B, d) are converted to float64 at a time."""
    return max(1, CHUNK_BYTES.get(h.device.type, CHUNK_BYTES["cpu"]) // (8 * h.shape[1]))


def convert_to_float64(h: Tensor, y: Tensor, origin: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the activations h (B, d), minus origin (1, d) if there is one, and y (B,) in float64 chunks of rows."""
    rows = count_chunk_rows(h)
    for h_part, y_part in zip(h.split(rows), y.split(rows), strict=True):
        yield h_part.double() if origin is None else h_part - origin, y_part


def join_batches(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches (h, y), joined to as many rows as are converted to float64 at a time."""
    if not batches:
        return
    h = batches[0][0]
    together = max(1, count_chunk_rows(h) // len(h))  # batches
    for i in range(0, len(batches), together):
        if together == 1:
            yield batches[i]
        else:
            h_parts, y_parts = zip(*batches[i : i + together], strict=True)
            yield torch.cat(h_parts), torch.cat(y_parts)
