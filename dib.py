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
from torch.func import stack_module_state
from tqdm import tqdm

from relabel import relabel

KEEP_BYTES = 4 * 2**30  # encodings kept; larger ones are computed again at every step

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)


class Head(NamedTuple):
    permutation: int  # of the enumeration of each class: 0 is data order
    labeling: int | str  # the digit, 0 .. D - 1, or "y" for the original labels
    entropy: float  # H of the labeling, nats
    loss: float  # mean cross-entropy over the split with the final weights in eval mode, nats
    drop: float  # fall of the running training loss over the last tenth of the epochs, nats; NaN after one epoch


def measure(
    model: nn.Sequential,
    k: int,
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
) -> list[Head]:
    """The trained heads of the split at k: the original labels first, then every digit of every enumeration.

    split: len(), .labels (N,) int64, .batch(indices) -> (inputs, labels). fresh builds the whole model anew, exactly as
    at construction, from torch's global generators, which are seeded here and put back. optimizer makes an optimizer,
    which must act elementwise (SGD, Adam, AdamW), of a list of parameters. labelings counts the enumerations of each
    class: the first in data order, the others in random orders that depend on seed alone. The heads' initial weights
    and batches depend on seed, model_epoch and k. All heads see the same batches; each becomes what it would be alone.
    The model, its modes and gradients and all global random states are left as they were.
    Raises ValueError for epochs or labelings below 1, a k that leaves no decoder, and what relabel refuses.
    """
    for name, value in {"epochs": epochs, "labelings": labelings}.items():
        if value < 1:
            raise ValueError(f"DIB: {name} must be at least 1, got {value}")
    if not 0 <= k < len(model):
        raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k}")
    device = split.labels.device
    keys, targets = label(split.labels, num_classes, labelings, seed)
    encode = _encoder(model, k, split, batch_size, keep_bytes)
    draws = int(np.random.SeedSequence((seed, model_epoch, k)).generate_state(1)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(draws)
        if device.type == "cuda":
            torch.cuda.manual_seed(draws)
        heads = [fresh()[k:].to(device) for _ in keys]
        loss, drop = train(heads, encode, targets, optimizer, epochs, batch_size, torch.Generator().manual_seed(draws))
    entropies = [entropy(target, num_classes) for target in targets]
    return [Head(*key, *values) for key, *values in zip(keys, entropies, loss.tolist(), drop.tolist(), strict=True)]


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
    heads: list[nn.Sequential],
    encode: Callable[[Tensor], Tensor],
    targets: Tensor,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
    epochs: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Train each head j of J on the encodings encode(indices) and targets[j] (N,); final losses and drops (J,) float64.

    One optimizer holds the parameters of all heads. Summing their losses gives each head its own gradients.
    """
    J, N = targets.shape
    if is_plain(heads[0]):
        params, _ = stack_module_state(heads)  # plain heads have no buffers
        forward, trained = partial(batched, heads[0], params), params.values()
    else:
        forward, trained = partial(one_by_one, heads), [p for head in heads for p in head.parameters()]
    stepper = optimizer([p for p in trained if p.requires_grad])

    def losses(indices: Tensor) -> Tensor:
        logits = forward(encode(indices))  # (J, C, B)
        return F.cross_entropy(logits, targets[:, indices], reduction="none").mean(1)  # (J,)

    for head in heads:
        head.train()
    running = torch.zeros(epochs, J, dtype=torch.float64, device=targets.device)
    for epoch in tqdm(range(epochs), "DIB heads", leave=False, disable=None, delay=1):
        order = torch.randperm(N, generator=generator).to(targets.device)
        for indices in order.tensor_split(ceil(N / batch_size)):  # even, as BatchNorm cannot train on one sample
            loss = losses(indices)
            stepper.zero_grad()
            loss.sum().backward()
            stepper.step()
            running[epoch] += loss.detach() * len(indices) / N

    for head in heads:
        head.eval()
    final = torch.zeros(J, dtype=torch.float64, device=targets.device)
    with torch.no_grad():
        for indices in torch.arange(N, device=targets.device).split(batch_size):
            final += losses(indices) * len(indices) / N
    tenth = max(1, epochs // 10)
    drop = running[-1 - tenth] - running[-1] if epochs > 1 else torch.full_like(final, float("nan"))
    return final, drop


def is_plain(decoder: nn.Sequential) -> bool:
    """Whether batched can run the decoder: linear layers and elementwise functions one after another, each once."""
    layers = [m for _, m in decoder.named_modules(remove_duplicate=False) if not isinstance(m, nn.Sequential)]
    return len(set(layers)) == len(layers) and all(
        isinstance(m, (nn.Linear, *ELEMENTWISE)) for m in layers[isinstance(layers[0], nn.Flatten) :]
    )


def batched(decoder: nn.Sequential, params: dict[str, Tensor], x: Tensor) -> Tensor:
    """Logits (J, C, B) of plain heads on the encodings x (B, ...): the products of all heads at once, samples last.

    decoder: any of the heads, for its layers; params: their parameters, stacked along a first dimension of J.
    """
    z = x.flatten(1).T  # (d, B), the same for all heads
    for name, layer in decoder.named_modules():
        if isinstance(layer, nn.Linear):
            z = params[f"{name}.weight"] @ z  # (J, out, in) @ (J, in, B)
            if layer.bias is not None:
                z = z + params[f"{name}.bias"][:, :, None]
        elif isinstance(layer, ELEMENTWISE):
            z = layer(z)
    return z


def one_by_one(heads: list[nn.Sequential], x: Tensor) -> Tensor:
    """Logits (J, C, B) of any heads on the encodings x (B, ...): the plain reference, a loop over the heads.

    Layers that draw (stochastic depth) draw the same for every head, what a head alone would draw.
    """
    source = torch.cuda if x.is_cuda else torch
    state, logits = source.get_rng_state(), []
    for head in heads:
        source.set_rng_state(state)
        logits.append(head(x.clone()).T)  # a copy: the first layer may work in place
    return torch.stack(logits)


def _encoder(model: nn.Sequential, k: int, split, batch_size: int, keep_bytes: int) -> Callable[[Tensor], Tensor]:
    """indices (B,) -> E(x) (B, ...): computed once for the whole split if that fits keep_bytes, else at every call."""
    encoder = copy.deepcopy(model[:k]).eval()  # a copy: the model's own modes stay as they are

    @torch.no_grad()
    def encode(indices: Tensor) -> Tensor:
        return encoder(split.batch(indices)[0])

    everything = torch.arange(len(split), device=split.labels.device)
    one = encode(everything[:1])
    if len(split) * one.nbytes > keep_bytes:
        return encode
    layout = torch.channels_last if one.dim() == 4 else torch.contiguous_format
    shape = (len(split), *one.shape[1:])
    kept = torch.empty(shape, dtype=one.dtype, device=one.device, memory_format=layout)
    for indices in everything.split(batch_size):
        kept[indices] = encode(indices)
    return lambda indices: kept[indices]
