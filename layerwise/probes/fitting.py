"""Fit the probes of all splits and labelings of a task."""

import torch
from torch import Tensor, nn

from layerwise import processes
from layerwise.probes.decoders import is_mlp, is_trainable
from layerwise.probes.encodings import Source, cast_encodings, make_source, standardise
from layerwise.probes.group import ProbeGroup
from layerwise.probes.linear import can_fit_linear, fit_linear
from layerwise.probes.separate import SeparateProbes
from layerwise.probes.stacked import StackedProbes
from layerwise.probes.task import Task
from layerwise.probes.training import Thesis, Tuned, compute_parameter_sizes


def fit(task: Task, probes: Tuned | Thesis, *, batch_size: int, cache_bytes: int) -> Tensor:
    """Return the losses of the probes of every split and labeling, (splits, J) float64, in nats.

    For Tuned, linear optima are computed. All MLPs are trained in one stacked group, other decoders one by one.
    cache_bytes: the size of the encodings that may be cached. The processes of torchrun share the probes: all call fit.
    """
    J, N = task.targets.shape
    batches = torch.arange(N, device=task.targets.device).split(batch_size)
    sizes = compute_parameter_sizes(task.reference)
    linear = {k for k in task.splits if probes.solves_linear and can_fit_linear(task.reference[k:], N)}
    assigned = processes.take_share([(k, j) for k in task.splits for j in range(J)])
    losses = torch.zeros(len(task.splits), J, dtype=torch.float64, device=task.targets.device)
    source, depth = task.inputs, 0  # source(indices) returns the encodings of the split at depth
    for kind, splits in group_splits(task.reference, sorted({k for k, _ in assigned}), linear):
        if splits[0] < depth:  # the group before ended deeper, as MLPs of all depths are in one group
            source, depth = task.inputs, 0
        sources = {}
        for k in splits:  # encodings are computed from those of the split before
            source = make_source(task.model[depth:k], source, batches, cache_bytes // len(splits))
            depth = k
            sources[k] = cast_encodings(task.reference[k:], source)
            if probes.standardises and kind != "linear":
                sources[k] = standardise(task.reference[k:], sources[k], batches)
        members = [(k, j) for k, j in assigned if k in splits]
        if kind == "linear":
            targets = task.targets[[j for _, j in members]]
            found = fit_linear(task.reference[depth:], sources[depth], batches, targets)
        else:
            group = make_group(task, probes, kind, members, sources)
            if kind == "frozen":
                found = group.compute_final_losses(batch_size)
            else:
                found = probes.train(group, sizes, batch_size, task.streams.seed_generators("batches"))
        for (k, j), loss in zip(members, found, strict=True):
            losses[task.splits.index(k), j] = loss
    processes.all_reduce_sum(losses)
    return losses


def group_splits(reference: nn.Sequential, splits: list[int], linear: set[int]) -> list[tuple[str, list[int]]]:
    """Return (kind, splits) of the groups of splits whose probes are fitted together, in order of their first splits.

    All splits with an MLP decoder form one group. Every other split is a group. linear: the splits with kind "linear".
    """
    groups, mlps = [], []
    for k in splits:
        if k in linear:
            groups.append(("linear", [k]))
        elif is_mlp(reference[k:]):
            mlps.append(k)
        else:
            groups.append(("other" if is_trainable(reference[k:]) else "frozen", [k]))
    if mlps:
        groups.append(("mlp", mlps))
    return sorted(groups, key=lambda group: group[1])


def make_group(
    task: Task, probes: Tuned | Thesis, kind: str, members: list[tuple[int, int]], sources: dict[int, Source]
) -> ProbeGroup:
    """Return the group of the probes (k, j), each once for every start."""
    made = {k: [] for k in sources}
    learns = {k: [] for k in sources}
    for k, j in members:
        for start in range(probes.count_starts(task.reference[k:])):
            made[k].append(task.make_probe(k, "head", j, start))  # "head" is part of the seed
            learns[k].append(j)
    group_type = StackedProbes if kind == "mlp" else SeparateProbes
    return group_type(made, sources, task.targets, learns, probes.bfloat16)
