"""The measures as one would first write them: slow and obvious, for the tests and the bench to compare with."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def dense_nc1(h: Tensor, y: Tensor, C: int) -> float:
    """tr(Sigma_W pinv(Sigma_B)) of activations h (N, d) of classes y (N,), with both matrices formed, in float64."""
    h = h.double()
    means = torch.stack([h[y == c].mean(0) for c in range(C)])
    M = (means - h.mean(0)).T  # (d, C)
    within = h - means[y]  # (N, d)
    Sigma_B, Sigma_W = M @ M.T / C, within.T @ within / len(h)
    return torch.trace(Sigma_W @ torch.linalg.pinv(Sigma_B, hermitian=True)).item()


def train_alone(
    encoder: nn.Module,
    head: nn.Module,
    x: Tensor,
    target: Tensor,
    optimizer: Callable,
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[float, list[float]]:
    """DIB's algorithm as written, for one head: a DataLoader, the frozen encoder run at every step, an optimizer of its
    own. The final loss and the running loss of every epoch."""
    stepper, running = optimizer(head.parameters()), []
    dataset, steps = TensorDataset(x, target), -(-len(x) // batch_size)
    encoder.eval()
    head.train()
    for _ in range(epochs):
        total = 0.0
        batches = [batch.tolist() for batch in torch.randperm(len(x), generator=generator).tensor_split(steps)]
        # a generator of its own, as the loader else draws from the global one, which stochastic layers use
        for inputs, labels in DataLoader(dataset, batch_sampler=batches, generator=torch.Generator()):
            with torch.no_grad():
                z = encoder(inputs)
            loss = F.cross_entropy(head(z), labels)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
            total += loss.item() * len(labels)
        running.append(total / len(x))
    head.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(head(encoder(a)), b, reduction="sum") for a, b in DataLoader(dataset, batch_size)]
    return sum(losses).item() / len(x), running


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
    passes, batches = -(-len(z) // batch_size), []
    while len(batches) < steps + passes:
        batches += [batch.tolist() for batch in torch.randperm(len(z), generator=generator).tensor_split(passes)]
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
    torch.optim.swa_utils.update_bn([z[batch] for batch in batches[steps : steps + passes]], head)
    with torch.no_grad():
        return F.cross_entropy(head.eval()(z), target).item()


def dense_newton(z: Tensor, labels: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (d C,) and Hessian (d C, d C) of the mean cross-entropy at the logits z W, in float64."""
    p = (z @ W).softmax(1)  # (N, C)
    g = z.T @ (p - F.one_hot(labels, W.shape[1])) / len(z)  # (d, C)
    of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (N, C, C)
    H = torch.einsum("na,nb,nce->acbe", z, z, of_logits) / len(z)
    return g.flatten(), H.reshape(g.numel(), g.numel())


def newton_optimum(z: Tensor, labels: Tensor, C: int, bias: bool) -> float:
    """The least mean cross-entropy of logits linear in z (N, d), by Newton's method with halved steps."""
    z = z.double() / z.double().square().mean(0).sqrt().clamp(min=1e-12)
    z = torch.cat([z, z.new_ones(len(z), 1)], dim=1) if bias else z
    W = z.new_zeros(z.shape[1], C)
    loss = F.cross_entropy(z @ W, labels)
    for _ in range(100):
        g, H = dense_newton(z, labels, W)
        step = (torch.linalg.pinv(H, hermitian=True, rtol=1e-11) @ g).view_as(W)
        while (lower := F.cross_entropy(z @ (W - step), labels)) > loss and step.abs().max() > 1e-15:
            step = step / 2
        if not lower < loss - 1e-14:
            return loss.item()
        W, loss = W - step, lower
    return loss.item()
