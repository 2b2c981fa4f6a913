"""Linear probes: their loss is convex. Its infimum is computed, with a proof of how close the computed loss is to it.

Let Z (N, d) be features, Y (N, C) one-hot labels, W (d, C) weights and p = softmax(Z W), so that the loss of W is the
mean of -log p at the labels. For every q (N, C) whose rows are probabilities, and for which Z^T (q - Y) = 0,

    inf over W of the loss >= (1/N) sum_i H(q_i),

and the loss of W exceeds this bound by exactly the mean of KL(q_i || p_i). Such a q is computed from a Newton step.
"""

from collections.abc import Callable
from functools import partial
from math import isfinite, log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.probes.decoders import is_linear, list_layers
from layerwise.probes.encodings import Source
from layerwise.schema import PROVED

FEATURE_BYTES = 4 * 2**30  # largest size of the float64 features
HALF_SPAN = 1000.0  # bounds hold for decoders whose logits differ by at most twice this, or more, on every sample
ITERATIONS = (20, 40, 80, 160, 320)  # of L-BFGS, each time before the bound is computed
NEWTON_STEPS = 16  # largest number of Newton steps, each with a bound
PRODUCTS = 60  # largest number of products with the Hessian in a Newton step
ROUNDING = 1e-6  # nats: a lower bound may exceed a loss by this, as losses may be sums of float32


class Basis(NamedTuple):
    """A singular value decomposition of standardised features: (z - mean) / scale = U diag(S) V^T. All are float64."""

    mean: Tensor  # (1, d)
    scale: Tensor  # (1, d), infinite for features that are the same for all samples
    U: Tensor  # (N, r)
    S: Tensor  # (r,)
    V: Tensor  # (d, r)


def can_fit_linear(decoder: nn.Sequential, N: int) -> bool:
    """Return whether the decoder is linear, and its float64 features of N samples fit FEATURE_BYTES."""
    return is_linear(decoder) and 8 * N * list_layers(decoder)[-1].in_features <= FEATURE_BYTES


@torch.no_grad()
def read_features(decoder: nn.Sequential, source: Source, batches: tuple[Tensor, ...]) -> Tensor:
    """Return the inputs (N, d) of the linear layer of a linear decoder in eval mode, in float64.

    The layers before it are computed as the network computes them, in the dtype of the encodings. A deeper split gets
    their outputs with the rounding, so that float64 would make the bounds of the two splits contradict each other.
    Raises ValueError for encodings that are not finite.
    """
    *before, _ = list_layers(decoder)
    before = nn.Sequential(*before)
    z = torch.cat([before(source(indices)).double() for indices in batches])
    if not z.isfinite().all():
        raise ValueError("DIB: the encodings of a linear decoder are not finite")
    return z


def decompose(z: Tensor, centred: bool) -> Basis:
    """Standardise the features z (N, d), float64, and return their singular value decomposition.

    centred: whether the mean of each feature is subtracted. Each feature is divided by its root mean square then, so
    that small ones count. Singular values below max(N, d) eps of the largest are rounding of float64 and left out.
    """
    size = compute_sizes(z)
    z = z / size
    mean = torch.zeros_like(z[:1])
    varies = (z != z[:1]).any(0) if centred else (z != 0).any(0)  # the centred values of a constant are rounding
    for _ in range(2 if centred else 0):  # the first mean of features far from 0 is rounded too much
        rest = z.mean(0, keepdim=True)
        mean, z = mean + rest, z.sub_(rest)
    scale = z.square().mean(0, keepdim=True).sqrt().where(varies, torch.inf)
    U, S, Vt = torch.linalg.svd(z.div_(scale), full_matrices=False)
    real = S > max(z.shape) * torch.finfo(S.dtype).eps * S.max() if S.numel() else S > 0
    return Basis(mean * size, scale * size, U[:, real], S[real], Vt[real].T)


