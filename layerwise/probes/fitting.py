"""Fit the probes of all splits and labelings of a task."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from layerwise import processes
from layerwise.probes.decoders import is_linear, is_mlp, is_trainable, list_layers
from layerwise.probes.encodings import (
    Source,
    compute_group_entropy,
    group_equal,
    make_cast,
    make_source,
    make_standardiser,
    transform_source,
)
from layerwise.probes.group import ProbeGroup
from layerwise.probes.held_out import Recorder, compute_ridge_losses, cross_fit
from layerwise.probes.linear import can_fit_linear, compute_linear_optimum, decompose, read_features
from layerwise.probes.separate import SeparateProbes
from layerwise.probes.stacked import StackedProbes
from layerwise.probes.task import Task
from layerwise.probes.training import Thesis, Tuned, compute_parameter_sizes

Member = tuple[int, int]  # a probe: its split k and its labeling j


class Encoded(NamedTuple):
    """A set, as a source of inputs or encodings, and batches of all its indices."""

    source: Source
    batches: tuple[Tensor, ...]


Encodings = dict[int, list[Encoded]]  # {k: the set of the probes, then the samples held out, if there are any}


class Fitted(NamedTuple):
    """The results of the probes of every split and labeling, in nats, float64."""

    losses: Tensor  # (splits, J)
    lowers: Tensor  # (splits, J): lower bounds on H_V
    held_out: Tensor  # (splits,): losses of the first labeling on the samples held out, 0 if there are none


def fit(task: Task, probes: Tuned | Thesis, *, batch_size: int, cache_bytes: int) -> Fitted:
    """Fit the probes of every split and labeling of the task.

    For Tuned, linear optima are computed. MLPs are trained in stacked groups, other decoders one by one.
    cache_bytes: the size of the encodings that may be cached. The processes of torchrun share the probes: all call fit.
    """
    J, N = task.targets.shape
    linear = {k for k in task.splits if probes.solves_linear and can_fit_linear(task.reference[k:], N)}
    assigned = processes.take_share([(k, j) for k in task.splits for j in range(J)])
    starts = {k: probes.count_starts(task.reference[k:]) for k in task.splits}
    groups = group_splits(task.reference, sorted({k for k, _ in assigned}), linear, starts)
    sizes = compute_parameter_sizes(task.reference)
    results = torch.zeros(3, len(task.splits), J, dtype=torch.float64)
    for kind, splits, encodings in encode_groups(task, groups, batch_size, cache_bytes):
        members = [(k, j) for k, j in assigned if k in splits]
        equal = {k: group_equal(*of_split[0]) for k, of_split in encodings.items()}
        lowers = [compute_group_entropy(equal[k], task.targets[j]) for k, j in members]
        if kind == "linear":
            losses, proved, held_out = fit_linear(task, members, encodings)
            lowers = [max(pair) for pair in zip(lowers, proved, strict=True)]
        else:
            losses, held_out = train_group(task, probes, kind, members, encodings, sizes, batch_size)
        for (k, j), *values in zip(members, losses, lowers, strict=True):
            results[:2, task.splits.index(k), j] = torch.tensor(values, dtype=results.dtype)
        for k, loss in held_out.items():
            results[2, task.splits.index(k), 0] = loss
    results = results.to(task.targets.device)
    processes.all_reduce_sum(results)
    return Fitted(*results[:2], results[2, :, 0])


def group_splits(
    reference: nn.Sequential, splits: list[int], linear: set[int], starts: dict[int, int]
) -> list[tuple[str, list[int]]]:
    """Return (kind, splits) of the groups of splits whose probes are fitted together, in order of their first splits.

    All splits with an MLP decoder and the same number of starts form one group. Every other split is a group. linear:
    the splits with kind "linear". starts: {k: number of starts}.
    """
    groups, mlps = [], {}
    for k in splits:
        if k in linear:
            groups.append(("linear", [k]))
        elif is_mlp(reference[k:]):
            mlps.setdefault(starts[k], []).append(k)
        else:
            groups.append(("other" if is_trainable(reference[k:]) else "frozen", [k]))
    groups += [("mlp", of_starts) for of_starts in mlps.values()]
    return sorted(groups, key=lambda group: group[1])


def encode_groups(
    task: Task, groups: list[tuple[str, list[int]]], batch_size: int, cache_bytes: int
) -> Iterator[tuple[str, list[int], Encodings]]:
    """Yield (kind, splits, encodings) of each group. Encodings are computed from those of the split before.

    The splits of a group have equal shares of the cache. The samples held out get what the set of the probes leaves.
    """
    inputs = [(task.inputs, task.targets[0])]
    if task.held_out:
        inputs.append((task.held_out.inputs, task.held_out.labels))
    inputs = [Encoded(source, torch.arange(len(y), device=y.device).split(batch_size)) for source, y in inputs]
    sets, depth = inputs, 0  # sets: the encodings of the split at depth
    for kind, splits in groups:
        if splits[0] < depth:  # the group before ended deeper, as MLPs of several depths are in one group
            sets, depth = inputs, 0
        encodings = {}
        for k in splits:
            sets = encode_sets(task.model[depth:k], sets, cache_bytes // len(splits))
            depth, cast = k, make_cast(task.reference[k:])
            encodings[k] = [each._replace(source=transform_source(each.source, cast)) for each in sets]
        yield kind, splits, encodings


def encode_sets(blocks: nn.Sequential, sets: list[Encoded], cache_bytes: int) -> list[Encoded]:
    """Return the sets encoded by the blocks. Each set may cache what those before it leave."""
    encoded = []
    for each in sets:
        source, cached = make_source(blocks, *each, cache_bytes)
        encoded.append(each._replace(source=source))
        cache_bytes -= cached
    return encoded


def fit_linear(
    task: Task, members: list[Member], encodings: Encodings
) -> tuple[list[float], list[float], dict[int, float]]:
    """Return losses and lower bounds of the linear probes of a split, and {k: held-out loss}, in nats."""
    ((k, sets),) = encodings.items()
    decoder, held_out = copy_linear_decoder(task, k), {}
    last = list_layers(decoder)[-1]
    C, has_bias = last.out_features, last.bias is not None
    basis = decompose(read_features(decoder, *sets[0]), has_bias)
    optima = [compute_linear_optimum(basis.U, task.targets[j], C, has_bias) for _, j in members]
    if task.held_out and (k, 0) in members:
        tested = read_features(decoder, *sets[1])
        losses = compute_ridge_losses(basis, task.targets[0], tested, task.held_out.labels, C, has_bias)
        held_out[k] = cross_fit(losses, task.held_out.in_first).item()
    return [loss for loss, _ in optima], [lower for _, lower in optima], held_out


def copy_linear_decoder(task: Task, k: int) -> nn.Sequential:
    """Return a copy of the linear decoder of a split, with the weights of the network.

    The linear layer absorbs the weights of a norm before it. With those of the network, the features are rounded as for
    a split behind the norm. Where the linear layer cannot undo them, the norm has its initial weights.
    """
    decoder = copy.deepcopy(task.reference[k:])
    decoder.load_state_dict(task.model[k:].state_dict())
    return decoder if is_linear(decoder) else task.reference[k:]


def train_group(
    task: Task,
    probes: Tuned | Thesis,
    kind: str,
    members: list[Member],
    encodings: Encodings,
    sizes: dict[str, float],
    batch_size: int,
) -> tuple[list[float], dict[int, float]]:
    """Train the probes of a group. Return their losses, and {k: held-out loss}, in nats.

    sizes: {parameter name: size}. A decoder without trainable parameters is not trained.
    """
    sources = {}
    for k, sets in encodings.items():
        scale = make_standardiser(task.reference[k:], *sets[0]) if probes.standardises else nn.Identity()
        sources[k] = [transform_source(each.source, scale) for each in sets]
    group = make_group(task, probes, kind, members, {k: source for k, (source, *_) in sources.items()})
    scored = [k for k, j in members if j == 0] if task.held_out else []
    recorder = Recorder(task.held_out, {k: sources[k][1] for k in scored}, batch_size) if scored else None
    if kind == "frozen":
        losses = group.compute_final_losses(batch_size)
        if recorder:
            recorder.record(group, recompute=False)
    else:
        generator = task.streams.seed_generators("batches")
        losses = probes.train(group, sizes, batch_size, generator, recorder)
    return losses.tolist(), dict(zip(scored, recorder.compute_held_out_losses(), strict=True)) if recorder else {}


def make_group(
    task: Task, probes: Tuned | Thesis, kind: str, members: list[Member], sources: dict[int, Source]
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
