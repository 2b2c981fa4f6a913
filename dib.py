"""Decodable information bottleneck (DIB): the information about a labeling that decoders can use in frozen encodings.

An encoder/decoder split k divides a model into the encoder E = model[:k] and the decoder model[k:]. E is frozen with
its current weights. V_k is the set of all functions that the decoder computes in eval mode, over all values of its
trainable parameters and buffers. Parameters that do not require gradients have the values that make_model() gives them.
A labeling t assigns one of C labels to each sample. Its V-entropy is

    H_V(t) = inf over V_k of the mean cross-entropy of t given E(x),

and H(t) - H_V(t) is the information about t that a decoder can use. H is the empirical entropy. The unit is nats.

Minimality is the mean information about the labelings that relabel.py makes. For this, the samples of each class are
numbered (an enumeration), and the numbers are written in base C. Each digit is a labeling. Together, the digits
distinguish the samples of each class (Dubois et al., NeurIPS 2020, arXiv 2009.12789). Enumerations are random by
default, because data order may be related to the inputs. The digits of a random enumeration are random labels, so
minimality is what V_k can memorise of these encodings. Sufficiency is the information about the original labels. Both
are measured on a finite number of samples, and both grow as that number decreases. Two controls show by how much:

- `shuffled`: the original labels in a random order. Sufficiency up to this level can be memorisation.
- `held-out`: the probe of the original labels is scored on other samples (layerwise/probes/held_out.py). Its entropy is
  the cross-entropy of their labels under the class shares of its own samples. So a constant has the information 0, and
  the information may be negative. It is not bounded by the rules below.

H_V cannot be computed exactly. A probe is a newly initialised decoder that is trained on E(x) (layerwise/probes). Its
`loss` is the mean cross-entropy over all samples after training. The loss of any decoder is an upper bound on H_V.
`upper` is the smallest known upper bound, the minimum of the loss of the probe and

1. `upper` of a deeper split k': the function of model[k:k'], with its current weights, and then any decoder of split k'
   is in V_k.
2. The loss of the network, for the original labels.
3. The loss of the best constant logits, if the last layer is linear: H(t) if that layer has a bias, log C if not.

`lower` is the largest known lower bound, the maximum of 0 and

4. For linear probes, the dual bound of layerwise/probes/linear.py. It bounds the loss of the decoders whose logits
   differ by at most 2,000 on every sample, or by at most as much as those of the probe.
5. The entropy of the labeling given E(x): a decoder returns the same for samples with equal encodings.
6. `lower` of a shallower split k', because V_k' has the functions that rule 1 names. A bound of rule 4 keeps its
   restriction.

A bound that exceeds `upper` by up to 1e-6 nats is set to `upper`, as losses are sums of float32. A bound that exceeds
`upper` by more does not hold, and 0 is used instead.

1, 2 and 6 hold only if the frozen parameters of the decoder have the same values in the model and after make_model().

analysis/statistics.py computes information from these numbers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import inf, isfinite, log, nan
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layerwise import checks, devices, processes
from layerwise.modes import set_eval_mode
from layerwise.probes import BATCH_SIZE, HeldOut, Source, Task, Thesis, Tuned, choose_half, count_steps, fit
from layerwise.probes.decoders import get_unmodified_type, is_trainable, list_layers
from layerwise.probes.linear import clamp_bound
from layerwise.samples import Samples
from layerwise.schema import HELD_OUT, LABELS, SHUFFLED, SUBOPTIMAL
from layerwise.streams import Streams, make_seed
from relabel import relabel

__all__ = ["ProbeResult", "Samples", "Thesis", "Tuned", "measure", "measure_splits"]


class ProbeResult(NamedTuple):
    """The result of one probe: a row of dib.csv. Entropies and losses are in nats."""

    enumeration: int  # number of the enumeration that a digit is from: 0 is data order, 1, 2, ... are random orders
    labeling: int | str  # index of a digit, 0 for the most significant; "y" (original labels), "shuffled" or "held-out"
    entropy: float  # H of the labeling
    loss: float  # mean cross-entropy over all samples, with the final weights in eval mode
    lower: float  # the largest known lower bound on H_V
    upper: float  # the smallest known upper bound on H_V


def measure(
    model: nn.Sequential,
    k: int,
    samples: Samples,
    num_classes: int,
    make_model: Callable[[], nn.Sequential],
    *,
    probes: Tuned | Thesis | None = None,
    enumerations: int | Literal["data"] = 1,
    held_out: Samples | None = None,
    controls: bool = True,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = devices.CACHE_BYTES,
) -> list[ProbeResult]:
    """Return the results of the probes of split k. For the parameters see measure_splits."""
    found = measure_splits(
        model,
        [k],
        samples,
        num_classes,
        make_model,
        probes=probes,
        enumerations=enumerations,
        held_out=held_out,
        controls=controls,
        seed=seed,
        epoch=epoch,
        batch_size=batch_size,
        cache_bytes=cache_bytes,
    )
    return found[k]


@devices.disable_tf32()
@torch.inference_mode(False)  # probes are trained with gradients, also if the caller has disabled them
def measure_splits(
    model: nn.Sequential,
    splits: Iterable[int],
    samples: Samples,
    num_classes: int,
    make_model: Callable[[], nn.Sequential],
    *,
    probes: Tuned | Thesis | None = None,
    enumerations: int | Literal["data"] = 1,
    held_out: Samples | None = None,
    controls: bool = True,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = BATCH_SIZE,
    cache_bytes: int = devices.CACHE_BYTES,
) -> dict[int, list[ProbeResult]]:
    """Return {k: results}: those of the labels, of the shuffled labels, of each enumeration, and of held-out samples.

    Parameters:
        model: an nn.Sequential that returns logits (B, C), or more columns. In eval mode, the logits of a sample must
            not depend on the other samples of the batch.
        splits: the splits k to measure, 0 <= k < len(model). Split k has the encoder model[:k] and the decoder
            model[k:].
        samples: an object with len(), .labels (N,) of integers in 0 .. C - 1, and .batch(indices) -> (inputs, labels),
            which returns the same for a sample each time.
        num_classes: C.
        make_model: a function without arguments that returns a newly initialised model. It must draw the weights from
            torch's global generators. If the labels are on CUDA, it is called with that device as torch's default
            device. The initial weights then differ from those on a CPU. Probes of half precision are converted to
            float32.
        probes: how probes are trained. By default Tuned(count_steps(30, len(samples))).
        enumerations: the number of random enumerations (each is D labelings), or "data" for one in data order.
        held_out: samples of the same kind as `samples`, on which the probes of the original labels are scored. Every
            class among them must be in `samples`.
        controls: whether to measure the shuffled labels, and the samples held out if there are any.
        seed, epoch: seed the random numbers. The enumerations, the order of the shuffled labels and the halves of the
            samples held out depend on seed only. The initial weights depend on both, on k and on the labeling. Batches
            are the same for all probes.
        batch_size: the number of samples in a training step and in an evaluation batch.
        cache_bytes: the number of bytes of encodings that are cached. If the encodings of a split do not fit, they are
            computed again in every step.

    On CUDA, Tuned uses bfloat16 if the GPU supports it. With torchrun, every process must call this function.
    The processes share the probes. A decoder without trainable parameters is not trained. The model, the modes of its
    modules, gradients and torch's random states are not changed. autocast, no_grad and inference_mode around the call
    have no effect.

    Raises:
        ValueError: if enumerations < 1, if a split is not in 0 .. len(model) - 1, if samples held out are fewer than
            two or have a class that `samples` lack, if encodings or outputs are not finite, or if model, samples or
            make_model are not valid (see layerwise/checks.py).
    """
    if enumerations != "data" and not (isinstance(enumerations, int) and enumerations >= 1):
        raise ValueError(f'DIB: enumerations must be "data" or a number of at least 1, got {enumerations!r}')
    checks.validate_make_model(make_model)
    model = checks.validate_sequential(model, "the model")
    splits = checks.validate_splits(splits, model)
    if not splits:
        return {}
    labels = checks.validate_labels(samples, "DIB")
    keys, targets = make_labelings(labels, num_classes, enumerations, controls, seed)
    entropies = [compute_entropy(target, num_classes) for target in targets]
    if probes is None:
        probes = Tuned(count_steps(30, len(labels)))
    with isolate(model, labels.device):
        streams = Streams(seed, epoch, labels.device)
        task = make_task(model, splits, samples, num_classes, targets, make_model, streams)
        network_loss = compute_network_loss(task, task.inputs, labels, batch_size)
        if held_out is not None and controls:
            task = replace(task, held_out=hold_out(task, held_out, num_classes, seed))
            compute_network_loss(task, task.held_out.inputs, task.held_out.labels, batch_size)  # validates encodings
        fitted = fit(task, probes, batch_size=batch_size, cache_bytes=cache_bytes)
    losses = fitted.losses.tolist()
    uppers = compute_upper(task, losses, entropies, network_loss)
    lowers = compute_lower(task, fitted.lowers.tolist(), uppers)
    found = {k: collect_results(keys, entropies, losses[i], lowers[k], uppers[k]) for i, k in enumerate(splits)}
    if task.held_out:
        entropy = compute_cross_entropy(task.held_out.labels, labels, num_classes)
        for k, loss in zip(splits, fitted.held_out.tolist(), strict=True):
            found[k].append(ProbeResult(0, HELD_OUT, entropy, loss, lower=0.0, upper=loss))
    return found


def make_task(
    model: nn.Sequential,
    splits: list[int],
    samples: Samples,
    num_classes: int,
    targets: Tensor,
    make_model: Callable[[], nn.Sequential],
    streams: Streams,
) -> Task:
    """Validate samples, make_model and model, and return the task of fitting probes for the labelings (J, N).

    model: in eval mode. splits: at least one, in order. targets: the labelings, the original labels first.
    """
    x = checks.read_trial_inputs(samples, targets[0], "DIB")
    make = partial(make_probe, make_model, streams)
    reference = make(0, "reference").eval()
    checks.validate_made_models(model, reference, make(0, "again"), splits[0])
    validate_frozen_decoders(model, reference, splits)
    checks.validate_network(model, reference, splits, x, num_classes)
    return Task(model, reference, splits, make_input_source(samples), targets, make, streams)


def make_input_source(samples: Samples) -> Source:
    """Return a function that maps indices (B,) to copies of the inputs (B, ...).

    The first layer may work in place, and samples.batch may return a view.
    """
    return lambda indices: samples.batch(indices)[0].clone()


def hold_out(task: Task, samples: Samples, num_classes: int, seed: int) -> HeldOut:
    """Validate the samples that are held out, and divide them into two halves.

    Raises ValueError if they are not valid, fewer than two, or have a class that the probes are not trained on.
    """
    labels = checks.validate_labels(samples, "DIB: held_out")
    trained = task.targets[0]
    if labels.device != trained.device or len(labels) < 2:
        expected = f"at least two samples on {trained.device}"
        raise ValueError(f"DIB: held_out must have {expected}, got {len(labels)} on {labels.device}")
    unknown = labels[~torch.isin(labels, trained)].unique().tolist()
    if unknown:
        raise ValueError(f"DIB: held_out has samples of class {unknown[0]}, and the samples of the probes have none")
    x = checks.read_trial_inputs(samples, labels, "DIB: held_out")
    checks.validate_network(task.model, task.reference, task.splits, x, num_classes)
    return HeldOut(make_input_source(samples), labels, choose_half(labels, make_seed("halves", seed)))


@contextmanager
def isolate(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model into eval mode, disable autocast, and restore torch's random states afterwards."""
    cuda = [device] if device.type == "cuda" else []
    current_device = torch.cuda.device(device) if cuda else nullcontext()  # manual_seed seeds the current device
    no_autocast = torch.autocast(device.type, enabled=False)
    with current_device, torch.random.fork_rng(devices=cuda), no_autocast, set_eval_mode(model):
        yield


