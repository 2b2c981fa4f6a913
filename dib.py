"""DIB: the decodable (V-) information that an encoder leaves to the decoders of its own architecture.

For a split of a model into encoder E = model[:k] and decoder D = model[k:], E is frozen with the weights it has. V_k is
every function that D can be in eval mode, with any trainable parameters and any buffers; frozen parameters stay as
constructed. For a labeling t of the samples

    H_V(t) = inf over V_k of the mean cross-entropy of t given E(x),     H(t) - H_V(t)

is the information about t that a decoder can use, H being the empirical entropy, in nats. Averaged over the labelings
of relabel.py, which tell apart the samples of a class, it is the minimality; for the original labels it is the
sufficiency (Dubois et al., NeurIPS 2020, arXiv 2009.12789). It is the information of these samples, and grows as they
are fewer.

H_V is not known, but no decoder's loss is below it. A head, a copy of D initialised anew, is trained on E(x), and
`loss` is its mean cross-entropy over all samples with its final weights: how that was reached does not matter
(heads.py), lower is better. `bound` is the least that is known, from this head and from what follows of the definition:

1. The layers up to a deeper split, as they are, followed by a head of that split are a decoder, too.
2. So is the network's own decoder, for the original labels.
3. So is a constant, where the last layer is linear and has a bias; without one, the uniform distribution.

1 and 2 want a decoder whose frozen parameters, as constructed, are the network's own.

measure gives losses and bounds; whoever draws them (analysis/tables.py) takes the differences and their means.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from math import inf, isfinite, log, nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checks
import devices
import heads
import ranks
from relabel import relabel

BEATEN = 1e-3 * log(2)  # nats, a thousandth of a bit: a loss so much above its bound shows in figures
KEEP_BYTES = devices.KEEP_BYTES  # encodings kept; larger ones are computed again at every step


class Head(NamedTuple):
    permutation: int  # of the enumeration of each class: 0 is data order
    labeling: int | str  # the digit, 0 .. D - 1, or "y" for the original labels
    entropy: float  # H of the labeling, nats
    loss: float  # mean cross-entropy over all samples with the final weights in eval mode, nats
    bound: float  # the least that is known of H_V, at most the loss, nats


def measure(model: nn.Sequential, k: int, samples, *rest, **options) -> list[Head]:
    """The heads of the split at k alone: measure_splits has the parameters."""
    return measure_splits(model, [k], samples, *rest, **options)[k]


@devices.exact_float32()
@torch.inference_mode(False)  # heads are trained: gradients are on, whatever the caller has switched off
def measure_splits(
    model: nn.Sequential,
    splits: Iterable[int],
    samples,
    num_classes: int,
    fresh: Callable[[], nn.Sequential],
    recipe: heads.Tuned | heads.Thesis | None = None,
    labelings: int = 1,
    seed: int = 0,
    model_epoch: int = 0,
    batch_size: int = heads.BATCH,
    keep_bytes: int = KEEP_BYTES,
) -> dict[int, list[Head]]:
    """{k: the heads of the split at k}: for the original labels first, then for every digit of every enumeration.

    samples: len(), .labels (N,) of integers, .batch(indices) -> (inputs, labels), the same each time. fresh builds the
    whole model anew, exactly as at construction, from torch's global generators; heads of less than float32 are made
    float32. recipe: how heads are trained, by default Tuned with the steps of 30 epochs. labelings counts the
    enumerations of each class: the first in data order, the others in random orders that depend on seed alone. Heads
    draw their weights by seed, model_epoch, k and their labeling, their batches, the same for all, by seed and
    model_epoch. On CUDA fresh() is called with that device as torch's default, so weights are drawn there, others than
    on a CPU, and heads may take their steps in bfloat16 (devices.has_bfloat16). batch_size is that of training and of
    every pass. keep_bytes bounds the encodings that are kept; beyond it they are computed again at every step.
    Processes that torchrun started share the heads, and must all call.
    A decoder with nothing to train is measured as it is. The model, its modes and gradients and all global random
    states are left as they were, and autocast, no_grad and inference_mode around the call change nothing.
    Raises ValueError for labelings below 1, a k that leaves no decoder, encodings or outputs that are not finite, what
    relabel refuses, and networks, samples and constructors that checks.py refuses.
    """
    if labelings < 1:
        raise ValueError(f"DIB: labelings must be at least 1, got {labelings}")
    checks.function(fresh)
    model = checks.blocks(model, "the model")
    splits = checks.splits(splits, model)
    if not splits:
        return {}
    labels = checks.labels(samples, "DIB")
    keys, targets = label(labels, num_classes, labelings, seed)
    device = labels.device
    cuda = [device] if device.type == "cuda" else []

    def inputs(indices: Tensor) -> Tensor:
        return samples.batch(indices)[0].clone()  # the samples' own, perhaps, and the first layer may work in place

    def seeded(*words: object) -> torch.Generator:
        number = stream(*words, seed, model_epoch)
        torch.default_generator.manual_seed(number)
        if cuda:
            torch.cuda.manual_seed(number)
        return torch.Generator().manual_seed(number)

    def new_head(k: int, *which: object) -> nn.Sequential:
        seeded(*which, k)
        head = checks.made(fresh, device)[k:].to(device)
        halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters())
        return head.float() if halves else head

    recipe = recipe or heads.Tuned(heads.steps(30, len(labels)))
    current = torch.cuda.device(device) if cuda else nullcontext()  # where CUDA's generator is seeded
    untouched = torch.random.fork_rng(devices=cuda)
    with current, untouched, torch.autocast(device.type, enabled=False), evaluated(model):
        x = checks.inputs(samples, labels, "DIB")
        reference = new_head(0, "reference").eval()
        checks.constructor(model, reference, new_head(0, "again"), splits[0])
        refuse_other_fixed(model, reference, splits)
        checks.network(model, reference, splits, x, num_classes)
        own = own_loss(model, splits, inputs, labels, batch_size)
        losses = heads.find(model, splits, inputs, targets, reference, new_head, seeded, recipe, batch_size, keep_bytes)
    entropies = [entropy(target, num_classes) for target in targets]
    bounds = bound(model, reference, splits, losses.tolist(), entropies, own)
    return {
        k: [Head(*key, *rest) for key, *rest in zip(keys, entropies, of_split, bounds[k], strict=True)]
        for k, of_split in zip(splits, losses.tolist(), strict=True)
    }


def refuse_other_fixed(model: nn.Sequential, reference: nn.Sequential, splits: list[int]) -> None:
    """ValueError for a decoder with nothing to train, and other values than the model's: V would be chance."""
    for k in splits:
        if not heads.trains(reference[k:]) and not same_frozen(model[k:], reference[k:]):
            raise ValueError(f"DIB: fresh() freezes all of the decoder model[{k}:], with other values than the model's")


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and afterwards in the modes it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def label(labels: Tensor, num_classes: int, labelings: int, seed: int) -> tuple[list[tuple[int, int | str]], Tensor]:
    """[(permutation, labeling), ...] and the targets (J, N): the labels, then the digits of each enumeration."""
    keys, targets = [(0, "y")], [labels]
    generator = torch.Generator().manual_seed(stream("enumerations", seed))
    order = torch.arange(len(labels), device=labels.device)
    for permutation in range(labelings):
        digits = relabel(labels[order], num_classes)[order.argsort()]  # (N, D), back in data order
        keys += [(permutation, digit) for digit in range(digits.shape[1])]
        targets += digits.T
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return keys, torch.stack(targets)


