"""Probes of any architecture, run one by one."""

import copy

import torch
from torch import Tensor, nn

from layerwise.probes.group import ProbeGroup


class SeparateProbes(ProbeGroup):
    """Probes of one split, of any architecture."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.draws: bool | None = None  # whether the probes draw random numbers; set in the first step

    def parameters(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for probe in self.modules():
            for name, p in probe.named_parameters():
                found.setdefault(name, []).append(p)
        return {name: params for name, params in found.items() if params[0].requires_grad}

    def compute_logits(self, encodings: dict[int, Tensor]) -> Tensor:
        (x,) = encodings.values()
        return compute_logits_one_by_one(self.modules(), x, self.draws)

    def copy_probes(self, labeling: int) -> "SeparateProbes":
        part, (k, probes) = copy.copy(self), *self.probes.items()
        learns = self.learns.tolist()
        part.probes = {k: [copy.deepcopy(probe) for probe, j in zip(probes, learns, strict=True) if j == labeling]}
        part.learns = self.learns[self.learns == labeling]
        return part

    def step(self, optimizers: list[torch.optim.Optimizer], indices: Tensor) -> Tensor:
        if self.draws is not None:
            return super().step(optimizers, indices)
        rng = torch.cuda if indices.is_cuda else torch
        before = rng.get_rng_state()
        losses = super().step(optimizers, indices)
        self.draws = not torch.equal(before, rng.get_rng_state())
        return losses


def compute_logits_one_by_one(probes: list[nn.Sequential], x: Tensor, draws: bool | None = None) -> Tensor:
    """Return the logits (P, C, B) of P probes of one split on its encodings x (B, ...).

    Layers that draw random numbers (dropout, stochastic depth) draw the same numbers for every probe, as if it were
    trained alone. draws: whether the probes draw any, or None if unknown. If False, the random state is not set.
    """
    rng = torch.cuda if x.is_cuda else torch
    state, logits = None if draws is False else rng.get_rng_state(), []
    for probe in probes:
        if state is not None:
            rng.set_rng_state(state)
        logits.append(probe(x.clone()).T)  # a copy, as the first layer may work in place
    return torch.stack(logits)
