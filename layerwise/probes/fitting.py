"""Fit probes to every split and labeling of a task, each kind of decoder in the way that suits it."""

import torch
from torch import Tensor, nn

from layerwise import processes
from layerwise.probes.decoders import is_mlp, is_trainable
from layerwise.probes.encodings import Encoder, make_encoder, match_dtype, standardise
from layerwise.probes.linear import can_fit_linear, fit_linear
from layerwise.probes.separate import SeparateProbes
from layerwise.probes.stacked import StackedProbes
from layerwise.probes.task import Task
from layerwise.probes.training import Thesis, Tuned, compute_parameter_sizes


def fit(task: Task, probes: Tuned | Thesis, *, batch_size: int, cache_bytes: int) -> Tensor:
    """Return the loss that the probes of every split reach for each labeling: (splits, J) float64, in nats.

    Linear decoders get their optimum, MLPs are trained stacked, all others one by one. cache_bytes bounds the encodings
    that are cached. Processes that torchrun started share the probes, and must all call.
    """
    J, N = task.targets.shape
    batches = torch.arange(N, device=task.targets.device).split(batch_size)
    linear = {k for k in task.splits if probes.solves_linear and can_fit_linear(task.reference[k:], N)}
    assigned = assign_probes(task, batches)
    losses = torch.zeros(len(task.splits), J, dtype=torch.float64, device=task.targets.device)
    encode, depth = task.inputs, 0
    for group in group_splits(task.reference, sorted({k for k, _ in assigned}), linear):
        if group[0] < depth:  # MLPs are fitted together, also those before and after a split of another kind
            encode, depth = task.inputs, 0
        encoders = {}
        for k in group:  # each encoder continues from the encodings of the split before
            encode, depth = make_encoder(task.model[depth:k], encode, batches, cache_bytes // len(group)), k
            encoders[k] = match_dtype(task.reference[k:], encode)
        members = [(k, j) for k, j in assigned if k in group]
        if group[0] in linear:
            (k,) = group
            found = fit_linear(task.reference[k:], encoders[k], batches, task.targets[[j for _, j in members]])
        else:
            found = fit_trained(task, probes, members, encoders, batches)
        for (k, j), loss in zip(members, found, strict=True):
            losses[task.splits.index(k), j] = loss
    processes.all_reduce_sum(losses)
    return losses


def fit_trained(
    task: Task,
    probes: Tuned | Thesis,
    members: list[tuple[int, int]],
    encoders: dict[int, Encoder],
    batches: tuple[Tensor, ...],
) -> Tensor:
    """Train the probes (k, j) together, and return their losses, (P,) float64: MLPs stacked, others one by one."""
    made, learns = {k: [] for k in encoders}, {k: [] for k in encoders}
    for k, j in members:
        for start in range(probes.count_starts(task.reference[k:])):
            made[k].append(task.make_probe(k, "head", j, start))
            learns[k].append(j)
    if probes.standardises:
        encoders = {k: standardise(task.reference[k:], encode, batches) for k, encode in encoders.items()}
    decoder, batch_size = task.reference[min(encoders) :], len(batches[0])
    kind = StackedProbes if is_mlp(decoder) else SeparateProbes
    group = kind(made, encoders, task.targets, learns, probes.bfloat16)
    if not is_trainable(decoder):  # a frozen classifier stays as it is
        return group.compute_exact_losses(batch_size)
    return probes.train(group, compute_parameter_sizes(task.reference), batch_size, task.streams.start("batches"))


def assign_probes(task: Task, batches: tuple[Tensor, ...]) -> list[tuple[int, int]]:
    """Return the probes (k, j) that this process fits: all, or its share if there are several processes."""
    J = len(task.targets)
    if processes.get_world_size() == 1:
        return [(k, j) for k in task.splits for j in range(J)]
    x = match_dtype(task.reference, task.inputs)(batches[0][:1])
    costs = estimate_costs(task.reference, task.splits, x)
    return processes.deal_probes(costs, J, processes.get_world_size())[processes.get_rank()]


def group_splits(reference: nn.Sequential, splits: list[int], linear: set[int]) -> list[list[int]]:
    """Return groups of splits whose probes are fitted together: all that are MLPs, each other split alone.

    linear: splits whose optimum is computed. Groups are in order of depth.
    """
    mlps = [k for k in splits if is_mlp(reference[k:]) and k not in linear]
    groups = [[k] for k in splits if k not in mlps]
    if mlps:
        groups.append(mlps)
    return sorted(groups)


def estimate_costs(model: nn.Sequential, splits: list[int], x: Tensor) -> dict[int, float]:
    """Return {k: an estimate of the cost of a probe of split k}, without unit, from the inputs x (1, ...) of a sample.

    The model is in eval mode. The estimate adds up the numbers that layers read and write, which is the cost of small
    layers, and a fortieth of their multiply-adds: a processor does about forty while it loads a number.
    """
    of_block = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read = sum(t.numel() for t in inputs if isinstance(t, Tensor))
        written = output.numel() if isinstance(output, Tensor) else 0
        weight = getattr(module, "weight", None)
        products = weight.numel() / len(weight) * written if isinstance(weight, Tensor) else 0
        of_block[-1] += read + written + products / 40

    handles = [m.register_forward_hook(hook) for m in model.modules() if not list(m.children())]
    with torch.no_grad():
        for block in model:
            of_block.append(0.0)
            x = block(x)
    for handle in handles:
        handle.remove()
    return {k: sum(of_block[k:]) for k in splits}