def entropy(labels: Tensor, num_classes: int) -> float:
    """-sum_c p_c log p_c of the empirical distribution of labels (N,), in nats."""
    p = torch.bincount(labels, minlength=num_classes).double() / len(labels)  # (C,)
    return torch.special.entr(p).sum().item()


def bound(
    model: nn.Sequential,
    reference: nn.Sequential,
    splits: list[int],
    losses: list[list[float]],
    entropies: list[float],
    own_loss: float,
) -> dict[int, list[float]]:
    """{k: the least that is known of H_V of each labeling}, from the losses of all splits, in nats.

    reference: a model as constructed. The labelings are those of the losses, the original labels first. own_loss is
    that of the network itself.
    """
    bounds, unknown, after = {}, [inf] * len(entropies), None
    deeper = unknown
    for k, of_split in zip(reversed(splits), reversed(losses), strict=True):
        if after and shared(reference[k:after], reference[after:]):  # parameters: such layers cannot stay as they are
            deeper = unknown
        constants, own = [constant_loss(reference[k:], H) for H in entropies], [own_loss, *unknown[1:]]
        if not same_frozen(model[k:], reference[k:]):  # neither the model's layers nor its decoder are in V
            deeper = own = unknown
        known = [of_split, deeper, constants, own]
        bounds[k] = deeper = [min(filter(isfinite, values), default=nan) for values in zip(*known, strict=True)]
        after = k
    return bounds


def constant_loss(decoder: nn.Sequential, entropy: float) -> float:
    """The least loss of the constants that the decoder can be, for a labeling of that entropy, nats."""
    last = heads.leaves(decoder)[-1]
    if heads.kind(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return inf
    return log(last.out_features) if last.bias is None else entropy


def beaten(measured: Iterable[Head]) -> float:
    """The share of the heads that are known not to have been found: a decoder exists that does better."""
    above = [not head.loss - head.bound <= BEATEN for head in measured]  # a loss that is NaN, too
    return sum(above) / len(above)


def same_frozen(own: nn.Module, constructed: nn.Module) -> bool:
    """Whether all parameters that are frozen as constructed have the model's own values."""
    values = dict(own.named_parameters())
    return all(p.requires_grad or torch.equal(p, values[name].to(p)) for name, p in constructed.named_parameters())


def shared(first: nn.Module, second: nn.Module) -> bool:
    """Whether any parameter is in both."""
    return not set(first.parameters()).isdisjoint(second.parameters())


@torch.no_grad()
def own_loss(model: nn.Sequential, splits: list[int], inputs: heads.Encoder, labels: Tensor, batch_size: int) -> float:
    """The mean cross-entropy of the model itself, in eval mode, nats.

    Raises ValueError where the encodings of a split or the outputs are not finite.
    """
    total = torch.zeros((), dtype=torch.float64, device=labels.device)
    infinite = torch.zeros(len(model), dtype=torch.int64, device=labels.device)  # batches, of each block's inputs
    for indices in ranks.share(torch.arange(len(labels), device=labels.device).split(batch_size)):
        z = inputs(indices)
        for k, block in enumerate(model):
            if k in splits:
                infinite[k] += ~z.isfinite().all()
            z = block(z)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        total += F.cross_entropy(z, labels[indices], reduction="sum")
    ranks.add_up(total, infinite)
    if infinite.any():
        raise ValueError(f"DIB: the encodings of split {infinite.nonzero()[0].item()} are not finite on these samples")
    if not total.isfinite():
        raise ValueError("DIB: the outputs of the model are not finite on these samples")
    return total.item() / len(labels)


def stream(*words: object) -> int:
    """The number that seeds a random stream: words name its purpose and what it depends on."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big")
