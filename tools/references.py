"""The measures as one would first write them: slow and obvious. The tests and the bench compare with them."""

import copy
import time
from collections.abc import Callable, Iterable
from math import ceil, sqrt
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batches = list[tuple[Tensor, Tensor]]  # encodings (B, ...) and labels (B,) of each batch


def compute_dense_nc1(h: Tensor, y: Tensor, C: int, rtol: float | None = None) -> float:
    """Return tr(Sigma_W pinv(Sigma_B)) of activations h (N, d) of classes y (N,), in float64. Both matrices are formed.

    rtol: singular values of M up to this share of the largest count as 0. The pseudoinverse is then computed from M:
    the singular values of Sigma_B are their squares, which float64 loses below 1e-8. Without rtol it is computed from
    Sigma_B with the default tolerance of pinv.
    """
    h = h.double()
    means = torch.stack([h[y == c].mean(0) for c in range(C)])
    M = (means - h.mean(0)).T  # (d, C)
    within = h - means[y]  # (N, d)
    Sigma_W = within.T @ within / len(h)
    if rtol is None:
        inverse = torch.linalg.pinv(M @ M.T / C, hermitian=True)  # of Sigma_B
    else:
        inverse = C * torch.linalg.pinv(M.T, rtol=rtol) @ torch.linalg.pinv(M, rtol=rtol)
    return Sigma_W.mul_(inverse.T).sum().item()  # the trace of the product, without computing all of it