def compute_sizes(z: Tensor) -> Tensor:
    """Return the largest power of 2 that is not above the largest absolute value of each feature, (1, d), or 1 for 0.

    Division by it is exact, and the squares of the quotients can neither overflow nor all underflow.
    """
    largest = z.abs().amax(0, keepdim=True)
    mantissa, _ = torch.frexp(largest)  # 0.5 <= mantissa < 1
    return (largest / (2 * mantissa)).where(largest > 0, 1.0)


def compute_linear_optimum(U: Tensor, labels: Tensor, C: int, bias: bool) -> tuple[float, float]:
    """Return (loss, lower) in nats: a loss close to inf over W and b of that of the logits, and a bound below it.

    The logits are U W + b with C columns. Without a bias, b is 0. lower is proved for all decoders whose logits differ
    by at most 2 HALF_SPAN on every sample, or by at most as much as the logits with the returned loss. loss - lower <=
    PROVED, or the number of iterations reached its limit.

    U: orthonormal columns (N, r), float64, of mean 0 if there is a bias. labels: (N,) int64.
    """
    if bias:  # the probability of a class without samples goes to 0
        labels = labels.unique(return_inverse=True)[1]
        C = int(labels.max()) + 1
    Z = U * len(U) ** 0.5  # Z^T Z = N I, which makes the problem well-conditioned
    Z = torch.cat([Z, Z.new_ones(len(Z), 1)], dim=1) if bias else Z
    if not Z.shape[1]:  # all logits are 0
        return log(C), log(C)
    Y = F.one_hot(labels, C).double()  # (N, C)
    W = Z.new_zeros(Z.shape[1], C)
    compute_loss = partial(compute_linear_loss, Z, W, labels)
    minimise, lower, half_span, bounds, steps = make_minimiser(W, compute_loss), 0.0, HALF_SPAN, 0, 0
    for iterations in ITERATIONS:
        minimise(iterations)
        while True:
            logits = Z @ W
            loss, p = F.cross_entropy(logits, labels).item(), logits.softmax(1)
            span = (logits.amax(1) - logits.amin(1)).max().item()
            if span > 2 * half_span:  # the bound so far is not proved for such decoders
                lower, half_span = 0.0, span  # twice what is needed, as the span may grow further
            lower = clamp_bound(lower, loss)
            if loss <= PROVED:
                return loss, lower
            step = compute_newton_step(Z, p, Y, choose_floor(bounds))
            bound = compute_dual_bound(Z, p, Y, Z @ step, half_span)
            lower, bounds = max(lower, clamp_bound(bound, loss)), bounds + 1
            if loss - lower <= PROVED or steps == NEWTON_STEPS:
                return loss, lower
            if bounds < 3 or not take_step(W, step, compute_loss):
                break
            steps, minimise = steps + 1, make_minimiser(W, compute_loss)
    return loss, lower


def clamp_bound(bound: float, loss: float) -> float:
    """Return a lower bound on H_V, at most the loss. Return 0 if the loss of a decoder shows that it does not hold."""
    return min(bound, loss) if isfinite(bound) and bound <= loss + ROUNDING else 0.0


