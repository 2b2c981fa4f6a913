"""How probes are trained. Tuned minimises their loss. Thesis trains them as the network is trained."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from layerwise.probes.decoders import is_mlp, list_matrices
from layerwise.probes.group import ProbeGroup
from layerwise.probes.held_out import Recorder, list_moments
from layerwise.probes.orthogonal import Orthogonalised

BATCH_SIZE = 400  # of tuned probes
RATE = 0.2  # learning rate of tuned probes, relative to compute_parameter_sizes
ORTHOGONAL = 0.45  # learning rate of orthogonalised steps, relative to that of Adam
LEAST_BATCHES = 20  # smallest number of steps in an epoch of tuned probes


def count_steps(epochs: int, N: int) -> int:
    """Return the number of steps of tuned probes for this number of epochs of N samples."""
    return epochs * max(LEAST_BATCHES, ceil(N / BATCH_SIZE))


@dataclass(frozen=True)
class Thesis:
    """Train probes as the network is trained: from one start, with running BatchNorm statistics.

    optimizer: returns an optimizer for a list of parameters. Its update must be elementwise, as in SGD, Adam and AdamW.
    epochs: the number of passes over the samples. bfloat16: whether steps use bfloat16 on CUDA. float16 is not
    supported, because the probes would share the loss scale and the skipped steps.
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
        """Return the number of starts of each probe, which differ in initial weights."""
        return 1

    def train(
        self,
        group: ProbeGroup,
        sizes: dict[str, float],
        batch_size: int,
        generator: torch.Generator,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Train the probes. Return their losses over all samples, (P,) float64, in nats."""
        optimizer = self.optimizer([p for params in group.parameters().values() for p in params])
        for probe in group.modules():
            probe.train()
        N = len(group.targets)
        batches = iterate_batches(N, batch_size, generator, group.targets.device)
        steps = self.epochs * ceil(N / batch_size)
        moments = list_moments(steps) if recorder else ()
        for i in show_bar(steps):
            group.step([optimizer], next(batches))
            if i + 1 in moments:
                recorder.record(group, recompute=False)
        return group.compute_final_losses(batch_size)


@dataclass(frozen=True)
class Tuned:
    """Train probes to a loss as low as possible, with the same settings for all architectures.

    Matrices, and filters as matrices, take orthogonalised steps (layerwise/probes/orthogonal.py) if min(m, n) is at
    least WIDE. The last matrix and all other parameters take steps of Adam. Each parameter has a learning rate relative
    to its size (compute_parameter_sizes). MLPs with a hidden layer of fewer than WIDE units are trained from several
    starts, because some starts have dead units. The starts with the highest losses are removed during training.
    Encodings are standardised. BatchNorm statistics are recomputed with the final weights. The optimum of linear probes
    is computed.
    """

    steps: int = 600
    rate: float = RATE

    STARTS: ClassVar = ((8, 0.1), (4, 0.2), (2, 0.4), (1, 1.0))  # (number of starts, until this share of the steps)
    BETAS: ClassVar = (0.8, 0.95)  # of Adam; lower than the defaults, because there are few steps
    MOMENTUM: ClassVar = 0.8  # of orthogonalised steps
    WIDE: ClassVar = 16  # smallest min(m, n) of a matrix that takes orthogonalised steps
    WARMUP: ClassVar = 0.1  # the rates grow in the first WARMUP * steps
    DECAY: ClassVar = 0.3  # the rates fall to 0 in the last DECAY * (steps - 100)

    standardises: ClassVar = True
    solves_linear: ClassVar = True
    bfloat16: ClassVar = True  # on CUDA

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"DIB: steps must be at least 1, got {self.steps}")

    def count_starts(self, decoder: nn.Sequential) -> int:
        """Return the number of starts of each probe, which differ in initial weights."""
        hidden = list(list_matrices(decoder).values())[:-1]
        is_narrow = is_mlp(decoder) and any(m < self.WIDE for m, n in hidden)
        return self.STARTS[0][0] if is_narrow else 1

    def train(
        self,
        group: ProbeGroup,
        sizes: dict[str, float],
        batch_size: int,
        generator: torch.Generator,
        recorder: Recorder | None = None,
    ) -> Tensor:
        """Train the probes. Return their losses over all samples, (P,) float64, in nats.

        sizes: {parameter name: size}. The starts of a probe are adjacent in the group. recorder: records losses on
        other samples during the training.
        """
        optimizers = self.make_optimizers(group, sizes)
        for probe in group.modules():
            probe.train()
        N, device = len(group.targets), group.targets.device
        batches = iterate_batches(N, batch_size, generator, device)
        starts = self.count_starts(group.modules()[0])
        running = torch.zeros(len(group.learns), device=device)
        moments = list_moments(self.steps) if recorder else ()
        for i in show_bar(self.steps):
            count = self.count_starts_in_step(i)
            if count < starts:
                rows = find_best_starts(running, starts, count)
                if recorder:
                    recorder.select_rows(group.learns, rows)
                group.select_rows(rows, optimizers)
                starts, running = count, torch.zeros_like(group.learns, dtype=running.dtype)
            for param_group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
                param_group["lr"] = param_group["rate"] * self.compute_rate_factor(i)
            running = 0.9 * running + group.step(optimizers, next(batches))
            if i + 1 in moments:
                recorder.record(group, recompute=True)
        one_pass = islice(iterate_batches(N, batch_size, generator, device), ceil(N / batch_size))
        group.recompute_batchnorm_statistics(one_pass)
        return group.compute_final_losses(batch_size)

    def make_optimizers(self, group: ProbeGroup, sizes: dict[str, float]) -> list[torch.optim.Optimizer]:
        """Return the optimizer of orthogonalised steps and Adam. One is left out if it has no parameters.

        The rate of Adam decreases beyond 256 inputs of a unit, because one step changes all its weights.
        """
        matrices, orthogonal, others = list_matrices(group.modules()[0]), [], []
        hidden = list(matrices)[:-1]
        for name, params in group.parameters().items():
            m, n = matrices.get(name, (1, 1))
            if name in hidden and min(m, n) >= self.WIDE:
                orthogonal.append({"params": params, "rate": self.rate * ORTHOGONAL * sizes[name]})
            else:
                others.append({"params": params, "rate": self.rate * min(1.0, 256 / n) ** 0.75 * sizes[name]})
        optimizers = []
        if orthogonal:
            optimizers.append(Orthogonalised(orthogonal, self.MOMENTUM, group.is_stacked))
        if others:
            optimizers.append(torch.optim.Adam(others, betas=self.BETAS, fused=True))
        return optimizers

    def count_starts_in_step(self, i: int) -> int:
        """Return the number of starts of each MLP that are trained in step i."""
        return next(starts for starts, share in self.STARTS if i < round(self.steps * share))

    def compute_rate_factor(self, i: int) -> float:
        """Return the factor of the learning rates in step i."""
        warmup, decay = self.WARMUP * self.steps, self.DECAY * (self.steps - 100)
        return min(1.0, (i + 1) / warmup, (self.steps - i) / decay if decay > 1 else 1.0)


def iterate_batches(N: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yield batches of the indices 0 .. N - 1 indefinitely, in a new random order in each pass.

    The sizes of the batches differ by at most 1, because BatchNorm cannot train on a last batch of one sample.
    """
    while True:
        order = torch.randperm(N, generator=generator).to(device, non_blocking=True)
        yield from order.tensor_split(ceil(N / batch_size))


def show_bar(steps: int) -> Iterable[int]:
    """Iterate over the steps with a progress bar."""
    return tqdm(range(steps), "DIB probes", leave=False, disable=None, delay=1)


def find_best_starts(losses: Tensor, starts: int, count: int) -> Tensor:
    """Return the rows of the `count` starts with the lowest loss of each probe. losses: (probes * starts,)."""
    order = losses.view(-1, starts).argsort(dim=1, stable=True)[:, :count]  # (probes, count)
    return (order + starts * torch.arange(len(order), device=losses.device)[:, None]).flatten()


def compute_parameter_sizes(model: nn.Module) -> dict[str, float]:
    """Return {name: size} of the parameters of a newly initialised model. Learning rates are relative to the sizes.

    The size is the root mean square of the randomly initialised parameters of the same module. If it has none, as a
    norm of ones and zeros, it is the RMS of all its parameters, but at most 0.1. It is at least 0.01.
    """
    sizes = {}
    for prefix, module in model.named_modules(remove_duplicate=False):  # under each of its names
        own = dict(module.named_parameters(prefix, recurse=False))
        drawn = [p for p in own.values() if p.min() < p.max()]
        for name in own:
            rms = torch.cat([q.detach().flatten() for q in drawn or own.values()]).square().mean().sqrt().item()
            sizes[name] = max(0.01, rms if drawn else min(rms, 0.1))
    return sizes