class SingleProbe:
    """Train one probe as the algorithm was first written.

    The samples come from a DataLoader, and the frozen encoder runs at every step. The probe has its own optimizer.
    """

    def __init__(
        self,
        encoder: nn.Module,
        probe: nn.Module,
        x: Tensor,
        labels: Tensor,
        make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        batch_size: int,
        generator: torch.Generator,
    ):
        self.encoder, self.probe, self.dataset = encoder.eval(), probe, TensorDataset(x, labels)
        self.optimizer, self.batch_size, self.generator = make_optimizer(probe.parameters()), batch_size, generator

    def train_epoch(self) -> float:
        """Train for one epoch, and return its running loss."""
        self.probe.train()
        N, total = len(self.dataset), 0.0
        order = torch.randperm(N, generator=self.generator)
        batches = [batch.tolist() for batch in order.tensor_split(ceil(N / self.batch_size))]
        # without a generator the loader would draw from the global one, which stochastic layers use
        for inputs, labels in DataLoader(self.dataset, batch_sampler=batches, generator=torch.Generator()):
            with torch.no_grad():
                z = self.encoder(inputs)
            loss = F.cross_entropy(self.probe(z), labels)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(labels)
        return total / N

    @torch.no_grad()
    def encode(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Batches:
        """Return the batches (inputs, labels) with encodings in place of inputs."""
        return [(self.encoder(x), y) for x, y in batches]

    @torch.no_grad()
    def compute_loss(self, encoded: Batches) -> float:
        """Return the mean cross-entropy over all samples in eval mode, in nats."""
        self.probe.eval()
        # copies of z, as the first layer may work in place
        losses = [F.cross_entropy(self.probe(z.clone()), y, reduction="sum") for z, y in encoded]
        return sum(losses).item() / len(self.dataset)


def train_probe_alone(
    encoder: nn.Module,
    probe: nn.Module,
    x: Tensor,
    labels: Tensor,
    make_optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, list[float]]:
    """Train one probe. Return its final loss and the running loss of every epoch."""
    single = SingleProbe(encoder, probe, x, labels, make_optimizer, batch_size, generator)
    running = [single.train_epoch() for _ in range(epochs)]
    return single.compute_loss(single.encode(DataLoader(single.dataset, batch_size))), running


def measure_seconds_to_reach(
    goal: float, limit: float, singles: list[SingleProbe], read_clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, int]:
    """Train probes until their mean loss is at most `goal`. Return the seconds of training, that loss and the epochs.

    Training ends after the epoch that exceeds `limit` seconds, whatever the loss. Each epoch is one of all probes. The
    loss is computed each time the number of epochs has grown by about a twentieth, and that time does not count.
    """
    encoded = [
        single.encode(zip(*(t.split(single.batch_size) for t in single.dataset.tensors), strict=True))
        for single in singles
    ]
    spent, epochs, due = 0.0, 0, 1
    while True:
        start = read_clock()
        for single in singles:
            single.train_epoch()
        spent += read_clock() - start
        epochs += 1
        if epochs >= due or spent >= limit:
            loss = mean(single.compute_loss(z) for single, z in zip(singles, encoded, strict=True))
            if loss <= goal or spent >= limit:
                return spent, loss, epochs
            due = ceil(1.05 * epochs)


def compute_newton_optimum(z: Tensor, labels: Tensor, bias: bool = True, within: float = 1e-8) -> float:
    """Return the infimum over W (and b, with a bias) of the mean cross-entropy of z W + b, in nats, by Newton's method.

    z: features (N, d). within: the iteration ends where half the squared Newton decrement is below it. That is an
    estimate of how far the loss is above its infimum. It also ends where the loss itself is below it, as for classes
    that can be separated. Classes without samples are left out: they can be given the probability 0. Raises
    ArithmeticError if 200 steps do not suffice.
    """
    z = z.double()
    z = z - z.mean(0) if bias else z
    spread = z.square().mean(0).sqrt()
    A = z[:, spread > 0] / spread[spread > 0]
    A = F.pad(A, (0, 1), value=1.0) if bias else A  # (N, d)
    labels = labels.unique(return_inverse=True)[1]
    # The last class has the logit 0: a shift of all logits changes nothing, and would make the Hessian singular.
    W = A.new_zeros(A.shape[1], int(labels.max()))  # (d, C - 1)

    def compute_loss(W: Tensor) -> float:
        return F.cross_entropy(F.pad(A @ W, (0, 1)), labels).item()

    loss = compute_loss(W)
    for _ in range(200):
        p = F.pad(A @ W, (0, 1)).softmax(1)  # (N, C)
        gradient = (A.T @ (p - F.one_hot(labels, p.shape[1])) / len(A))[:, :-1]
        step = solve_newton_step(A, p[:, :-1], gradient)
        decrement = (gradient * step).sum().item()
        if min(loss, decrement / 2) < within:
            return loss
        size = 1.0
        while compute_loss(W - size * step) > loss - 1e-4 * size * decrement:
            size /= 2
        W = W - size * step
        loss = compute_loss(W)
    raise ArithmeticError(f"Newton's method is still {decrement / 2:g} nats from the optimum")


def solve_newton_step(A: Tensor, p: Tensor, gradient: Tensor) -> Tensor:
    """Return H^-1 gradient, (d, K), with H the Hessian of the mean cross-entropy.

    A: features (N, d). p: probabilities (N, K).
    """
    (N, d), K = A.shape, p.shape[1]
    H = A.new_zeros(K, d, K, d)
    for i in range(K):
        for j in range(i + 1):
            H[i, :, j] = H[j, :, i] = A.T @ ((p[:, i] * (float(i == j) - p[:, j]))[:, None] * A) / N
    H = H.view(K * d, K * d)
    H.diagonal().add_(1e-12 + 1e-10 * H.diagonal().mean())  # features that depend on one another leave H singular
    solved = torch.cholesky_solve(gradient.T.reshape(-1, 1), torch.linalg.cholesky(H))
    return solved.view(K, d).T


def standardise_encodings(layer: nn.Module, z: Tensor, like: Tensor | None = None) -> Tensor:
    """Return z (N, ...) with standard deviation 1: of each feature before a linear layer, of each channel before a
    convolution. The mean is subtracted if the layer has a bias and does not pad.

    like: encodings whose mean and standard deviation are used (default: z).
    """
    is_convolution = isinstance(layer, nn.Conv2d)
    over = (0, 2, 3) if is_convolution else (0,)
    centred = layer.bias is not None and not (is_convolution and any(layer.padding))
    like = z if like is None else like
    return (z - like.mean(over, keepdim=True) * centred) / like.std(over, correction=0, keepdim=True)


def find_best_alone(losses: list[float], count: int) -> list[int]:
    """Return the indices of the `count` least losses."""
    return sorted(range(len(losses)), key=losses.__getitem__)[:count]


def cross_fit_alone(losses: list[list[float]], in_first: list[bool]) -> float:
    """Return the mean loss of the samples, each at the moment that is best on the half without it.

    losses: a list for each moment, with the loss of each sample. in_first: whether each sample is in the first half.
    """
    own = []
    for half in (True, False):
        others = [i for i, first in enumerate(in_first) if first != half]
        means = [mean(of_moment[i] for i in others) for of_moment in losses]
        best = losses[means.index(min(value for value in means if value < float("inf")))]
        own += [best[i] for i, first in enumerate(in_first) if first == half]
    return mean(own)


def score_alone(probe: nn.Module, z: Tensor, batch_size: int, z_other: Tensor, labels_other: Tensor) -> list[float]:
    """Return the loss of a copy of the probe on each of the other samples, with the BatchNorm statistics of z."""
    probe = copy.deepcopy(probe)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.optim.swa_utils.update_bn([z[batch] for batch in order.tensor_split(ceil(len(z) / batch_size))], probe)
    with torch.no_grad():
        return F.cross_entropy(probe.eval()(z_other), labels_other, reduction="none").tolist()


class TunedOptimizers:
    """The optimizers of one probe: orthogonalised steps by a singular value decomposition, and Adam."""

    def __init__(self, probe: nn.Module, sizes: dict[str, float], rate: float):
        matrices = [name for name, p in probe.named_parameters() if p.dim() > 1]
        self.momenta: list[tuple[nn.Parameter, Tensor, float]] = []
        groups = []
        for name, p in probe.named_parameters():
            m, n = p.flatten(1).shape if p.dim() > 1 else (1, 1)
            if name in matrices[:-1] and m >= 16 and n >= 16:
                self.momenta.append((p, torch.zeros(m, n, dtype=p.dtype), 0.45 * rate * sizes[name]))
            else:
                groups.append({"params": [p], "lr": 0.0, "rate": rate * sizes[name] * min(1, 256 / n) ** 0.75})
        self.adam = torch.optim.Adam(groups, betas=(0.8, 0.95), foreach=False, fused=False)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take a step with the rates times a factor."""
        for group in self.adam.param_groups:
            group["lr"] = factor * group["rate"]
        self.adam.step()
        for p, momentum, rate in self.momenta:
            momentum.mul_(0.8).add_(p.grad.flatten(1))
            G = p.grad.flatten(1) + 0.8 * momentum
            U, S, V = torch.linalg.svd(G, full_matrices=False)
            lines = G.T if len(G) <= G.shape[1] else G  # the inputs, or the outputs if they are more
            used = max(min(G.shape), sum(bool(line.any()) for line in lines))
            p -= factor * rate * sqrt(used) * (U * (S / S.clamp_min(3e-4 * S[0])) @ V).view_as(p)


def tune_probe_alone(
    z: Tensor,
    z_other: Tensor,
    starts: list[nn.Module],
    labels: Tensor,
    labels_other: Tensor,
    sizes: dict[str, float],
    rate: float,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    moments: set[int],
    find_best: Callable[[list[float], int], list[int]] = find_best_alone,
) -> tuple[float, list[list[float]]]:
    """Train one probe as Tuned does. Return its final loss, and its losses on other samples after `moments` steps.

    Its starts take their steps one after another. The losses on other samples are those of the last start.

    z, z_other: the encodings, standardised. starts: the probe with different initial weights. sizes: of the parameters,
    to which the rates are relative.
    """

    def shuffle_once() -> list[list[int]]:
        order = torch.randperm(len(z), generator=generator)
        return [batch.tolist() for batch in order.tensor_split(ceil(len(z) / batch_size))]

    batches = []
    while len(batches) < steps:
        batches += shuffle_once()
    runners = []
    for probe in starts:
        runners.append((probe.train(), TunedOptimizers(probe, sizes, rate), []))
    phases = (
        [(8, 1), (4, 2), (2, 4), (1, 10)] if len(starts) == 8 else [(1, 10)]
    )  # starts, until this tenth of the steps
    begin, running_losses = 0, [0.0] * len(starts)
    for count, tenth in phases:
        end = round(steps * tenth / 10)
        runners, running_losses = [runners[i] for i in find_best(running_losses, count)], []
        for probe, optimizers, path in runners:
            running = 0.0
            for i in range(begin, end):
                factor = min(1.0, (i + 1) / (steps / 10))  # the rate grows over a tenth of the steps
                decay = 0.3 * (steps - 100)  # it falls to 0 over three tenths of the steps beyond a hundred
                if decay > 1:
                    factor = min(factor, (steps - i) / decay)
                loss = F.cross_entropy(probe(z[batches[i]]), labels[batches[i]])
                probe.zero_grad()
                loss.backward()
                optimizers.step(factor)
                running = 0.9 * running + loss.item()
                if i + 1 in moments:
                    path.append(score_alone(probe, z, batch_size, z_other, labels_other))
            running_losses.append(running)
        begin = end
    ((probe, _, path),) = runners
    torch.optim.swa_utils.update_bn([z[batch] for batch in shuffle_once()], probe)
    with torch.no_grad():
        return F.cross_entropy(probe.eval()(z), labels).item(), path


def compute_gradient_and_hessian(z: Tensor, labels: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradient (d C,) and Hessian (d C, d C) of the mean cross-entropy at the logits z W, in float64."""
    p = (z @ W).softmax(1)  # (N, C)
    g = z.T @ (p - F.one_hot(labels, W.shape[1])) / len(z)  # (d, C)
    of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C)
    H = torch.einsum("na,nb,nce->acbe", z, z, of_logits) / len(z)
    return g.flatten(), H.reshape(g.numel(), g.numel())
