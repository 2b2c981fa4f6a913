"""Orthogonalised steps (Muon) of matrices: a step is the momentum of the gradients with all singular values made equal.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from layerwise import devices

# Singular values below FLOOR times the largest are divided by FLOOR times the largest. Rounding of X X^T hides them.
FLOOR = 3e-4
NEGLIGIBLE = 1e-10  # smaller entries, relative to the norm, are set to 0: eigh fails for denormal numbers

# (a, b, c) of the steps x -> a x + b x^3 + c x^5. Together they bring singular values between 0.001 and 1 of the norm
# to between 0.84 and 1.13. They are the first five of Polar Express (N. Amsel et al., arXiv 2505.16932), with its
# margin of 1 % for rounding.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)


class Orthogonalised(torch.optim.Optimizer):
    """Take orthogonalised steps, with Nesterov momentum.

    The root mean square of a step of full rank is the learning rate.

    params: groups of parameters, each of one shape. stacked: whether a parameter is a stack of matrices (P, m, n). If
    not, it is flattened to one matrix (outputs, inputs of an output).
    """

    def __init__(self, params: Iterable[dict], momentum: float, stacked: bool):
        super().__init__(params, {"lr": 0.0})
        self.momentum, self.stacked = momentum, stacked

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            # channels are the last dimension, as in memory with channels_last
            grads = [p.grad if self.stacked else p.grad.movedim(1, -1).flatten(1)[None] for p in params]
            G = torch.cat(grads)  # (P, m, n)
            state = self.state[params[0]]
            if not state:
                state["momentum"] = torch.zeros_like(G)
            torch.add(G, state["momentum"], alpha=self.momentum, out=state["momentum"])
            steps = orthogonalise(G.add_(state["momentum"], alpha=self.momentum))
            for p, step in zip(params, steps.split(len(grads[0])), strict=True):
                p = p if self.stacked else p.movedim(1, -1)
                p.sub_(step.reshape(p.shape), alpha=group["lr"])


def orthogonalise(G: Tensor) -> Tensor:
    """Return U V^T of the singular value decompositions U S V^T of matrices G (P, m, n), times sqrt(max(min(m, n), k)).

    k is the number of columns that are not all 0, if m <= n, and else of rows. At full rank the root mean square of
    these columns is 1. In the gradient of a 3 x 3 filter on images of one pixel, 8 of 9 columns are 0.

    On CUDA, U V^T is an approximation by products, because a decomposition waits for the device.
    """
    if G.size(-2) > G.size(-1):
        return orthogonalise(G.mT).mT
    used = G.any(-2)  # (P, n)
    size = used.sum(-1).clamp_min(G.size(-2)).to(G.dtype).sqrt()[:, None, None]
    if G.is_cuda:
        return size * orthogonalise_by_products(G)
    used, result = used.any(0), torch.zeros_like(G)
    result[..., used] = size * orthogonalise_by_eigh(G[..., used])
    return result


def orthogonalise_by_eigh(X: Tensor) -> Tensor:
    """Return (X X^T)^(-1/2) X = U V^T for matrices X (P, m, n), m <= n."""
    tiny = torch.finfo(X.dtype).tiny
    X = F.hardshrink(X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(tiny), NEGLIGIBLE)
    try:
        L, Q = torch.linalg.eigh((X @ X.mT).nan_to_num())  # eigh raises for NaN; X makes the result NaN
    except torch.linalg.LinAlgError:  # an iteration that does not converge must not end a run
        return orthogonalise_by_products(X)
    L = L.clamp_min(FLOOR**2 * L[:, -1:]).clamp_min(tiny)
    return (Q * L.rsqrt()[:, None]) @ Q.mT @ X


def orthogonalise_by_products(X: Tensor, coefficients: Sequence[tuple[float, float, float]] = POLAR_EXPRESS) -> Tensor:
    """Return about U V^T for matrices X (P, m, n), m <= n. The products are in bfloat16, if the GPU supports it."""
    dtype, tiny = X.dtype, torch.finfo(X.dtype).tiny
    # the squares in the norm of small gradients would underflow; powers of 2 do not change the rounding
    X = torch.ldexp(X, -torch.frexp(X.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)).exponent)
    if devices.has_bfloat16(X.device):
        X = X.bfloat16()
    X = X / torch.linalg.matrix_norm(X, keepdim=True).clamp_min(tiny)  # no singular value is above 1
    for a, b, c in coefficients:
        R = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(R, R, R, beta=b, alpha=c), X, beta=a)
    return X.to(dtype)
