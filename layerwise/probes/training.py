"""How probes are trained: Tuned looks for the least loss, Thesis is the algorithm as first written."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerwise.probes.decoders import is_mlp
from layerwise.probes.group import ProbeGroup

BATCH_SIZE = 400  # of tuned probes
RATE = 0.2  # of tuned probes, relative to the sizes of their parameters
LEAST_BATCHES = 20  # in an epoch of tuned probes, for sets of any size


def count_steps(epochs: int, N: int) -> int:
    """Return the number of steps of tuned probes in so many epochs of N samples."""
    return epochs * max(LEAST_BATCHES, ceil(N / BATCH_SIZE))


@dataclass(frozen=True)
class Thesis:
    """Train probes as the network is trained: one start, running BatchNorm statistics.

    optimizer: makes an optimizer of a list of parameters. It must act elementwise, as SGD, Adam and AdamW do. epochs:
    of the samples. bfloat16: whether steps use bfloat16 on CUDA, as those of the network do by default. float16 is not
    offered: its loss scale would be common to all probes, and so would the steps that it skips.
    """

    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    epochs: int = 30
    bfloat16: bool = False

    standardises: ClassVar = False
    solves_linear: ClassVar = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"DIB: epochs must be at least 1, got {self.epochs}")

    def count_starts(self, decoder: nn.Sequential) -> int:
        """Return from how many initial weights each probe is trained."""
        return 1

    def train(self, group: ProbeGroup, sizes: dict[str, float], batch_size: int, generator: torch.Generator) -> Tensor:
        """Train the probes, and return their losses over all samples, (P,) float64, in nats."""
        optimizer = self.optimizer([p for params in group.parameters().values() for p in params])
        for probe in group.modules():
            probe.train()
        N = len(group.targets)
        batches = shuffle(N, batch_size, generator, group.targets.device)
        for _ in show_bar(self.epochs * ceil(N / batch_size)):
            group.step(optimizer, next(batches))
        return group.compute_exact_losses(batch_size)


@dataclass(frozen=True)
class Tuned:
    """Train probes to the least loss, in the same way for every architecture.

    Adam has a rate for each parameter, relative to its size (compute_parameter_sizes). MLPs, which may start with dead
    units or get stuck, are trained from several starts; those of the highest training losses are dropped on the way.
    Inputs are standardised. BatchNorm statistics are taken again for the final weights. Linear probes are not
    trained: their optimum is computed.
    """

    steps: int = 600
    rate: float = RATE

    STARTS: ClassVar = ((8, 0.1), (4, 0.1), (2, 0.2), (1, 0.6))  # (number of starts, share of the steps)
    BETAS: ClassVar = (0.8, 0.95)  # of Adam; lower than usual, for few steps
    WARMUP: ClassVar = 0.1  # the share of the steps in which the rates grow
    DECAY: ClassVar = 0.3  # the share of the steps beyond the first 100 in which the rates fall to 0

    standardises: ClassVar = True
    solves_linear: ClassVar = True
    bfloat16: ClassVar = True  # on CUDA

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"DIB: steps must be at least 1, got {self.steps}")

    def count_starts(self, decoder: nn.Sequential) -> int:
        """Return from how many initial weights each probe is trained."""
        return self.STARTS[0][0] if is_mlp(decoder) else 1

    def train(self, group: ProbeGroup, sizes: dict[str, float], batch_size: int, generator: torch.Generator) -> Tensor:
        """Train the probes, and return their losses over all samples, (P,) float64, in nats.

        sizes: of the parameters by name. The starts of a probe stand one after another in the group.
        """
        rates = {name: self.rate * sizes[name] for name in group.parameters()}
        param_groups = [{"params": params, "lr": rates[name]} for name, params in group.parameters().items()]
        optimizer = torch.optim.Adam(param_groups, betas=self.BETAS, fused=True)
        for probe in group.modules():
            probe.train()
        N = len(group.targets)
        batches = shuffle(N, batch_size, generator, group.targets.device)
        phases = self.STARTS if group.is_stacked else ((1, 1.0),)
        ends = [round(self.steps * share) for share in accumulate(share for _, share in phases)]
        phase, running = 0, torch.zeros(len(group.learns), device=group.targets.device)
        for i in show_bar(self.steps):
            while i == ends[phase]:
                phase += 1
                group.select(find_best_starts(running, phases[phase - 1][0], phases[phase][0]), optimizer)
                running = torch.zeros_like(group.learns, dtype=running.dtype)
            for param_group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                param_group["lr"] = rate * self.compute_rate_factor(i)
            running = 0.9 * running + group.step(optimizer, next(batches))
        one_pass = islice(shuffle(N, batch_size, generator, group.targets.device), ceil(N / batch_size))
        group.take_statistics(one_pass)
        return group.compute_exact_losses(batch_size)

    def compute_rate_factor(self, i: int) -> float:
        """Return the factor of the rates in step i."""
        warmup, decay = self.WARMUP * self.steps, self.DECAY * (self.steps - 100)
        return min(1.0, (i + 1) / warmup, (self.steps - i) / decay if decay > 1 else 1.0)


def shuffle(N: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yield batches of the indices 0 .. N-1 without end, in a new order in each pass.

    The batches of a pass differ in size by 1 at most: BatchNorm cannot train on a last batch of one sample.
    """
    while True:
        order = torch.randperm(N, generator=generator).to(device, non_blocking=True)
        yield from order.tensor_split(ceil(N / batch_size))


def show_bar(steps: int) -> Iterable[int]:
    """Iterate over the steps with a progress bar."""
    return tqdm(range(steps), "DIB probes", leave=False, disable=None, delay=1)


def find_best_starts(losses: Tensor, starts: int, count: int) -> Tensor:
    """Return the rows of the `count` starts of least loss of each probe, from the losses (probes * starts,)."""
    order = losses.view(-1, starts).argsort(dim=1, stable=True)[:, :count]  # (probes, count)
    return (order + starts * torch.arange(len(order), device=losses.device)[:, None]).flatten()


def compute_parameter_sizes(model: nn.Module) -> dict[str, float]:
    """Return {name: size}, to which the rate of a parameter is relative, from a model as constructed.

    The size is the root mean square of the parameters of the same module that were drawn at random. If none was (the
    ones and zeros of a norm), it is that of all parameters of the module, at most 0.1. It is at least 0.01. One step
    moves all weights of a unit, so beyond 256 inputs of a unit the size decreases.
    """
    sizes = {}
    for prefix, module in model.named_modules(remove_duplicate=False):  # under each of its names
        own = dict(module.named_parameters(prefix, recurse=False))
        drawn = [p for p in own.values() if p.min() < p.max()]
        for name, p in own.items():
            rms = torch.cat([q.detach().flatten() for q in drawn or own.values()]).square().mean().sqrt().item()
            size = max(0.01, rms if drawn else min(rms, 0.1))
            inputs = p[0].numel() if p.dim() > 1 else 1
            sizes[name] = size * min(1.0, 256 / inputs) ** 0.75
    return sizes