def collect_results(
    keys: list[tuple[int, int | str]],
    entropies: list[float],
    losses: list[float],
    lowers: list[float],
    uppers: list[float],
) -> list[ProbeResult]:
    """Return the results of one split. keys: (enumeration, labeling) of each probe."""
    rows = zip(keys, entropies, losses, lowers, uppers, strict=True)
    return [ProbeResult(*key, *values) for key, *values in rows]


def make_probe(make_model: Callable[[], nn.Sequential], streams: Streams, k: int, *words: object) -> nn.Sequential:
    """Construct a decoder of split k. words: name the random stream of its initial weights."""
    streams.seed_generators(*words, k)
    probe = checks.call_make_model(make_model, streams.device)[k:].to(streams.device)
    has_half = any(p.dtype in (torch.float16, torch.bfloat16) for p in probe.parameters())
    return probe.float() if has_half else probe


def validate_frozen_decoders(model: nn.Sequential, reference: nn.Sequential, splits: list[int]) -> None:
    """Raise ValueError if a decoder has no trainable parameters and its parameters differ from the model's.

    V_k would then consist of one function, which does not depend on the model.
    """
    for k in splits:
        if not is_trainable(reference[k:]) and not has_same_frozen(model[k:], reference[k:]):
            raise ValueError(
                f"DIB: all parameters of the decoder model[{k}:] are frozen, and the values that make_model() returns "
                "differ from the model's"
            )


