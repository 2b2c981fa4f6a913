"""Stacked MLPs: one tensor has the weights of a layer of all probes, and one product computes the layer."""

import copy
from itertools import chain

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

    def copy_probes(self, labeling: int) -> "StackedProbes":
        part, rows = copy.copy(self), (self.learns == labeling).nonzero().flatten()
        learned = self.learns.split([len(of_split) for of_split in self.probes.values()])
        counts = {k: int((learns == labeling).sum()) for k, learns in zip(self.probes, learned, strict=True)}
        part.probes = {k: self.probes[k][:count] for k, count in counts.items() if count}  # only their number is used
        part.sources = {k: self.sources[k] for k in part.probes}
        part.learns = self.learns[rows]
        part.stacks = {name: stack.detach()[rows[rows < len(stack)]] for name, stack in self.stacks.items()}
        return part

    def select_rows(self, rows: Tensor, optimizers: list[torch.optim.Optimizer]) -> None:
        """Keep only the probes in these rows, the same share of every split, also in the optimizers."""
        for k, of_split in self.probes.items():
            self.probes[k] = of_split[: len(of_split) * len(rows) // len(self.learns)]  # only their number is used
        self.learns = self.learns[rows]
        new = {}
        for name, old in self.stacks.items():
            own = rows[rows < len(old)]  # probes of shallower splits, which have more layers, come first
            new[old] = old.detach()[own].requires_grad_(old.requires_grad)
            self.stacks[name] = new[old]
            for optimizer in optimizers:
                for key, value in optimizer.state.pop(old, {}).items():
                    optimizer.state[new[old]][key] = value[own] if value.dim() else value
        for param_group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            param_group["params"] = [new[old] for old in param_group["params"]]


def stack_parameters(probes: list[nn.Sequential]) -> dict[str, Tensor]:
    """Return {parameter name: the parameters of all probes that have it, (probes, ...)}.

    The first probe is of the first split and has all names.
    """
    owned = [dict(probe.named_parameters()) for probe in probes]
    stacks = {name: torch.stack([own[name].detach() for own in owned if name in own]) for name in owned[0]}
    return {name: stack.requires_grad_(owned[0][name].requires_grad) for name, stack in stacks.items()}


def compute_stacked_logits(
    probes: dict[int, list[nn.Sequential]], params: dict[str, Tensor], encodings: dict[int, Tensor]
) -> Tensor:
    """Return the logits (P, C, B) of P probes on the encodings {k: (B, ...)}, with one product for each layer.

    params: as stack_parameters returns them. Before block k, the encodings of split k are appended to the activations
    of the shallower splits. Samples are the last dimension: a layer multiplies weights (probes, out, in) and
    activations (probes, in, B).
    """
    first, z = min(probes), None
    for k, (block_name, block) in enumerate(probes[first][0].named_children(), first):
        if k in encodings:
            entering = encodings[k].flatten(1).T.expand(len(probes[k]), -1, -1)  # (n, d, B)
            z = entering if z is None else torch.cat([z, entering])
        for name, layer in block.named_modules(prefix=block_name):
            if isinstance(layer, nn.Linear):
                weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
                z = weight @ z if bias is None else torch.baddbmm(bias[:, :, None], weight, z)
            elif isinstance(layer, ELEMENTWISE):
                z = layer(z)
    return z
