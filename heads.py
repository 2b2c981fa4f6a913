"""How many decoders are trained at once: fully connected ones stacked, a product a layer, others one by one.

Heads are independent: each becomes what it would be alone, from the same start and on the same batches.
"""

import copy
from collections.abc import Callable, Iterable
from functools import partial
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)


def groups(model: nn.Sequential, ks: list[int]) -> list[list[int]]:
    """The splits whose heads are trained by one optimizer: each alone, but the plain ones, the deepest, together."""
    plain = [k for k in ks if is_plain(model[k:])]
    return [[k] for k in ks if k not in plain] + [plain] * bool(plain)


def encoder(blocks: nn.Sequential, source: Callable, batches: tuple[Tensor, ...], keep_bytes: int) -> Callable:
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
    every_head = [head for of_split in heads.values() for head in of_split]
    labels = torch.stack([target for k in heads for target in targets[k]])  # (H, N)
    H, N = labels.shape
    if is_plain(every_head[0]):
        params = stack_parameters(every_head)
        forward, trained = partial(stacked, heads, params), params.values()
    else:
        (forward,) = (partial(one_by_one, of_split) for of_split in heads.values())
        trained = [p for head in every_head for p in head.parameters()]
    stepper = optimizer([p for p in trained if p.requires_grad])

    def losses(indices: Tensor) -> Tensor:
        logits = forward({k: encode(indices) for k, encode in encoders.items()})  # (H, C, B)
        return F.cross_entropy(logits, labels[:, indices], reduction="none").mean(1)

    for head in every_head:
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

    for head in every_head:
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
