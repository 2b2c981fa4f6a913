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

measure gives losses and bounds; whoever draws them (analysis/tables.py) takes the differences and their means.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from math import inf, isfinite, log, nan
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
def measure_splits(
    model: nn.Sequential,
    ks: Iterable[int],
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

    samples: len(), .labels (N,) int64, .batch(indices) -> (inputs, labels). fresh builds the whole model anew, exactly
    as at construction, from torch's global generators. recipe: how heads are trained, by default Tuned with the steps
    of 30 epochs. labelings counts the enumerations of each class: the first in data order, the others in random orders
    that depend on seed alone. Heads draw their weights by seed, model_epoch, k and their labeling, their batches, the
    same for all, by seed and model_epoch. On CUDA fresh() is called with that device as torch's default, so weights are
    drawn there, others than on a CPU, and heads may take their steps in bfloat16 (heads.BFLOAT16_ON). batch_size is
    that of training and of every pass. keep_bytes bounds the encodings that are kept; beyond it they are computed again
    at every step. Processes that torchrun started share the heads, and must all call.
    The model, its modes and gradients and all global random states are left as they were.
    Raises ValueError for labelings below 1, a k that leaves no decoder to train, outputs that are not finite, frozen
    parameters that differ from those of fresh(), and what relabel refuses.
    """
    if labelings < 1:
        raise ValueError(f"DIB: labelings must be at least 1, got {labelings}")
    splits = sorted(set(ks))
    for k in splits:
        if not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k}")
    keys, targets = label(samples.labels, num_classes, labelings, seed)
    device = samples.labels.device
    cuda = [device] if device.type == "cuda" else []

    def seeded(*words: object) -> torch.Generator:
        number = stream(*words, seed, model_epoch)
        torch.default_generator.manual_seed(number)
        if cuda:
            torch.cuda.manual_seed(number)
        return torch.Generator().manual_seed(number)

    def new_head(k: int, *which: object) -> nn.Sequential:
        seeded(*which, k)
        with device if cuda else nullcontext():  # made on a CPU and copied, heads cost minutes a run
            return fresh()[k:].to(device)

    own = own_loss(model, samples, batch_size)
    if not isfinite(own):
        raise ValueError("DIB: the outputs of the model are not finite on these samples")
    recipe = recipe or heads.Tuned(heads.steps(30, len(samples)))
    current = torch.cuda.device(device) if cuda else nullcontext()  # where CUDA's generator is seeded
    with current, torch.random.fork_rng(devices=cuda):
        reference = new_head(0, "reference")
        refuse_decoders(model, reference, splits)
        losses = heads.find(
            model, splits, samples, targets, reference, new_head, seeded, recipe, batch_size, keep_bytes
        )
    entropies = [entropy(target, num_classes) for target in targets]
    bounds = bound(reference, splits, losses.tolist(), entropies, own)
    return {
        k: [Head(*key, *rest) for key, *rest in zip(keys, entropies, of_split, bounds[k], strict=True)]
        for k, of_split in zip(splits, losses.tolist(), strict=True)
    }


def refuse_decoders(model: nn.Sequential, reference: nn.Sequential, splits: list[int]) -> None:
    """ValueError where there is nothing to train, or decoders as constructed are not those of this model."""
    for k in splits:
        if not any(p.requires_grad for p in reference[k:].parameters()):
            raise ValueError(f"DIB: the decoder model[{k}:] has no parameters to train")
    own = dict(model[splits[0] :].named_parameters())
    for name, p in reference[splits[0] :].named_parameters():
        if not p.requires_grad and not torch.equal(p, own[name]):
            raise ValueError(f"DIB: fresh() gives the frozen parameter {name} other values than the model has")


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
    reference: nn.Sequential, splits: list[int], losses: list[list[float]], entropies: list[float], own_loss: float
) -> dict[int, list[float]]:
    """{k: the least that is known of H_V of each labeling}, from the losses of all splits, in nats.

    reference: a model as constructed. The labelings are those of the losses, the original labels first. own_loss is
    that of the network itself.
    """
    bounds, deeper, after = {}, [inf] * len(entropies), None
    for k, of_split in zip(reversed(splits), reversed(losses), strict=True):
        if after and shared(reference[k:after], reference[after:]):  # parameters: such layers cannot stay as they are
            deeper = [inf] * len(entropies)
        constants = [constant_loss(reference[k:], H) for H in entropies]
        known = [of_split, deeper, constants, [own_loss] + [inf] * (len(entropies) - 1)]
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


def shared(first: nn.Module, second: nn.Module) -> bool:
    """Whether any parameter is in both."""
    return not set(first.parameters()).isdisjoint(second.parameters())


@torch.no_grad()
def own_loss(model: nn.Sequential, samples, batch_size: int) -> float:
    """The mean cross-entropy of the model itself over the samples, in eval mode, nats."""
    model = copy.deepcopy(model).eval()
    total = torch.zeros((), dtype=torch.float64, device=samples.labels.device)
    for indices in ranks.share(torch.arange(len(samples), device=total.device).split(batch_size)):
        x, y = samples.batch(indices)
        total += F.cross_entropy(model(x), y, reduction="sum")
    ranks.add_up(total)
    return total.item() / len(samples)


def stream(*words: object) -> int:
    """The number that seeds a random stream: words name its purpose and what it depends on."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big")