def compute_linear_loss(Z: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of the logits Z W."""
    return F.cross_entropy(Z @ W, labels)


def choose_floor(i: int) -> float | None:
    """Return the floor of the weights in the preconditioner for bound i, or None for no preconditioner.

    Bound 0 often suffices without. With a floor of 1e-8, single samples that are separated do no harm. Labels that are
    nearly separable need 1e-12, and more bounds. Their gap was 5e-4 with 1e-8 alone, and 3e-5 with both.
    """
    return None if i == 0 else 1e-8 if i < 7 else 1e-12


def make_minimiser(W: Tensor, compute_loss: Callable[[], Tensor], tolerance: float = 0) -> Callable[[int], None]:
    """Return a function that takes a number of iterations of L-BFGS, which change W to lower compute_loss().

    The estimate of the curvature is kept for the next call. Iterations end if no entry of the gradient exceeds the
    tolerance.
    """
    options = {"history_size": 200, "line_search_fn": "strong_wolfe", "tolerance_change": 0}
    optimizer = torch.optim.LBFGS([W], tolerance_grad=tolerance, **options)

    def closure() -> Tensor:
        W.grad = None
        loss = compute_loss()
        loss.backward()
        return loss

    def minimise(iterations: int) -> None:
        optimizer.param_groups[0].update(max_iter=iterations, max_eval=2 * iterations)
        W.requires_grad_()
        with torch.enable_grad():
            optimizer.step(closure)
        W.requires_grad_(False)

    return minimise


def take_step(W: Tensor, step: Tensor, compute_loss: Callable[[], Tensor]) -> bool:
    """Subtract the step, or an eighth of it or more, from W if that lowers the loss. Return whether it does."""
    loss, start = compute_loss(), W.clone()
    for halvings in range(4):
        W.copy_(start - step / 2**halvings)
        if compute_loss() < loss:
            return True
    W.copy_(start)
    return False


def compute_newton_step(Z: Tensor, p: Tensor, Y: Tensor, floor: float | None) -> Tensor:
    """Return x (r, C) with H x = g, by at most PRODUCTS conjugate gradients.

    g = Z^T (p - Y) / N is the gradient of the loss and H its Hessian at p = softmax(Z W). floor: of the weights in the
    preconditioner, which is the inverse of the blocks of H that belong to one class. None: there is no preconditioner.
    """
    N, r, C = *Z.shape, Y.shape[1]
    g = Z.T @ (p - Y) / N  # (r, C)
    factors = None if floor is None or 8 * C * r**2 > FEATURE_BYTES else factorise_blocks(Z, p, floor)

    def solve(residual: Tensor) -> Tensor:
        if factors is None:
            return residual
        return torch.cholesky_solve(residual.T[:, :, None], factors)[:, :, 0].T

    x, residual = torch.zeros_like(g), g
    solved = solve(residual)
    direction, size = solved, (residual * solved).sum()
    enough = 1e-16 * size
    for _ in range(PRODUCTS):
        u = Z @ direction  # (N, C)
        product = Z.T @ (p * (u - (p * u).sum(1, keepdim=True))) / N  # (r, C): H times the direction
        curvature = (direction * product).sum()
        if not (curvature > 0 and size > enough):
            break
        x, residual = x + size / curvature * direction, residual - size / curvature * product
        solved = solve(residual)
        size, before = (residual * solved).sum(), size
        direction = solved + size / before * direction
    return x


def factorise_blocks(Z: Tensor, p: Tensor, floor: float) -> Tensor:
    """Return the Cholesky factors (C, r, r) of the blocks Z^T diag(p_c (1 - p_c)) Z / N of the Hessian.

    The weights p_c (1 - p_c) are at least `floor`. As Z^T Z = N I, the blocks are then positive definite.
    """
    weights = (p * (1 - p)).clamp_min(floor) / len(Z)  # (N, C)
    return torch.stack([torch.linalg.cholesky((Z * of_class[:, None]).T @ Z) for of_class in weights.T])


def compute_dual_bound(Z: Tensor, p: Tensor, Y: Tensor, u: Tensor, half_span: float) -> float:
    """Return a lower bound on the loss of all W whose logits differ by at most 2 half_span on every sample, in nats.

    u: Z x for a Newton step x, (N, C). With it, Z^T (q - Y) is 0 up to the error of the conjugate gradients, which is
    then subtracted. Where an entry of q is negative, q+ is q with 0 in its place and rows of sum 1. With
    delta = mean of sum |q+ - q|, the bound is then the mean of H(q+) less half_span delta.
    """
    q = p * (1 - (u - (p * u).sum(1, keepdim=True)))  # (N, C), rows have sum 1
    q = q - Z @ (Z.T @ (q - Y)) / len(Z)
    positive = q.clamp_min(0)
    positive = positive / positive.sum(1, keepdim=True)
    delta = (positive - q).abs().sum(1).mean()
    return (torch.special.entr(positive).sum(1).mean() - half_span * delta).item()