def make_labelings(
    labels: Tensor, num_classes: int, enumerations: int | Literal["data"], controls: bool, seed: int
) -> tuple[list[tuple[int, int | str]], Tensor]:
    """Return the keys [(enumeration, labeling), ...] and the labelings (J, N). The first labeling is the labels.

    The order of `shuffled` is drawn from the seed alone, so that it is the same for all sets of N samples and in all
    epochs.
    """
    N, device = len(labels), labels.device
    keys, targets = [(0, LABELS)], [labels]
    if controls:
        generator = torch.Generator().manual_seed(make_seed("shuffled", seed))
        keys.append((0, SHUFFLED))
        targets.append(labels[torch.randperm(N, generator=generator).to(device)])
    generator = torch.Generator().manual_seed(make_seed("enumerations", seed))
    if enumerations == "data":
        orders = {0: torch.arange(N, device=device)}
    else:
        orders = {i: torch.randperm(N, generator=generator).to(device) for i in range(1, enumerations + 1)}
    for enumeration, order in orders.items():
        digits = relabel(labels[order], num_classes)[order.argsort()]  # (N, D), in data order again
        keys += [(enumeration, digit) for digit in range(digits.shape[1])]
        targets += digits.T
    return keys, torch.stack(targets)


def compute_entropy(labels: Tensor, num_classes: int) -> float:
    """Return the empirical entropy of labels (N,), -sum_c p_c log p_c, in nats."""
    p = torch.bincount(labels, minlength=num_classes).double() / len(labels)  # (C,)
    return torch.special.entr(p).sum().item()


