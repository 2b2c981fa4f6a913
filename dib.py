"""DIB: the decodable (V-) information that an encoder leaves to the decoders of its own architecture.

For a split of a model into encoder E = model[:k] and decoder D = model[k:], E is frozen with the weights it has. For
each labeling of the samples a head, a copy of D initialised anew, is trained on E(x) with cross-entropy; its final loss
is an upper bound on H_V(labeling | E(x)), so that

    H(labeling) - loss,   H the empirical entropy of the labeling, in nats,

is the information about the labeling that a decoder can use. Averaged over the labelings of relabel.py, which tell
apart the samples of a class, it is the minimality; for the original labels it is the sufficiency (Dubois et al.,
NeurIPS 2020, arXiv 2009.12789). Heads that have not settled understate it: `drop` tells.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import ranks
from relabel import relabel

KEEP_BYTES = 4 * 2**30  # encodings kept; larger ones are computed again at every step

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)


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
    ks = sorted(set(ks))
    for k in ks:
        if not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k}")
    keys, targets = label(split.labels, num_classes, labelings, seed)
    entropies = [entropy(target, num_classes) for target in targets]
    cuda = [split.labels.device] if split.labels.is_cuda else []
    everything = torch.arange(len(split), device=split.labels.device)
    mine = [(k, j) for k in ks for j in range(len(keys))]
    if ranks.world() > 1:
        mine = deal(costs(model, ks, split.batch(everything[:1])[0]), len(keys), ranks.world())[ranks.rank()]
    results = torch.zeros(len(ks), len(keys), 2, dtype=torch.float64, device=split.labels.device)  # loss and drop
    encode, done = lambda indices: split.batch(indices)[0], 0
    for group in _groups(model, sorted({k for k, _ in mine})):
        encoders = {}
        for k in group:  # each encoder goes on from the encodings of the split before
            encode, done = _encoder(model[done:k], encode, everything.split(batch_size), keep_bytes // len(group)), k
            encoders[k] = encode
        members = [(k, j) for k, j in mine if k in group]
        heads, labels_of = {k: [] for k in group}, {k: [] for k in group}
        with torch.random.fork_rng(devices=cuda):
            for k, j in members:
                _seed(cuda, seed, model_epoch, k, j)
                heads[k].append(fresh()[k:].to(split.labels.device))
                labels_of[k].append(targets[j])
            _seed(cuda, seed, model_epoch)
            batches = torch.Generator().manual_seed(_number(seed, model_epoch))
            losses, drops = train(heads, encoders, labels_of, optimizer, epochs, batch_size, batches)
        for (k, j), *result in zip(members, losses, drops, strict=True):
            results[ks.index(k), j] = torch.stack(result)
    ranks.add_up(results)
    return {
        k: [Head(*key, *rest, *result) for key, *rest, result in zip(keys, entropies, of_split, strict=True)]
        for k, of_split in zip(ks, results.tolist(), strict=True)
    }


def _groups(model: nn.Sequential, ks: list[int]) -> list[list[int]]:
    """The splits whose heads are trained by one optimizer: each alone, but the plain ones, the deepest, together."""
    plain = [k for k in ks if is_plain(model[k:])]
    return [[k] for k in ks if k not in plain] + [plain] * bool(plain)


def costs(model: nn.Sequential, ks: list[int], x: Tensor) -> dict[int, float]:
    """An estimate, without unit, of what a head of each split costs, from the inputs x (1, ...) of one sample.

    The numbers that its layers read and write, which is what small layers cost, and their multiply-adds, of which a
    processor does some forty while it fetches a number.
    """
    of_block = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = getattr(module, "weight", None)
        products = weight.numel() / len(weight) * output.numel() if weight is not None else 0
        of_block[-1] += inputs[0].numel() + output.numel() + products / 40

    blocks = copy.deepcopy(model).eval()
    for module in blocks.modules():
        if not list(module.children()):
            module.register_forward_hook(hook)
    with torch.no_grad():
        for block in blocks:
            of_block.append(0.0)
            x = block(x)
    return {k: sum(of_block[k:]) for k in ks}


def deal(costs: dict[int, float], J: int, world: int) -> list[list[tuple[int, int]]]:
    """The heads (k, j), J of each split k, that each process trains: every head once, about the same cost for each.

    The heads of a split stay together as far as a tenth more than a fair share allows: they share products and encoder.
    """
    hands, loads = [[] for _ in range(world)], [0.0] * world
    most = 1.1 * J * sum(costs.values()) / world
    for k, cost in sorted(costs.items(), key=lambda item: -item[1]):
        j = 0
        while j < J:
            idlest = loads.index(min(loads))
            count = min(J - j, max(1, int((most - loads[idlest]) / cost)))
            hands[idlest] += [(k, i) for i in range(j, j + count)]
            loads[idlest] += count * cost
            j += count
    return [sorted(hand) for hand in hands]


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


def train(
    heads: dict[int, list[nn.Sequential]],
    encoders: dict[int, Callable[[Tensor], Tensor]],
    targets: dict[int, list[Tensor]],
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train H heads of one or several splits; the final loss and the drop of each, (H,) float64, split by split.

    Head heads[k][j] sees the encodings encoders[k](indices) and targets[k][j] (N,). One optimizer holds the parameters
    of all heads; the sum of their losses gives each its own gradients. Heads that are not plain come one split a call.
    """
    everyone = [head for of_split in heads.values() for head in of_split]
    labels = torch.stack([target for k in heads for target in targets[k]])  # (H, N)
    H, N = labels.shape
    if is_plain(everyone[0]):
        params = stack_parameters(everyone)
        forward, trained = partial(stacked, heads, params), params.values()
    else:
        (forward,) = (partial(one_by_one, of_split) for of_split in heads.values())
        trained = [p for head in everyone for p in head.parameters()]
    stepper = optimizer([p for p in trained if p.requires_grad])

    def losses(indices: Tensor) -> Tensor:
        logits = forward({k: encode(indices) for k, encode in encoders.items()})  # (H, C, B)
        return F.cross_entropy(logits, labels[:, indices], reduction="none").mean(1)

    for head in everyone:
        head.train()
    running = torch.zeros(epochs, H, dtype=torch.float64, device=labels.device)
    for epoch in tqdm(range(epochs), "DIB heads", leave=False, disable=None, delay=1):
        order = torch.randperm(N, generator=generator).to(labels.device)
        for indices in order.tensor_split(ceil(N / batch_size)):  # even, as BatchNorm cannot train on one sample
            loss = losses(indices)
            stepper.zero_grad()
            loss.sum().backward()
            stepper.step()
            running[epoch] += loss.detach() * len(indices) / N

    for head in everyone:
        head.eval()
    final = torch.zeros(H, dtype=torch.float64, device=labels.device)
    with torch.no_grad():
        for indices in torch.arange(N, device=labels.device).split(batch_size):
            final += losses(indices) * len(indices) / N
    tenth = max(1, epochs // 10)
    drop = running[-1 - tenth] - running[-1] if epochs > 1 else torch.full_like(final, float("nan"))
    return final, drop


def is_plain(decoder: nn.Sequential) -> bool:
    """Whether stacked can run the decoder: linear layers and elementwise functions one after another, each once."""
    layers = [m for _, m in decoder.named_modules(remove_duplicate=False) if not isinstance(m, nn.Sequential)]
    return len(set(layers)) == len(layers) and all(
        isinstance(m, (nn.Linear, *ELEMENTWISE)) for m in layers[isinstance(layers[0], nn.Flatten) :]
    )


def stack_parameters(heads: list[nn.Sequential]) -> dict[str, Tensor]:
    """{name: the parameters of that name of all heads that have one, (heads, ...)}; the first head has every name."""
    owned = [dict(head.named_parameters()) for head in heads]
    stacks = {name: torch.stack([own[name].detach() for own in owned if name in own]) for name in owned[0]}
    return {name: stack.requires_grad_(owned[0][name].requires_grad) for name, stack in stacks.items()}


def stacked(heads: dict[int, list[nn.Sequential]], params: dict[str, Tensor], encodings: dict[int, Tensor]) -> Tensor:
    """Logits (H, C, B) of H plain heads of one or several splits on the encodings {k: (B, ...)}: a product a layer.

    Block by block from the first split on: the heads of a split join where their decoder begins, and from there on run
    beside those that came before. Samples stand last, so that a layer is weights (heads, out, in) times activations
    (heads, in, B). params: the heads' parameters, as stack_parameters gives them for the splits in order.
    """
    (first, of_first), z = next(iter(heads.items())), None
    for k, (block_name, block) in enumerate(of_first[0].named_children(), first):
        if k in encodings:
            entering = encodings[k].flatten(1).T.expand(len(heads[k]), -1, -1)  # (J, d, B)
            z = entering if z is None else torch.cat([z, entering])
        for name, layer in block.named_modules(prefix=block_name):
            if isinstance(layer, nn.Linear):
                weight, bias = params[f"{name}.weight"], params.get(f"{name}.bias")
                z = weight @ z if bias is None else torch.baddbmm(bias[:, :, None], weight, z)
            elif isinstance(layer, ELEMENTWISE):
                z = layer(z)
    return z


def one_by_one(heads: list[nn.Sequential], encodings: dict[int, Tensor]) -> Tensor:
    """Logits (J, C, B) of any heads of one split on its encodings {k: (B, ...)}: the plain reference, a loop.

    Layers that draw (stochastic depth) draw the same for every head, what a head alone would draw.
    """
    (x,) = encodings.values()
    source = torch.cuda if x.is_cuda else torch
    state, logits = source.get_rng_state(), []
    for head in heads:
        source.set_rng_state(state)
        logits.append(head(x.clone()).T)  # a copy: the first layer may work in place
    return torch.stack(logits)


def _encoder(blocks: nn.Sequential, source: Callable, batches: tuple[Tensor, ...], keep_bytes: int) -> Callable:
    """indices (B,) -> blocks(source(indices)), (B, ...): computed once for all batches if that fits keep_bytes."""
    blocks = copy.deepcopy(blocks).eval()  # a copy: the model's own modes stay as they are

    @torch.no_grad()
    def encode(indices: Tensor) -> Tensor:
        return blocks(source(indices))

    one, N = encode(batches[0][:1]), sum(map(len, batches))
    if N * one.nbytes > keep_bytes:
        return encode
    layout = torch.channels_last if one.dim() == 4 else torch.contiguous_format
    kept = torch.empty((N, *one.shape[1:]), dtype=one.dtype, device=one.device, memory_format=layout)
    for indices in batches:
        kept[indices] = encode(indices)
    return lambda indices: kept[indices]
