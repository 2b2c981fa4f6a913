"""Probes that take their steps together. They are independent: each becomes what it would become alone."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from layerwise import devices
from layerwise.probes.encodings import Encoder


class ProbeGroup:
    """Probes of one or several splits. The gradients of the sum of their losses are those of each loss alone.

    probes: {k: the probes of split k}, in order of k. encoders: {k: the encoder of split k}. targets: labelings (J, N).
    learns: {k: for each probe of split k the row of targets that it learns}. bfloat16: whether steps use bfloat16 where
    the device has it. Subclasses compute the logits.
    """

    is_stacked = False

    def __init__(
        self,
        probes: dict[int, list[nn.Sequential]],
        encoders: dict[int, Encoder],
        targets: Tensor,
        learns: dict[int, list[int]],
        bfloat16: bool = False,
    ):
        self.probes, self.encoders = probes, encoders
        self.targets = targets.T.contiguous()  # (N, J): rows are indexed in a tenth of the time of columns
        self.learns = torch.tensor([j for k in probes for j in learns[k]], device=targets.device)  # (P,)
        self.autocast = choose_autocast(bfloat16, self.modules()[0])

    def modules(self) -> list[nn.Sequential]:
        """Return the probes of all splits."""
        return [probe for of_split in self.probes.values() for probe in of_split]

    def parameters(self) -> dict[str, list[Tensor]]:
        """Return {name: the tensors to train under that name}."""
        raise NotImplementedError

    def compute_logits(self, encodings: dict[int, Tensor]) -> Tensor:
        """Return the logits (P, C, B) of P probes on the encodings {k: (B, ...)}."""
        raise NotImplementedError

    def compute_losses(self, indices: Tensor) -> Tensor:
        """Return the mean cross-entropy of each probe on the samples at indices (B,): (P,), in nats."""
        encodings = {k: encode(indices) for k, encode in self.encoders.items()}
        labels = self.targets[indices].T[self.learns]  # (P, B)
        return F.cross_entropy(self.compute_logits(encodings), labels, reduction="none").mean(1)  # of (P, C, B)

    def step(self, optimizer: torch.optim.Optimizer, indices: Tensor) -> Tensor:
        """Take one step of every probe. Return the losses before it, (P,)."""
        with self.autocast():
            losses = self.compute_losses(indices)
        if losses.requires_grad:  # if not, the losses do not depend on any parameter
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        return losses.detach()

    def take_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics of every BatchNorm to their means over the batches, all other layers in eval mode."""
        norms = [layer for probe in self.modules() for layer in probe.eval().modules() if isinstance(layer, _BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            for i, indices in enumerate(batches, 1):
                for norm in norms:
                    norm.momentum = 1 / i  # a mean over batches; momentum=None would wait for the device
                self.compute_losses(indices)

    @torch.no_grad()
    def compute_exact_losses(self, batch_size: int) -> Tensor:
        """Return the loss of each probe over all samples in eval mode, (P,) float64, in nats."""
        for probe in self.modules():
            probe.eval()
        N, device = len(self.targets), self.targets.device
        total = torch.zeros(len(self.learns), dtype=torch.float64, device=device)
        for indices in torch.arange(N, device=device).split(batch_size):
            total += self.compute_losses(indices) * len(indices) / N
        return total


def choose_autocast(bfloat16: bool, probe: nn.Sequential) -> Callable:
    """Return the context of a training step: bfloat16 if asked for, for float32 probes on a device that has it."""
    p = next(probe.parameters(), None)
    if not bfloat16 or p is None or p.dtype != torch.float32 or not devices.has_bfloat16(p.device):
        return nullcontext
    # without a cache: inside a caller's autocast a cache would return the weights of the first step
    return partial(torch.autocast, p.device.type, torch.bfloat16, cache_enabled=False)
