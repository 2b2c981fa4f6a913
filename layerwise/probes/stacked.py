"""Probes that are MLPs, stacked: the weights of all probes in one tensor a layer, and one product for all of them."""

import torch
from torch import Tensor, nn

from layerwise.probes.decoders import ELEMENTWISE
from layerwise.probes.group import ProbeGroup


class StackedProbes(ProbeGroup):
    """Probes that are MLPs, of one or several splits."""

    is_stacked = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.stacks = stack_parameters(self.modules())

    def parameters(self) -> dict[str, list[Tensor]]:
        return {name: [stack] for name, stack in self.stacks.items() if stack.requires_grad}

    def compute_logits(self, encodings: dict[int, Tensor]) -> Tensor:
        return compute_stacked_logits(self.probes, self.stacks, encodings)

    def select(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Continue with the probes in these rows, as many of each split, and with their state in the optimizer."""
        self.learns = self.learns[rows]
        self.probes = {
            k: of_split[: len(rows) * len(of_split) // len(self.modules())] for k, of_split in self.probes.items()
        }
        selected = {}
        for name, old in self.stacks.items():
            own = rows[rows < len(old)]  # the probes that have this layer come first
            self.stacks[name] = selected[old] = old.detach()[own].requires_grad_(old.requires_grad)
            if old in optimizer.state:
                state = optimizer.state.pop(old)
                optimizer.state[selected[old]] = {
                    key: value[own] if value.dim() else value for key, value in state.items()
                }
        for group in optimizer.param_groups:
            group["params"] = [selected[old] for old in group["params"]]


def stack_parameters(probes: list[nn.Sequential]) -> dict[str, Tensor]:
    """Return {name: the parameters of that name of all probes that have it, (probes, ...)}.

    The first probe, that of the first split, has every name.
    """
    owned = [dict(probe.named_parameters()) for probe in probes]
    stacks = {name: torch.stack([own[name].detach() for own in owned if name in own]) for name in owned[0]}
    return {name: stack.requires_grad_(owned[0][name].requires_grad) for name, stack in stacks.items()}


def compute_stacked_logits(
    probes: dict[int, list[nn.Sequential]], params: dict[str, Tensor], encodings: dict[int, Tensor]
) -> Tensor:
    """Return the logits (P, C, B) of P probes on the encodings {k: (B, ...)}, with one product for each layer.

    params: what stack_parameters returns. The layers run in order from the first split on. The probes of a split enter
    where their decoder begins, and from there on are computed together with those of the splits before. Samples are
    the last dimension: a layer is weights (probes, out, in) times activations (probes, in, B).
    """
    (first, of_first), z = next(iter(probes.items())), None
    for k, (block_name, block) in enumerate(of_first[0].named_children(), first):
        if k in encodings:
            entering = encodings[k].flatten(1).T.expand(len(probes[k]), -1, -1)  # (J, d, B)
            z = entering if z is None else torch.cat([z, entering])
        for name, layer in block.named_modules(prefix=block_name):
            if isinstance(layer, nn.Linear):
                weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
                z = weight @ z if bias is None else torch.baddbmm(bias[:, :, None], weight, z)
            elif isinstance(layer, ELEMENTWISE):
                z = layer(z)
    return z
