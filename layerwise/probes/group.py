"""Groups of probes that are trained simultaneously. Each probe gets the weights that it would get alone."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the only common base of all BatchNorms, also of other packages

from layerwise import devices
from layerwise.probes.encodings import Source


class ProbeGroup:
    """Probes of one or several splits. Their losses are added: each probe has the gradients of its own.

    probes: {k: the probes of split k}, in order of k. sources: {k: the source of the encodings of split k}. targets:
    the labelings (J, N). learns: {k: the row of targets for each probe of split k}. bfloat16: whether steps use
    bfloat16 on devices that support it. Subclasses define parameters and compute_logits.
    """

    is_stacked = False

    def __init__(
        self,
        probes: dict[int, list[nn.Sequential]],
        sources: dict[int, Source],
        targets: Tensor,
        learns: dict[int, list[int]],
        bfloat16: bool = False,
    ):
        self.probes, self.sources = probes, sources
        self.targets = targets.T.contiguous()  # (N, J): rows are indexed ten times as fast as columns
        self.learns = torch.tensor([j for k in probes for j in learns[k]], device=targets.device)  # (P,)
        self.autocast = choose_autocast(bfloat16, self.modules()[0])

    def modules(self) -> list[nn.Sequential]:
        """Return the probes of all splits."""
        return [probe for of_split in self.probes.values() for probe in of_split]

    def parameters(self) -> dict[str, list[Tensor]]:
        """Return {parameter name: trainable tensors}."""
        raise NotImplementedError

    def compute_logits(self, encodings: dict[int, Tensor]) -> Tensor:
        """Return the logits (P, C, B) of P probes on the encodings {k: (B, ...)}."""
        raise NotImplementedError

    def copy_probes(self, labeling: int) -> "ProbeGroup":
        """Return a group of copies of the probes of one labeling, which is trained no further."""
        raise NotImplementedError

    def compute_sample_losses(self, indices: Tensor) -> Tensor:
        """Return the cross-entropy of each probe on each of the samples at indices (B,): (P, B), in nats."""
        encodings = {k: source(indices) for k, source in self.sources.items()}
        labels = self.targets[indices].T[self.learns]  # (P, B)
        return F.cross_entropy(self.compute_logits(encodings), labels, reduction="none")  # logits are (P, C, B)

    def compute_losses(self, indices: Tensor) -> Tensor:
        """Return the mean cross-entropy of each probe on the samples at indices (B,): (P,), in nats."""
        return self.compute_sample_losses(indices).mean(1)

    def step(self, optimizers: list[torch.optim.Optimizer], indices: Tensor) -> Tensor:
        """Take one step of every probe. Return the losses before it, (P,)."""
        with self.autocast():
            losses = self.compute_losses(indices)
        if losses.requires_grad:  # False if the losses do not depend on any parameter
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        return losses.detach()

    def recompute_batchnorm_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics of each BatchNorm to their means over the batches. Other layers are in eval mode."""
        norms = [layer for probe in self.modules() for layer in probe.eval().modules() if isinstance(layer, _BatchNorm)]
        if not norms:
            return
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            for i, indices in enumerate(batches, 1):
                for norm in norms:
                    norm.momentum = 1 / i  # a cumulative mean; momentum=None would synchronise the device
                self.compute_losses(indices)

    @torch.no_grad()
    def compute_final_losses(self, batch_size: int) -> Tensor:
        """Return the loss of each probe over all samples in eval mode, (P,) float64, in nats."""
        for probe in self.modules():
            probe.eval()
        N, device = len(self.targets), self.targets.device
        total = torch.zeros(len(self.learns), dtype=torch.float64, device=device)
        for indices in torch.arange(N, device=device).split(batch_size):
            total += self.compute_losses(indices) * len(indices) / N
        return total


def choose_autocast(bfloat16: bool, probe: nn.Sequential) -> Callable:
    """Return the autocast context of steps: bfloat16 only for float32 probes on a device that supports it."""
    p = next(probe.parameters(), None)
    if not bfloat16 or p is None or p.dtype != torch.float32 or not devices.has_bfloat16(p.device):
        return nullcontext
    # inside an autocast of the caller, the cache would return the weights of the first step
    return partial(torch.autocast, p.device.type, torch.bfloat16, cache_enabled=False)
