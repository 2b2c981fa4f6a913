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
