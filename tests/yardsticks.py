"""The measures as one would first write them: slow and obvious, for the tests and the bench to compare with."""

import time
from collections.abc import Callable, Iterable
from math import ceil
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def dense_nc1(h: Tensor, y: Tensor, C: int, rtol: float | None = None) -> float:
    """tr(Sigma_W pinv(Sigma_B)) of activations h (N, d) of classes y (N,), with both matrices formed, in float64.

    rtol: singular values of M up to this share of the largest are 0; the pseudoinverse is then that of M, as Sigma_B
    has their squares, which float64 loses below 1e-8. Without it, pinv's default for Sigma_B.
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
    return Sigma_W.mul_(inverse.T).sum().item()  # the trace of their product, of which no more is needed


class Alone:
    """DIB's algorithm as written, for one head: a DataLoader, the frozen encoder run at every step, an optimizer of its
    own."""

    def __init__(
        self,
        encoder: nn.Module,
        head: nn.Module,
        x: Tensor,
        target: Tensor,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        batch_size: int,
        generator: torch.Generator,
    ):
        self.encoder, self.head, self.dataset = encoder.eval(), head, TensorDataset(x, target)
        self.stepper, self.batch_size, self.generator = optimizer(head.parameters()), batch_size, generator

    def epoch(self) -> float:
        """Train an epoch; its running loss."""
        self.head.train()
        N, total = len(self.dataset), 0.0
        order = torch.randperm(N, generator=self.generator)
        batches = [batch.tolist() for batch in order.tensor_split(ceil(N / self.batch_size))]
        # a generator of its own, as the loader else draws from the global one, which stochastic layers use
        for inputs, labels in DataLoader(self.dataset, batch_sampler=batches, generator=torch.Generator()):
            with torch.no_grad():
                z = self.encoder(inputs)
            loss = F.cross_entropy(self.head(z), labels)
            self.stepper.zero_grad()
            loss.backward()
            self.stepper.step()
            total += loss.item() * len(labels)
        return total / N

    @torch.no_grad()
    def encoded(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [(self.encoder(x), y) for x, y in batches]

    @torch.no_grad()
    def loss(self, encoded: list[tuple[Tensor, Tensor]]) -> float:
        """The mean cross-entropy over all samples in eval mode, nats."""
        self.head.eval()
        # of copies: the first layer may work in place
        losses = [F.cross_entropy(self.head(z.clone()), y, reduction="sum") for z, y in encoded]
        return sum(losses).item() / len(self.dataset)


def train_alone(
    encoder: nn.Module,
    head: nn.Module,
    x: Tensor,
    target: Tensor,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, list[float]]:
    """The final loss of one head and the running loss of every epoch."""
    alone = Alone(encoder, head, x, target, optimizer, batch_size, generator)
    running = [alone.epoch() for _ in range(epochs)]
    return alone.loss(alone.encoded(DataLoader(alone.dataset, batch_size))), running


def seconds_to_reach(
    goal: float, limit: float, alone: list[Alone], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float, int]:
    """The seconds of training until the mean loss of these heads is at most goal, that loss, and the epochs.

    It ends after the epoch that goes beyond limit seconds, whatever the loss. All heads go on side by side, epoch by
    epoch. The loss is looked at after about every twentieth of the epochs so far, which costs no time that counts.
    """
    kept = [each.encoded(zip(*(t.split(each.batch_size) for t in each.dataset.tensors), strict=True)) for each in alone]
    spent, epochs, due = 0.0, 0, 1
    while True:
        start = clock()
        for each in alone:
            each.epoch()
        spent += clock() - start
        epochs += 1
        if epochs >= due or spent >= limit:
            loss = mean(each.loss(z) for each, z in zip(alone, kept, strict=True))
            if loss <= goal or spent >= limit:
                return spent, loss, epochs
            due = ceil(1.05 * epochs)


def newton_optimum(z: Tensor, labels: Tensor, bias: bool = True, within: float = 1e-8) -> float:
    """inf over W, and b with a bias, of the mean cross-entropy of z W + b, nats: Newton's method, the Hessian formed.

    z: features (N, d). It ends where half the squared Newton decrement, by which the loss is above its infimum, is
    below within, or the loss itself, as it is where the classes can be separated. A class without a sample can be given
    the probability 0, and is left out. Raises ArithmeticError if 200 steps do not do.
    """
    z = z.double()
    z = z - z.mean(0) if bias else z
    spread = z.square().mean(0).sqrt()
    A = z[:, spread > 0] / spread[spread > 0]
    A = F.pad(A, (0, 1), value=1.0) if bias else A  # (N, d)
    labels = labels.unique(return_inverse=True)[1]
    # The last class has the logit 0: a shift of all logits changes nothing, and would make the Hessian singular.
    W = A.new_zeros(A.shape[1], int(labels.max()))  # (d, C - 1)

    def loss_at(W: Tensor) -> float:
        return F.cross_entropy(F.pad(A @ W, (0, 1)), labels).item()

    loss = loss_at(W)
    for _ in range(200):
        p = F.pad(A @ W, (0, 1)).softmax(1)  # (N, C)
        gradient = (A.T @ (p - F.one_hot(labels, p.shape[1])) / len(A))[:, :-1]
        step = newton_step(A, p[:, :-1], gradient)
        decrement = (gradient * step).sum().item()
        if min(loss, decrement / 2) < within:
            return loss
        size = 1.0
        while loss_at(W - size * step) > loss - 1e-4 * size * decrement:
            size /= 2
        W = W - size * step
        loss = loss_at(W)
    raise ArithmeticError(f"Newton's method is still {decrement / 2:g} nats from the optimum")


def newton_step(A: Tensor, p: Tensor, gradient: Tensor) -> Tensor:
    """H^-1 gradient, (d, K), of the mean cross-entropy at features A (N, d) and probabilities p (N, K)."""
    (N, d), K = A.shape, p.shape[1]
    H = A.new_zeros(K, d, K, d)
    for i in range(K):
        for j in range(i + 1):
            H[i, :, j] = H[j, :, i] = A.T @ ((p[:, i] * (float(i == j) - p[:, j]))[:, None] * A) / N
    H = H.view(K * d, K * d)
    H.diagonal().add_(1e-12 + 1e-10 * H.diagonal().mean())  # features that depend on one another leave H singular
    solved = torch.cholesky_solve(gradient.T.reshape(-1, 1), torch.linalg.cholesky(H))
    return solved.view(K, d).T


def standardised_alone(layer: nn.Module, z: Tensor) -> Tensor:
    """z (N, ...) with spread 1, of each feature before a linear layer, of each channel before a convolution; centred,
    too, where the layer has a bias and pads nothing."""
    convolves = isinstance(layer, nn.Conv2d)
    over = (0, 2, 3) if convolves else (0,)
    centred = layer.bias is not None and not (convolves and any(layer.padding))
    return (z - z.mean(over, keepdim=True) * centred) / z.std(over, correction=0, keepdim=True)


def best_alone(lately: list[float], kept: int) -> list[int]:
    return sorted(range(len(lately)), key=lately.__getitem__)[:kept]


def tune_alone(
    z: Tensor,
    starts: list[nn.Module],
    target: Tensor,
    sizes: dict[str, float],
    rate: float,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    best: Callable[[list[float], int], list[int]] = best_alone,
) -> float:
    """The tuned recipe for one head, from its starts: each takes its steps in turn, with an optimizer of its own.

    z: the encodings, standardised. sizes: of the parameters, to which the rates are relative. The final loss.
    """

    def one_pass() -> list[list[int]]:
        order = torch.randperm(len(z), generator=generator)
        return [batch.tolist() for batch in order.tensor_split(ceil(len(z) / batch_size))]

    batches = []
    while len(batches) < steps:
        batches += one_pass()
    runners = []
    for head in starts:
        groups = [{"params": [p], "lr": 0.0, "size": sizes[name]} for name, p in head.named_parameters()]
        runners.append((head.train(), torch.optim.Adam(groups, betas=(0.8, 0.95), foreach=False, fused=False)))
    tenths = [(8, 1), (4, 2), (2, 4), (1, 10)] if len(starts) == 8 else [(1, 10)]  # so many until then
    begin, lately = 0, [0.0] * len(starts)
    for number, end in tenths:
        runners, lately = [runners[i] for i in best(lately, number)], []
        for head, optimizer in runners:
            running = 0.0
            for i in range(begin, round(steps * end / 10)):
                factor = min(1.0, (i + 1) / (steps / 10))  # a tenth of the steps to warm up
                falling = 0.3 * (steps - 100)  # and three tenths of those beyond a hundred to fall to 0
                if falling > 1:
                    factor = min(factor, (steps - i) / falling)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["size"] * factor
                loss = F.cross_entropy(head(z[batches[i]]), target[batches[i]])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                running = 0.9 * running + loss.item()
            lately.append(running)
        begin = round(steps * end / 10)
    ((head, _),) = runners
    torch.optim.swa_utils.update_bn([z[batch] for batch in one_pass()], head)
    with torch.no_grad():
        return F.cross_entropy(head.eval()(z), target).item()


def dense_newton(z: Tensor, labels: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (d C,) and Hessian (d C, d C) of the mean cross-entropy at the logits z W, in float64."""
    p = (z @ W).softmax(1)  # (N, C)
    g = z.T @ (p - F.one_hot(labels, W.shape[1])) / len(z)  # (d, C)
    of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C)
    H = torch.einsum("na,nb,nce->acbe", z, z, of_logits) / len(z)
    return g.flatten(), H.reshape(g.numel(), g.numel())
