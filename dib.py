"""DIB: the decodable (V-) information that an encoder leaves to the decoders of its own architecture.

For a split of a model into encoder E = model[:k] and decoder D = model[k:], E is frozen with the weights it has. For
each labeling of the samples a head, a copy of D initialised anew, is trained on E(x) with cross-entropy; its final loss
is an upper bound on H_V(labeling | E(x)), so that

    H(labeling) - loss,   H the empirical entropy of the labeling, in nats,

is the information about the labeling that a decoder can use. Averaged over the labelings of relabel.py, which tell
apart the samples of a class, it is the minimality; for the original labels it is the sufficiency (Dubois et al.,
NeurIPS 2020, arXiv 2009.12789). Heads that have not settled understate it: `drop` tells.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import heads
import ranks
from relabel import relabel

KEEP_BYTES = 4 * 2**30  # encodings kept; larger ones are computed again at every step


class Head(NamedTuple):
    permutation: int  # of the enumeration of each class: 0 is data order
    labeling: int | str  # the digit, 0 .. D - 1, or "y" for the original labels
    entropy: float  # H of the labeling, nats
    loss: float  # mean cross-entropy over the split with the final weights in eval mode, nats
    drop: float  # fall of the running training loss over the last tenth of the epochs, nats; NaN after one epoch


def measure(model: nn.Sequential, k: int, split, *rest, **options) -> list[Head]:
    """The trained heads of the split at k alone: measure_splits has the parameters."""
    return measure_splits(model, [k], split, *rest, **options)[k]


def measure_splits(
    model: nn.Sequential,
    ks: Iterable[int],
    split,
    num_classes: int,
    fresh: Callable[[], nn.Sequential],
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    epochs: int = 30,
    batch_size: int = 400,
    labelings: int = 1,
    seed: int = 0,
    model_epoch: int = 0,
    keep_bytes: int = KEEP_BYTES,
) -> dict[int, list[Head]]:
    """{k: the trained heads of the split at k}: the original labels first, then every digit of every enumeration.

    split: len(), .labels (N,) int64, .batch(indices) -> (inputs, labels). fresh builds the whole model anew, exactly as
    at construction, from torch's global generators, which are seeded here and put back. optimizer makes an optimizer,
    which must act elementwise (SGD, Adam, AdamW), of a list of parameters. labelings counts the enumerations of each
    class: the first in data order, the others in random orders that depend on seed alone. The heads' initial weights
    depend on seed, model_epoch, k and their labeling, their batches on seed and model_epoch: all heads see the same
    batches, and each becomes what it would be alone. keep_bytes bounds the encodings kept at a time, beside those they
    are made from. Processes that torchrun started share the heads, and must all call.
    The model, its modes and gradients and all global random states are left as they were.
    Raises ValueError for epochs or labelings below 1, a k that leaves no decoder, and what relabel refuses.
    """
    for name, value in {"epochs": epochs, "labelings": labelings}.items():
        if value < 1:
            raise ValueError(f"DIB: {name} must be at least 1, got {value}")
    splits = sorted(set(ks))
    for k in splits:
        if not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k}")
    keys, targets = label(split.labels, num_classes, labelings, seed)
    device = split.labels.device
    cuda = [device] if device.type == "cuda" else []
    batches = torch.arange(len(split), device=device).split(batch_size)
    here = heads_here(model, splits, len(keys), split)
    results = torch.zeros(len(splits), len(keys), 2, dtype=torch.float64, device=device)  # loss and drop
    encode, depth = lambda indices: split.batch(indices)[0], 0
    for group in heads.groups(model, sorted({k for k, _ in here})):
        encoders = {}
        for k in group:  # each encoder goes on from the encodings of the split before
            encode, depth = heads.encoder(model[depth:k], encode, batches, keep_bytes // len(group)), k
            encoders[k] = encode
        members = [(k, j) for k, j in here if k in group]
        starts, targets_of = {k: [] for k in group}, {k: [] for k in group}
        with torch.random.fork_rng(devices=cuda):
            for k, j in members:
                _seed(cuda, seed, model_epoch, k, j)
                starts[k].append(fresh()[k:].to(device))
                targets_of[k].append(targets[j])
            _seed(cuda, seed, model_epoch)
            generator = torch.Generator().manual_seed(_number(seed, model_epoch))
            losses, drops = heads.train(starts, encoders, targets_of, optimizer, epochs, batch_size, generator)
        for (k, j), *result in zip(members, losses, drops, strict=True):
            results[splits.index(k), j] = torch.stack(result)
    ranks.add_up(results)
    entropies = [entropy(target, num_classes) for target in targets]
    return {
        k: [Head(*key, *rest, *result) for key, *rest, result in zip(keys, entropies, of_split, strict=True)]
        for k, of_split in zip(splits, results.tolist(), strict=True)
    }


def heads_here(model: nn.Sequential, splits: list[int], J: int, split) -> list[tuple[int, int]]:
    """The heads (k, j), J of each split k, that this process trains: all, or its share of what several processes do."""
    if ranks.world() == 1:
        return [(k, j) for k in splits for j in range(J)]
    x, _ = split.batch(torch.arange(1, device=split.labels.device))
    return ranks.deal(heads.costs(model, splits, x), J, ranks.world())[ranks.rank()]


def _number(*parts: int) -> int:
    """A seed that depends on all parts; numpy keeps it the same from version to version."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _seed(cuda: list[torch.device], *parts: int) -> None:
    """Seed torch's global generator on the CPU and on the device in use, and on no other."""
    number = _number(*parts)
    torch.default_generator.manual_seed(number)
    if cuda:
        torch.cuda.manual_seed(number)


def label(labels: Tensor, num_classes: int, labelings: int, seed: int) -> tuple[list[tuple[int, int | str]], Tensor]:
    """[(permutation, labeling), ...] and the targets (J, N): the labels, then the digits of each enumeration."""
    keys, targets = [(0, "y")], [labels]
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(len(labels), device=labels.device)
    for permutation in range(labelings):
        digits = relabel(labels[order], num_classes)[order.argsort()]  # (N, D), back in data order
        keys += [(permutation, k) for k in range(digits.shape[1])]
        targets += digits.T
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
    return keys, torch.stack(targets)


def entropy(labels: Tensor, num_classes: int) -> float:
    """-sum_c p_c log p_c of the empirical distribution of labels (N,), in nats."""
    p = torch.bincount(labels, minlength=num_classes).double() / len(labels)  # (C,)
    return torch.special.entr(p).sum().item()
