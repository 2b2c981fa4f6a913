"""Linear probes: their loss is convex, and its infimum is computed by L-BFGS and Newton steps."""

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise.probes.decoders import is_linear, list_layers
from layerwise.probes.encodings import Source

FEATURE_BYTES = 4 * 2**30  # largest size of the float64 features


def can_fit_linear(decoder: nn.Sequential, N: int) -> bool:
    """Return whether the decoder is linear, and its float64 features of N samples fit FEATURE_BYTES."""
    return is_linear(decoder) and 8 * N * list_layers(decoder)[-1].in_features <= FEATURE_BYTES


def fit_linear(decoder: nn.Sequential, source: Source, batches: tuple[Tensor, ...], targets: Tensor) -> list[float]:
    """Return the smallest loss of a linear decoder for each labeling of targets (J, N), in nats.

    Raises ValueError for encodings that are not finite.
    """
    *before, last = list_layers(decoder)
    before = nn.Sequential(*before).eval()
    with torch.no_grad():
        z = torch.cat([before(source(indices)).double() for indices in batches])  # (N, d)
    if not z.isfinite().all():
        raise ValueError("DIB: the encodings of a linear decoder are not finite")
    has_bias = last.bias is not None
    z = whiten(z, has_bias)
    return [compute_linear_optimum(z, labels, last.out_features, has_bias) for labels in targets]


def compute_linear_optimum(z: Tensor, labels: Tensor, C: int, bias: bool, within: float = 1e-4) -> float:
    """Return inf over W and b of the mean cross-entropy of the logits z W + b, in nats. Without a bias, b is 0.

    z: whitened features (N, d), float64. labels: (N,) int64. L-BFGS, followed by one Newton step, is repeated until
    the loss or half the squared Newton decrement is below `within` nats. Half the squared decrement estimates the
    distance from the infimum; the estimate is too low if the infimum is not attained. The loss after 1,600 iterations
    is returned otherwise: it is an upper bound.
    """
    z = torch.cat([z, z.new_ones(len(z), 1)], dim=1) if bias else z
    if z.shape[1] == 0:  # there are no features
        return log(C)
    W = z.new_zeros(z.shape[1], C).requires_grad_()

    def closure() -> Tensor:
        W.grad = None
        loss = F.cross_entropy(z @ W, labels)
        loss.backward()
        return loss

    options = {"history_size": 20, "line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
    for iterations in (50, 50, 100, 200, 400, 800):  # a Newton step costs as much as a hundred iterations
        with torch.enable_grad():
            torch.optim.LBFGS([W], max_iter=iterations, max_eval=2 * iterations, **options).step(closure)
        with torch.no_grad():
            loss = F.cross_entropy(z @ W, labels).item()
            step, decrement = compute_newton_step(z, labels, W)
            if min(loss, decrement / 2) < within:
                break
            for halvings in range(10):
                lower = F.cross_entropy(z @ (W - step / 2**halvings), labels).item()
                if lower < loss:
                    W -= step / 2**halvings
                    loss = lower
                    break
    return loss


def compute_newton_step(z: Tensor, labels: Tensor, W: Tensor, products: int = 200) -> tuple[Tensor, float]:
    """Return H^-1 g (d, C) and the squared Newton decrement g^T H^-1 g of the mean cross-entropy of the logits z W.

    g is the gradient and H the Hessian at W. Conjugate gradients solve for H^-1 g. products: the largest number of
    products with H. If it is reached, both results are too small.
    """
    p = (z @ W).softmax(1)  # (N, C)
    g = z.T @ (p - F.one_hot(labels, W.shape[1])) / len(z)  # (d, C)
    x, r = torch.zeros_like(g), g
    direction, size = r, r.square().sum()
    for _ in range(products):
        u = z @ direction  # (N, C)
        H = z.T @ (p * (u - (p * u).sum(1, keepdim=True))) / len(z)  # (d, C): the Hessian times the direction
        curvature = (direction * H).sum()
        if curvature <= 0 or size <= 1e-12 * g.square().sum():
            break
        x, r = x + size / curvature * direction, r - size / curvature * H
        size, before = r.square().sum(), size
        direction = r + size / before * direction
    return x, (g * x).sum().item()


def whiten(z: Tensor, centred: bool) -> Tensor:
    """Return an orthogonal basis (N, r) of the columns of z (N, d), of mean square 1. z is float64.

    First the columns are centred if `centred`, and scaled to standard deviation 1. Directions below 1e-6 of the largest
    singular value are rounding of float32 and are left out. Any linear function of z is a linear function of the basis,
    in which L-BFGS needs a tenth of the iterations.
    """
    z = z - z.mean(0) if centred else z
    spread = z.square().mean(0).sqrt()
    z = z / torch.where(spread > 1e-6 * spread.max(), spread, 1.0)
    U, S, _ = torch.linalg.svd(z, full_matrices=False)
    return U[:, S > 1e-6 * S[0]] * len(z) ** 0.5
