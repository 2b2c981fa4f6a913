"""DIB: the decodable (V-) information that an encoder leaves to the decoders of its own architecture.

An encoder/decoder split k divides a model into the encoder E = model[:k] and the decoder model[k:]. E is frozen with
its current weights. V_k is the set of all functions that the decoder can be in eval mode, with any trainable parameters
and any buffers. Parameters that do not require gradients stay as the constructor makes them. For a labeling t of the
samples,

    H_V(t) = inf over V_k of the mean cross-entropy of t given E(x),

and H(t) - H_V(t) is the information about t that a decoder can use. H is the empirical entropy. The unit is nats.

Minimality is the mean information about the labelings of relabel.py, which tell apart the samples of a class.
Sufficiency is the information about the original labels (Dubois et al., NeurIPS 2020, arXiv 2009.12789). Both are
information about the samples at hand: they grow as the number of samples decreases.

H_V is not known exactly, but it is at most the loss of any decoder. A probe is a decoder, initialised as at
construction and trained on E(x). Its `loss` is the mean cross-entropy over all samples with its final weights
(layerwise/probes). `upper` is the smallest number that H_V is known not to exceed: the loss of the probe, or one of

1. `upper` of a deeper split: the layers up to that split, as they are, followed by its decoder, are in V_k.
2. The loss of the network itself, for the original labels.
3. The loss of the best constant, if the last layer is linear: H(t) with a bias, log C without one.

1 and 2 hold only if the frozen parameters of the decoder, as constructed, equal those of the model.

analysis/tables.py computes information from these numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import inf, isfinite, log, nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import checks, devices, processes
from layerwise.probes import BATCH_SIZE, Streams, Task, Thesis, Tuned, count_steps, fit, make_seed
from layerwise.probes.decoders import get_type, is_trainable, list_layers
from layerwise.samples import Samples
from layerwise.schema import SUBOPTIMAL
from relabel import relabel

__all__ = ["ProbeResult", "Samples", "Thesis", "Tuned", "measure", "measure_splits"]


class ProbeResult(NamedTuple):
    """What a probe found about one labeling. Entropies and losses are in nats."""

    permutation: int  # the enumeration of the samples of each class: 0 is data order, 1, 2, ... are random
    labeling: int | str  # a digit, 0 .. D - 1, or "y" for the original labels
    entropy: float  # H of the labeling
    loss: float  # mean cross-entropy over all samples, with the final weights in eval mode
    upper: float  # the smallest number that H_V is known not to exceed; at most the loss


def measure(
    model: nn.Sequential,
    k: int,
    samples: Samples,
    num_classes: int,
    make_model: Callable[[], nn.Sequential],
    *,
    probes: Tuned | Thesis | None = None,
    labelings: int = 1,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = devices.CACHE_BYTES,
) -> list[ProbeResult]:
    """Return the probes of the split at k. measure_splits documents the parameters."""
    options = {"probes": probes, "labelings": labelings, "seed": seed, "epoch": epoch}
    options |= {"batch_size": batch_size, "cache_bytes": cache_bytes}
    return measure_splits(model, [k], samples, num_classes, make_model, **options)[k]


@devices.disable_tf32()
@torch.inference_mode(False)  # probes are trained: they need gradients, whatever mode the caller is in
def measure_splits(
    model: nn.Sequential,
    splits: Iterable[int],
    samples: Samples,
    num_classes: int,
    make_model: Callable[[], nn.Sequential],
    *,
    probes: Tuned | Thesis | None = None,
    labelings: int = 1,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = devices.CACHE_BYTES,
) -> dict[int, list[ProbeResult]]:
    """Return {k: the probes of split k}: first for the original labels, then for every digit of every enumeration.

    Parameters:
        model: an nn.Sequential that returns logits (B, C) or wider, in eval mode those of each sample alone.
        splits: each k, from 0 to len(model) - 1, where the model is split into model[:k] and model[k:].
        samples: an object with len(), .labels (N,) of integers in 0 .. C - 1, and .batch(indices) -> (inputs, labels),
            which returns the same for a sample each time.
        num_classes: C.
        make_model: builds the whole model as at construction, with weights from torch's global generators. On CUDA it
            is called with that device as torch's default, so its random numbers differ from those of a CPU. Probes of
            half precision are converted to float32.
        probes: how probes are trained. The default is Tuned with the steps of 30 epochs.
        labelings: how many enumerations of the samples of each class are used: data order, then random orders that
            depend on seed alone.
        seed, epoch: determine all random numbers. Initial weights depend on k and on the labeling as well. Batches are
            the same for all probes.
        batch_size: of the steps and of every pass.
        cache_bytes: how many bytes of encodings are cached. Encodings that do not fit are computed at every step.

    On CUDA steps use bfloat16 if the GPU has it. Processes that torchrun started share the probes, and must all call.
    A decoder without trainable parameters is measured as it is. The model, its modes and gradients, and torch's random
    states stay as they were. autocast, no_grad and inference_mode around the call have no effect.

    Raises:
        ValueError: for labelings below 1, a k that leaves no decoder, encodings or outputs that are not finite, labels
            that relabel refuses, and a model, samples or make_model that layerwise/checks.py refuses.
    """
    if labelings < 1:
        raise ValueError(f"DIB: labelings must be at least 1, got {labelings}")
    checks.validate_make_model(make_model)
    model = checks.validate_sequential(model, "the model")
    splits = checks.validate_splits(splits, model)
    if not splits:
        return {}
    labels = checks.validate_labels(samples, "DIB")
    keys, targets = make_labelings(labels, num_classes, labelings, seed)
    device = labels.device
    cuda = [device] if device.type == "cuda" else []

    def inputs(indices: Tensor) -> Tensor:
        return samples.batch(indices)[0].clone()  # batch may return a view, and the first layer may work in place

    if probes is None:
        probes = Tuned(count_steps(30, len(labels)))
    current_device = torch.cuda.device(device) if cuda else nullcontext()  # where CUDA's generator is seeded
    same_random_states = torch.random.fork_rng(devices=cuda)
    no_autocast = torch.autocast(device.type, enabled=False)
    with current_device, same_random_states, no_autocast, set_eval_mode(model):
        x = checks.validate_inputs(samples, labels, "DIB")
        streams = Streams(seed, epoch, device)
        make = partial(make_probe, make_model, streams)
        reference = make(0, "reference").eval()
        checks.validate_constructor(model, reference, make(0, "again"), splits[0])
        refuse_other_frozen(model, reference, splits)
        checks.validate_network(model, reference, splits, x, num_classes)
        task = Task(model, reference, splits, inputs, targets, make, streams)
        own_loss = compute_own_loss(task, labels, batch_size)
        losses = fit(task, probes, batch_size=batch_size, cache_bytes=cache_bytes).tolist()
    entropies = [compute_entropy(target, num_classes) for target in targets]
    uppers = compute_upper(task, losses, entropies, own_loss)
    return {
        k: [ProbeResult(*key, *values) for key, *values in zip(keys, entropies, of_split, uppers[k], strict=True)]
        for k, of_split in zip(splits, losses, strict=True)
    }


def make_probe(make_model: Callable[[], nn.Sequential], streams: Streams, k: int, *words: object) -> nn.Sequential:
    """Construct a decoder of split k, with weights from the random stream of the words."""
    streams.start(*words, k)
    probe = checks.call_make_model(make_model, streams.device)[k:].to(streams.device)
    has_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in probe.parameters())
    return probe.float() if has_half else probe


def refuse_other_frozen(model: nn.Sequential, reference: nn.Sequential, splits: list[int]) -> None:
    """Raise ValueError for a decoder without trainable parameters whose values differ from the model's.

    V_k would be one function, which has nothing to do with the model.
    """
    for k in splits:
        if not is_trainable(reference[k:]) and not has_same_frozen(model[k:], reference[k:]):
            raise ValueError(
                f"DIB: make_model() freezes all of the decoder model[{k}:], with other values than the model's"
            )


@contextmanager
def set_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and afterwards each module into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def make_labelings(
    labels: Tensor, num_classes: int, labelings: int, seed: int
) -> tuple[list[tuple[int, int | str]], Tensor]:
    """Return [(enumeration, labeling), ...] and the labelings (J, N): first the labels, then the digits."""
    keys, targets = [(0, "y")], [labels]
    generator = torch.Generator().manual_seed(make_seed("enumerations", seed))
    order = torch.arange(len(labels), device=labels.device)
    for enumeration in range(labelings):
        digits = relabel(labels[order], num_classes)[order.argsort()]  # (N, D), in data order again
        keys += [(enumeration, digit) for digit in range(digits.shape[1])]
        targets += digits.T
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return keys, torch.stack(targets)


def compute_entropy(labels: Tensor, num_classes: int) -> float:
    """Return -sum_c p_c log p_c of the empirical distribution p of labels (N,), in nats."""
    p = torch.bincount(labels, minlength=num_classes).double() / len(labels)  # (C,)
    return torch.special.entr(p).sum().item()


def compute_upper(
    task: Task, losses: list[list[float]], entropies: list[float], own_loss: float
) -> dict[int, list[float]]:
    """Return {k: `upper` of each labeling}, in nats.

    losses: of the probes, a list for each split. entropies: of the labelings, the original labels first. own_loss: that
    of the network itself.
    """
    uppers, unknown, after = {}, [inf] * len(entropies), None
    deeper = unknown
    for k, of_split in zip(reversed(task.splits), reversed(losses), strict=True):
        decoder = task.reference[k:]
        if after and shares_any_parameter(task.reference[k:after], task.reference[after:]):
            deeper = unknown  # layers that share parameters with the deeper decoder cannot stay as they are
        constants, own = [compute_constant_loss(decoder, H) for H in entropies], [own_loss, *unknown[1:]]
        if not has_same_frozen(task.model[k:], decoder):  # neither the model's layers nor its decoder are in V_k
            deeper = own = unknown
        known = [of_split, deeper, constants, own]
        uppers[k] = deeper = [min(filter(isfinite, values), default=nan) for values in zip(*known, strict=True)]
        after = k
    return uppers


def compute_constant_loss(decoder: nn.Sequential, entropy: float) -> float:
    """Return the loss of the best constant that the decoder can be, for a labeling of that entropy, in nats.

    Return inf if the decoder cannot be a constant.
    """
    last = list_layers(decoder)[-1]
    if get_type(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return inf
    return log(last.out_features) if last.bias is None else entropy


def compute_suboptimal_share(results: Iterable[ProbeResult]) -> float:
    """Return the share of the probes that are known suboptimal: some decoder is known to have a lower loss."""
    above = [not result.loss - result.upper <= SUBOPTIMAL for result in results]  # counts a loss that is NaN
    return sum(above) / len(above)


def has_same_frozen(own: nn.Module, constructed: nn.Module) -> bool:
    """Return whether all parameters that are frozen as constructed have the values of the model."""
    values = dict(own.named_parameters())
    return all(p.requires_grad or torch.equal(p, values[name].to(p)) for name, p in constructed.named_parameters())


def shares_any_parameter(first: nn.Module, second: nn.Module) -> bool:
    """Return whether any parameter is in both modules."""
    return not set(first.parameters()).isdisjoint(second.parameters())


@torch.no_grad()
def compute_own_loss(task: Task, labels: Tensor, batch_size: int) -> float:
    """Return the mean cross-entropy of the model itself, in nats.

    Raises ValueError if the encodings of a split or the outputs are not finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=labels.device)
    infinite = torch.zeros(len(task.model), dtype=torch.int64, device=labels.device)  # number of batches
    for indices in processes.take_share(torch.arange(len(labels), device=labels.device).split(batch_size)):
        z = task.inputs(indices)
        for k, block in enumerate(task.model):
            if k in task.splits:
                infinite[k] += ~z.isfinite().all()
            z = block(z)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        total += F.cross_entropy(z, labels[indices], reduction="sum")
    processes.all_reduce_sum(total, infinite)
    if infinite.any():
        raise ValueError(f"DIB: the encodings of split {infinite.nonzero()[0].item()} are not finite on these samples")
    if not total.isfinite():
        raise ValueError("DIB: the outputs of the model are not finite on these samples")
    return total.item() / len(labels)