def compute_cross_entropy(labels: Tensor, reference: Tensor, num_classes: int) -> float:
    """Return the mean of -log of the share of each of the labels (N,) in the reference labels (M,), in nats."""
    shares = torch.bincount(reference, minlength=num_classes).double() / len(reference)  # (C,)
    return -shares[labels].log().mean().item()


def compute_upper(
    task: Task, losses: list[list[float]], entropies: list[float], network_loss: float
) -> dict[int, list[float]]:
    """Return {k: `upper` of each labeling}, in nats. The module docstring numbers the bounds.

    losses: of the probes, a list for each split. entropies: of the labelings. network_loss: for the original labels,
    which are the first labeling.
    """
    uppers, deeper = {}, None  # deeper: the next deeper split
    for k, of_split in zip(reversed(task.splits), reversed(losses), strict=True):
        decoder = task.reference[k:]
        bounds = [of_split, [compute_constant_loss(decoder, entropy) for entropy in entropies]]
        if has_same_frozen(task.model[k:], decoder):
            bounds.append([network_loss] + [inf] * (len(entropies) - 1))
        if deeper is not None and is_nested(task, k, deeper):
            bounds.append(uppers[deeper])
        uppers[k] = [min(filter(isfinite, of_labeling), default=nan) for of_labeling in zip(*bounds, strict=True)]
        deeper = k
    return uppers


