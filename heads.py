"""How decoders are trained, many at once: found for dib.py, which says what is measured with them.

A recipe is Tuned, which looks for the least loss, or Thesis, the algorithm as first written. Heads are independent:
each becomes what it would be alone, from the same start and on the same batches. They train together in a Bundle: fully
connected ones stacked, a product a layer, others one by one.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, islice, takewhile
from math import ceil, log
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torchvision.models.convnext import LayerNorm2d
from tqdm import tqdm

import devices
import ranks

BATCH = 400  # samples in a step of tuned heads
OPTIMUM_BYTES = 4 * 2**30  # of the features of a linear decoder
RATE = 0.2  # of tuned heads, relative to the sizes of their parameters
LEAST_BATCHES = 20  # of an epoch of tuned heads, however small the set

ELEMENTWISE = (nn.Identity, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)
NORMS = (nn.LayerNorm, LayerNorm2d, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)

Encoder = Callable[[Tensor], Tensor]  # indices (B,) -> encodings (B, ...)


def steps(epochs: int, N: int) -> int:
    """The steps of tuned heads in so many epochs of N samples."""
    return epochs * max(LEAST_BATCHES, ceil(N / BATCH))


def kind(module: nn.Module) -> type | None:
    """The type of a module that does what its type does; none, if a hook or a forward of its own makes it another."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    own = any(hooks) or "forward" in vars(module) or _has_any_global_hook()
    return None if own else type(module)


def leaves(decoder: nn.Module) -> list[nn.Module]:
    """The layers one after another, with Sequentials inside Sequentials opened."""
    return [leaf for child in decoder for leaf in leaves(child)] if kind(decoder) is nn.Sequential else [decoder]


def flattens(layer: nn.Module) -> bool:
    """Whether the layer makes vectors of the samples."""
    return kind(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1)


def trains(decoder: nn.Module) -> bool:
    """Whether there is anything to train."""
    return any(p.requires_grad for p in decoder.parameters())


def repeats(decoder: nn.Module) -> bool:
    """Whether any parameter of the decoder is in two places."""
    places = [p for _, p in decoder.named_parameters(remove_duplicate=False)]
    return len(set(places)) < len(places)


