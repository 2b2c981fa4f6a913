"""Probes of any kind, run one by one: the plain reference for stacked probes."""

import torch
from torch import Tensor, nn

from layerwise.probes.group import ProbeGroup


class SeparateProbes(ProbeGroup):
    """Probes of one split, of any architecture."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.draws: bool | None = None  # whether the probes draw random numbers; the first step shows it

    def parameters(self) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {}
        for probe in self.modules():
            for name, p in probe.named_parameters():
                found.setdefault(name, []).append(p)
        return {name: params for name, params in found.items() if params[0].requires_grad}

    def compute_logits(self, encodings: dict[int, Tensor]) -> Tensor:
        (x,) = encodings.values()
        return compute_logits_one_by_one(self.modules(), x, self.draws)

    def step(self, optimizer: torch.optim.Optimizer, indices: Tensor) -> Tensor:
        if self.draws is not None:
            return super().step(optimizer, indices)
        source = torch.cuda if indices.is_cuda else torch
        before = source.get_rng_state()
        losses = super().step(optimizer, indices)
        self.draws = not torch.equal(before, source.get_rng_state())
        return losses


def compute_logits_one_by_one(probes: list[nn.Sequential], x: Tensor, draws: bool | None = None) -> Tensor:
    """Return the logits (P, C, B) of P probes of one split on its encodings x (B, ...).

    Layers that draw random numbers (dropout, stochastic depth) draw the same for every probe: what it would draw alone.
    draws: whether the probes draw, if that is known. If they do not, the random state is not touched.
    """
    source = torch.cuda if x.is_cuda else torch
    state, logits = None if draws is False else source.get_rng_state(), []
    for probe in probes:
        if state is not None:
            source.set_rng_state(state)
        logits.append(probe(x.clone()).T)  # a copy, as the first layer may work in place
    return torch.stack(logits)