def compute_lower(task: Task, lowers: list[list[float]], uppers: dict[int, list[float]]) -> dict[int, list[float]]:
    """Return {k: `lower` of each labeling}, in nats. The module docstring numbers the bounds.

    lowers: of each split alone. uppers: the results of compute_upper. A bound that does not hold is replaced by 0.
    """
    found, shallower = {}, None
    for k, of_split in zip(task.splits, lowers, strict=True):
        bounds = [of_split]
        if shallower is not None and is_nested(task, shallower, k):
            bounds.append(found[shallower])
        rows = zip(zip(*bounds, strict=True), uppers[k], strict=True)
        found[k] = [max(clamp_bound(bound, upper) for bound in of_labeling) for of_labeling, upper in rows]
        shallower = k
    return found


def is_nested(task: Task, k: int, deeper: int) -> bool:
    """Return whether V_k has all functions of the layers between the splits, as they are, and a decoder in V_deeper.

    Frozen parameters must have the values that make_model() gives them. Layers between the splits that share parameters
    with the deeper decoder would change when it is trained.
    """
    if not has_same_frozen(task.model[k:], task.reference[k:]):
        return False
    return not shares_any_parameter(task.reference[k:deeper], task.reference[deeper:])


def compute_constant_loss(decoder: nn.Sequential, entropy: float) -> float:
    """Return the loss of the best constant logits, for a labeling with the given entropy, in nats.

    Return inf if it is not known whether the decoder can return constant logits.
    """
    last = list_layers(decoder)[-1]
    if get_unmodified_type(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return inf
    return log(last.out_features) if last.bias is None else entropy


def compute_suboptimal_share(results: Iterable[ProbeResult]) -> float:
    """Return the share of the probes that are known suboptimal: their loss exceeds `upper` by more than SUBOPTIMAL.

    Results on held-out samples are not counted.
    """
    own = [result for result in results if result.labeling != HELD_OUT]
    above = [not result.loss - result.upper <= SUBOPTIMAL for result in own]  # `not <=`, so that NaN counts
    return sum(above) / len(above)


def has_same_frozen(own: nn.Module, constructed: nn.Module) -> bool:
    """Return whether all parameters that are frozen in `constructed` have the same values in `own`."""
    values = dict(own.named_parameters())
    return all(p.requires_grad or torch.equal(p, values[name].to(p)) for name, p in constructed.named_parameters())


def shares_any_parameter(first: nn.Module, second: nn.Module) -> bool:
    """Return whether any parameter is in both modules."""
    return not set(first.parameters()).isdisjoint(second.parameters())


@torch.no_grad()
def compute_network_loss(task: Task, inputs: Source, labels: Tensor, batch_size: int) -> float:
    """Return the mean cross-entropy of the model over all samples of a set, in nats.

    Raises ValueError if the encodings of a split or the outputs are not finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=labels.device)
    infinite = torch.zeros(len(task.model), dtype=torch.int64, device=labels.device)  # number of batches
    for indices in processes.take_share(torch.arange(len(labels), device=labels.device).split(batch_size)):
        z = inputs(indices)
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