def find(
    model: nn.Sequential,
    splits: list[int],
    inputs: Encoder,
    targets: Tensor,
    reference: nn.Sequential,
    new_head: Callable[..., nn.Sequential],
    seeded: Callable[..., torch.Generator],
    recipe: "Thesis | Tuned",
    batch_size: int,
    keep_bytes: int,
) -> Tensor:
    """The losses that heads of every split reach for each of the targets (J, N): (splits, J) float64, in nats.

    inputs: indices (B,) -> the model's inputs (B, ...). reference: a model as constructed: how decoders are made, and
    how large their parameters are. Both models are in eval mode. new_head(k, *which) constructs a decoder of split k.
    seeded(*words) seeds torch's global generators, and returns one of its own. Processes that torchrun started share
    the heads, and must all call.
    """
    batches = torch.arange(targets.shape[1], device=targets.device).split(batch_size)
    sizes = parameter_sizes(reference)
    optimal = {k for k in splits if recipe.optimal and optimum_fits(reference[k:], targets.shape[1])}
    here = heads_here(reference, splits, len(targets), in_dtype_of(reference, inputs)(batches[0][:1]))
    losses = torch.zeros(len(splits), len(targets), dtype=torch.float64, device=targets.device)
    encode, depth = inputs, 0
    for group in groups(reference, sorted({k for k, _ in here}), optimal):
        encoders = {}
        if group[0] < depth:  # plain splits before and after one that is not
            encode, depth = inputs, 0
        for k in group:  # each encoder goes on from the encodings of the split before
            encode, depth = encoder(model[depth:k], encode, batches, keep_bytes // len(group)), k
            encoders[k] = in_dtype_of(reference[k:], encode)
        members = [(k, j) for k, j in here if k in group]
        if group[0] in optimal:
            found = optima(reference[group[0] :], encoders[group[0]], batches, targets[[j for _, j in members]])
        else:
            made, learns = {k: [] for k in group}, {k: [] for k in group}
            for k, j in members:
                starts = range(recipe.starts(reference[k:]))
                made[k] += [new_head(k, "head", j, start) for start in starts]
                learns[k] += [j for _ in starts]
            if recipe.standardised:
                encoders = {k: standardised(reference[k:], encoders[k], batches) for k in group}
            bundle = Bundle(made, encoders, targets, learns, recipe.bfloat16)
            if trains(reference[group[0] :]):
                found = recipe.train(bundle, sizes, batch_size, seeded("batches"))
            else:  # a fixed classifier is what it is
                found = bundle.exact_losses(batch_size)
        for (k, j), loss in zip(members, found, strict=True):
            losses[splits.index(k), j] = loss
    ranks.add_up(losses)
    return losses


def heads_here(reference: nn.Sequential, splits: list[int], J: int, x: Tensor) -> list[tuple[int, int]]:
    """The heads (k, j), J of each split k, that this process trains: all, or its share of what several processes do.

    x: the inputs of one sample.
    """
    if ranks.world() == 1:
        return [(k, j) for k in splits for j in range(J)]
    return ranks.deal(costs(reference, splits, x), J, ranks.world())[ranks.rank()]


def groups(reference: nn.Sequential, splits: list[int], optimal: set[int]) -> list[list[int]]:
    """The splits, in order of depth, whose heads are found together: each alone, but all that are plain and trained."""
    plain = [k for k in splits if is_plain(reference[k:]) and k not in optimal]
    return sorted([[k] for k in splits if k not in plain] + [plain] * bool(plain))


class Bundle:
    """Heads of one or several splits that take their steps together; the sum of their losses gives each its gradients.

    Head i of heads[k] learns targets[learns[k][i]], of targets (J, N), from encodings of encoders[k]. Splits are in
    order of depth; heads that are not plain come one split a bundle.
    """

    def __init__(
        self,
        heads: dict[int, list[nn.Sequential]],
        encoders: dict[int, Encoder],
        targets: Tensor,
        learns: dict[int, list[int]],
        bfloat16: bool = False,
    ):
        self.heads, self.encoders = heads, encoders
        self.targets = targets.T.contiguous()  # (N, J): a batch is rows, a tenth of the time of columns
        self.learns = torch.tensor([j for k in heads for j in learns[k]], device=targets.device)  # (H,)
        self.plain = is_plain(self.modules()[0])
        self.stacks = stack_parameters(self.modules()) if self.plain else {}
        self.autocast = autocast(bfloat16, self.modules()[0])
        self.draws: bool | None = None  # whether the heads draw random numbers: known from the first step on

    def modules(self) -> list[nn.Sequential]:
        return [head for of_split in self.heads.values() for head in of_split]

    def parameters(self) -> dict[str, list[Tensor]]:
        """{name: what is trained under that name}: one stack, or the parameter of each head."""
        found = {name: [stack] for name, stack in self.stacks.items()}
        for head in [] if self.plain else self.modules():
            for name, p in head.named_parameters():
                found.setdefault(name, []).append(p)
        return {name: those for name, those in found.items() if those[0].requires_grad}

    def losses(self, indices: Tensor) -> Tensor:
        """The mean cross-entropy of each head on these samples, (H,)."""
        encodings = {k: encode(indices) for k, encode in self.encoders.items()}
        labels = self.targets[indices].T[self.learns]  # (H, B)
        if self.plain:
            logits = stacked(self.heads, self.stacks, encodings)
        else:
            logits = one_by_one(self.modules(), encodings, self.draws)
        return F.cross_entropy(logits, labels, reduction="none").mean(1)  # of (H, C, B)

    def step(self, optimizer: torch.optim.Optimizer, indices: Tensor) -> Tensor:
        """One step of every head; the losses before it, (H,)."""
        source = torch.cuda if indices.is_cuda else torch
        before = source.get_rng_state() if self.draws is None else None
        with self.autocast():
            losses = self.losses(indices)
        if before is not None:
            self.draws = not torch.equal(before, source.get_rng_state())
        if losses.requires_grad:  # else no weight has a say in them
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        return losses.detach()

    def keep(self, rows: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Go on with these of the stacked heads, as many of each split, and with what the optimizer knows of them."""
        self.learns = self.learns[rows]
        self.heads = {
            k: of_split[: len(rows) * len(of_split) // len(self.modules())] for k, of_split in self.heads.items()
        }
        kept = {}
        for name, old in self.stacks.items():
            own = rows[rows < len(old)]  # the heads that have this layer come first
            self.stacks[name] = kept[old] = old.detach()[own].requires_grad_(old.requires_grad)
            if old in optimizer.state:
                of_old = optimizer.state.pop(old)
                optimizer.state[kept[old]] = {
                    key: value[own] if value.dim() else value for key, value in of_old.items()
                }
        for group in optimizer.param_groups:
            group["params"] = [kept[old] for old in group["params"]]

    def take_statistics(self, batches: Iterable[Tensor]) -> None:
        """Give every BatchNorm the mean statistics of these batches, with all other layers in eval mode."""
        norms = [layer for head in self.modules() for layer in head.eval().modules() if isinstance(layer, _BatchNorm)]
        for norm in norms:
            norm.reset_running_stats()
            norm.train()
        with torch.no_grad():
            for i, indices in enumerate(batches if norms else (), 1):
                for norm in norms:
                    norm.momentum = 1 / i  # a mean over all batches; with None a layer asks the device for their number
                self.losses(indices)

    @torch.no_grad()
    def exact_losses(self, batch_size: int) -> Tensor:
        """The loss of each head over all samples, in eval mode, (H,) float64."""
        for head in self.modules():
            head.eval()
        N, device = len(self.targets), self.targets.device
        total = torch.zeros(len(self.learns), dtype=torch.float64, device=device)
        for indices in torch.arange(N, device=device).split(batch_size):
            total += self.losses(indices) * len(indices) / N
        return total


def shuffled(N: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Batches of indices without end, pass after pass; even, as BatchNorm cannot train on a leftover of one sample."""
    while True:
        order = torch.randperm(N, generator=generator).to(device, non_blocking=True)
        yield from order.tensor_split(ceil(N / batch_size))


def bar(steps: int) -> Iterable[int]:
    return tqdm(range(steps), "DIB heads", leave=False, disable=None, delay=1)


@dataclass(frozen=True)
class Thesis:
    """The algorithm as first written: heads trained as the network is, from one start, with running statistics.

    optimizer makes an optimizer, which must act elementwise (SGD, Adam, AdamW), of a list of parameters. bfloat16:
    whether steps are in bfloat16 on CUDA, as the network's are by default. They never are in float16, whose losses have
    to be scaled: one scale for all, and steps left out, would make heads depend on each other.
    """

    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    epochs: int = 30
    bfloat16: bool = False

    standardised: ClassVar = False
    optimal: ClassVar = False

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"DIB: epochs must be at least 1, got {self.epochs}")

    def starts(self, decoder: nn.Sequential) -> int:
        return 1

    def train(self, bundle: Bundle, sizes: dict[str, float], batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss that each head reaches, (H,) float64."""
        optimizer = self.optimizer([p for those in bundle.parameters().values() for p in those])
        for head in bundle.modules():
            head.train()
        N = len(bundle.targets)
        batches = shuffled(N, batch_size, generator, bundle.targets.device)
        for _ in bar(self.epochs * ceil(N / batch_size)):
            bundle.step(optimizer, next(batches))
        return bundle.exact_losses(batch_size)


@dataclass(frozen=True)
class Tuned:
    """Heads that look for the least loss, in the same way for every architecture.

    Adam has a rate for each parameter, relative to its size (parameter_sizes). Plain heads, which can be born dead or
    get stuck, have several starts, cut down by their training losses. Inputs are standardised. BatchNorm's statistics
    are taken anew for the weights that a head ends with. Linear heads are not trained: they are the optimum.
    """

    steps: int = 600
    rate: float = RATE

    CUTS: ClassVar = ((8, 0.1), (4, 0.1), (2, 0.2), (1, 0.6))  # so many starts take such a share of the steps
    BETAS: ClassVar = (0.8, 0.95)  # of Adam: shorter memories than usual, for few steps
    WARMUP: ClassVar = 0.1  # the share of the steps in which the rates grow
    # The share of all steps beyond the first hundred in which they fall to 0, which costs short runs.
    DECAY: ClassVar = 0.3

    standardised: ClassVar = True
    optimal: ClassVar = True  # where the decoder is linear
    bfloat16: ClassVar = True  # on CUDA

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"DIB: steps must be at least 1, got {self.steps}")

    def starts(self, decoder: nn.Sequential) -> int:
        return self.CUTS[0][0] if is_plain(decoder) else 1

    def train(self, bundle: Bundle, sizes: dict[str, float], batch_size: int, generator: torch.Generator) -> Tensor:
        """The loss that each head reaches, (H,) float64; its starts() stand together in the bundle."""
        rates = {name: self.rate * sizes[name] for name in bundle.parameters()}
        groups = [{"params": those, "lr": rates[name]} for name, those in bundle.parameters().items()]
        optimizer = torch.optim.Adam(groups, betas=self.BETAS, fused=True)
        for head in bundle.modules():
            head.train()
        N = len(bundle.targets)
        batches = shuffled(N, batch_size, generator, bundle.targets.device)
        cuts = self.CUTS if bundle.plain else ((1, 1.0),)
        ends = [round(self.steps * share) for share in accumulate(share for _, share in cuts)]
        phase, lately = 0, torch.zeros(len(bundle.learns), device=bundle.targets.device)
        for i in bar(self.steps):
            while i == ends[phase]:
                phase += 1
                bundle.keep(best(lately, cuts[phase - 1][0], cuts[phase][0]), optimizer)
                lately = torch.zeros_like(bundle.learns, dtype=lately.dtype)
            for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
                group["lr"] = rate * self.factor(i)
            lately = 0.9 * lately + bundle.step(optimizer, next(batches))
        bundle.take_statistics(islice(shuffled(N, batch_size, generator, bundle.targets.device), ceil(N / batch_size)))
        return bundle.exact_losses(batch_size)

    def factor(self, i: int) -> float:
        """By which the rates of step i are multiplied."""
        warmup, decay = self.WARMUP * self.steps, self.DECAY * (self.steps - 100)
        return min(1.0, (i + 1) / warmup, (self.steps - i) / decay if decay > 1 else 1.0)


def best(losses: Tensor, starts: int, kept: int) -> Tensor:
    """The rows of the best starts of each head, so many of them kept, from the losses (heads * starts,)."""
    order = losses.view(-1, starts).argsort(dim=1, stable=True)[:, :kept]  # (heads, kept)
    return (order + starts * torch.arange(len(order), device=losses.device)[:, None]).flatten()


def parameter_sizes(model: nn.Module) -> dict[str, float]:
    """{name: how large a parameter is, to which its rate is relative}, from a model as it is constructed.

    The root mean square of all that was drawn at random in its module; where nothing was (the ones and zeros of a
    norm), that of the module's parameters, but at most 0.1; in any case at least 0.01. A step moves all inputs of a
    unit at once: beyond 256 of them the size is smaller.
    """
    sizes = {}
    for prefix, module in model.named_modules(remove_duplicate=False):  # by each of its names
        own = dict(module.named_parameters(prefix, recurse=False))
        drawn = [p for p in own.values() if p.min() < p.max()]
        for name, p in own.items():
            rms = torch.cat([q.detach().flatten() for q in drawn or own.values()]).square().mean().sqrt().item()
            size = max(0.01, rms if drawn else min(rms, 0.1))
            inputs = p[0].numel() if p.dim() > 1 else 1
            sizes[name] = size * min(1.0, 256 / inputs) ** 0.75
    return sizes


def standardised(decoder: nn.Sequential, encode: Encoder, batches: tuple[Tensor, ...]) -> Encoder:
    """The encodings, each feature (before a convolution each channel) with spread 1, and centred where that is exact.

    Only where the decoder begins with a linear layer or a convolution, whose weights could do the same; a shift only
    where it has a bias and pads nothing. Features without spread keep their scale.
    """
    first, *rest = leaves(decoder)
    flat = flattens(first)
    layer = rest[0] if flat and rest else first
    z = encode(batches[0][:1])
    linear = kind(layer) is nn.Linear and (flat or z.dim() == 2)
    if not (linear or kind(layer) is nn.Conv2d) or not layer.weight.requires_grad:
        return encode
    if repeats(decoder):  # what the first layer absorbs would change another one
        return encode
    over, N = (0,) if linear else (0, 2, 3), sum(map(len, batches))
    mean, square = torch.zeros(2, *z.double().mean(over, keepdim=True).shape, dtype=torch.float64, device=z.device)
    for indices in batches:
        h = encode(indices).double()
        mean += h.mean(over, keepdim=True) * len(indices) / N
        square += h.square().mean(over, keepdim=True) * len(indices) / N
    variance = square - mean**2
    scale = torch.where(variance > 1e-12 * square, variance, 1.0).rsqrt()
    shiftable = layer.bias is not None and layer.bias.requires_grad and (linear or layer.padding in ("valid", (0, 0)))
    shift = -mean * scale * shiftable
    scale, shift = scale.to(z.dtype), shift.to(z.dtype)
    return lambda indices: torch.addcmul(shift, encode(indices), scale)


def in_dtype_of(decoder: nn.Sequential, encode: Encoder) -> Encoder:
    """The encodings in the dtype of the decoder, which is not that of a model in half precision."""
    dtype = next((p.dtype for p in decoder.parameters()), None)

    def converted(indices: Tensor) -> Tensor:
        z = encode(indices)
        return z.to(dtype or torch.promote_types(z.dtype, torch.float32)) if z.is_floating_point() else z

    return converted


def encoder(blocks: nn.Sequential, source: Encoder, batches: tuple[Tensor, ...], keep_bytes: int) -> Encoder:
    """indices (B,) -> blocks(source(indices)), (B, ...): computed once for all batches if that fits keep_bytes."""

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


def is_plain(decoder: nn.Sequential) -> bool:
    """Whether stacked can train the decoder: linear layers and elementwise functions one after another, each once."""
    layers = leaves(decoder)
    layers = layers[flattens(layers[0]) :]
    for layer in takewhile(lambda layer: kind(layer) is not nn.Linear, layers):
        if getattr(layer, "inplace", False):  # it would work on what all heads share
            return False
    once = len(set(layers)) == len(layers) and not repeats(decoder)
    return once and trains(decoder) and all(kind(layer) in (nn.Linear, *ELEMENTWISE) for layer in layers)


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


def autocast(bfloat16: bool, head: nn.Sequential) -> Callable:
    """The context of a training step of such heads: bfloat16 where that is wanted and to be had. Statistics and losses
    are float32 in any case."""
    p = next(head.parameters(), None)
    if not bfloat16 or p is None or p.dtype != torch.float32 or not devices.has_bfloat16(p.device):
        return nullcontext
    # no cache: within a caller's autocast it would go on with the weights of the first step
    return partial(torch.autocast, p.device.type, torch.bfloat16, cache_enabled=False)


def one_by_one(heads: list[nn.Sequential], encodings: dict[int, Tensor], draws: bool | None = None) -> Tensor:
    """Logits (J, C, B) of any heads of one split on its encodings {k: (B, ...)}: the plain reference, a loop.

    Layers that draw (stochastic depth) draw the same for every head, what a head alone would draw. draws: whether there
    are such layers, if that is known; for heads that draw nothing random states need not be set.
    """
    (x,) = encodings.values()
    source = torch.cuda if x.is_cuda else torch
    state, logits = None if draws is False else source.get_rng_state(), []
    for head in heads:
        if state is not None:
            source.set_rng_state(state)
        logits.append(head(x.clone()).T)  # a copy: the first layer may work in place
    return torch.stack(logits)


def is_linear(decoder: nn.Sequential) -> bool:
    """Whether the decoder is linear in what functions without parameters make of its inputs.

    A norm just before the linear layer changes nothing of that: its own scale and shift can be absorbed.
    """
    *before, last = leaves(decoder)
    if kind(last) is not nn.Linear or not all(p.requires_grad for p in last.parameters()):
        return False
    while before and kind(before[-1]) is nn.Flatten:
        before.pop()
    if before and kind(before[-1]) in NORMS and last.bias is not None:
        norm = before.pop()
        if norm.weight is not None and not norm.weight.all():  # a channel that is 0 as constructed is lost to the rest
            return False
    return not any([*layer.parameters(), *layer.buffers()] for layer in before)


def optimum_fits(decoder: nn.Sequential, N: int) -> bool:
    """Whether the decoder is linear, and the N inputs of its last layer can be worked on in float64."""
    return is_linear(decoder) and 8 * N * leaves(decoder)[-1].in_features <= OPTIMUM_BYTES


def optima(decoder: nn.Sequential, encode: Encoder, batches: tuple[Tensor, ...], targets: Tensor) -> list[float]:
    """The least loss that a linear decoder can have for each of the targets (J, N), nats."""
    *before, last = leaves(decoder)
    before = nn.Sequential(*before).eval()
    with torch.no_grad():
        z = torch.cat([before(encode(indices)).double() for indices in batches])  # (N, d)
    if not z.isfinite().all():
        raise ValueError("DIB: the encodings of a linear decoder are not finite")
    has_bias = last.bias is not None
    z = whitened(z, has_bias)
    return [linear_optimum(z, target, last.out_features, has_bias) for target in targets]


def linear_optimum(z: Tensor, labels: Tensor, C: int, bias: bool, within: float = 1e-4) -> float:
    """inf over W and b of the mean cross-entropy of the logits z W + b, without b if there is no bias, in nats.

    z: features (N, d) float64, whitened. The problem is convex. L-BFGS, after every so many iterations a Newton step,
    until half the squared Newton decrement, an estimate of how far the loss is above its infimum, or the loss itself is
    below `within`. The estimate is too low where the infimum is not attained, and 1,600 iterations are the most: the
    loss then is a bound like that of any other head.
    """
    z = torch.cat([z, z.new_ones(len(z), 1)], dim=1) if bias else z
    if z.shape[1] == 0:  # nothing to tell the samples by
        return log(C)
    W = z.new_zeros(z.shape[1], C).requires_grad_()

    def closure() -> Tensor:
        W.grad = None
        loss = F.cross_entropy(z @ W, labels)
        loss.backward()
        return loss

    options = {"history_size": 20, "line_search_fn": "strong_wolfe", "tolerance_grad": 0, "tolerance_change": 0}
    for iterations in (50, 50, 100, 200, 400, 800):  # a Newton step costs as much as a hundred of them
        with torch.enable_grad():
            torch.optim.LBFGS([W], max_iter=iterations, max_eval=2 * iterations, **options).step(closure)
        with torch.no_grad():
            loss = F.cross_entropy(z @ W, labels).item()
            step, decrement = newton_step(z, labels, W)
            if min(loss, decrement / 2) < within:
                break
            for halvings in range(10):
                lower = F.cross_entropy(z @ (W - step / 2**halvings), labels).item()
                if lower < loss:
                    W -= step / 2**halvings
                    loss = lower
                    break
    return loss


def newton_step(z: Tensor, labels: Tensor, W: Tensor, products: int = 200) -> tuple[Tensor, float]:
    """H^-1 g and the squared Newton decrement g^T H^-1 g, for gradient g and Hessian H of the mean cross-entropy at the
    logits z W, by conjugate gradients: both are too small where that takes more products with H."""
    p = (z @ W).softmax(1)  # (N, C)
    g = z.T @ (p - F.one_hot(labels, W.shape[1])) / len(z)  # (d, C)
    x, r = torch.zeros_like(g), g
    direction, size = r, r.square().sum()
    for _ in range(products):
        u = z @ direction  # (N, C)
        H = z.T @ (p * (u - (p * u).sum(1, keepdim=True))) / len(z)  # (d, C): the Hessian times the direction
        curvature = (direction * H).sum()
        if curvature <= 0 or size <= 1e-12 * g.square().sum():
            break
        x, r = x + size / curvature * direction, r - size / curvature * H
        size, before = r.square().sum(), size
        direction = r + size / before * direction
    return x, (g * x).sum().item()


def whitened(z: Tensor, centred: bool) -> Tensor:
    """An orthogonal basis of the columns of z (N, d) float64, centred or not: (N, r), of mean square 1.

    Each column is brought to spread 1 first; what is left below 1e-6 of the largest singular value is the rounding of
    float32. Logits linear in z are linear in the basis, and an optimiser finds them there in a tenth of the iterations.
    """
    z = z - z.mean(0) if centred else z
    spread = z.square().mean(0).sqrt()
    z = z / torch.where(spread > 1e-6 * spread.max(), spread, 1.0)
    U, S, _ = torch.linalg.svd(z, full_matrices=False)
    return U[:, S > 1e-6 * S[0]] * len(z) ** 0.5


def costs(model: nn.Sequential, splits: list[int], x: Tensor) -> dict[int, float]:
    """An estimate, without unit, of what a head of each split costs, from the inputs x (1, ...) of one sample.

    The model is in eval mode. The numbers that its layers read and write, which is what small layers cost, and their
    multiply-adds, of which a processor does some forty while it fetches a number.
    """
    of_block = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        read, written = (sum(t.numel() for t in those if isinstance(t, Tensor)) for those in (inputs, (output,)))
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
