"""What cannot be measured of other people's networks and data: refused in one sentence, before anything is trained.

Some of it shows only when the network runs: blocks that mix the samples of a batch, or draw. A few samples tell.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from operator import index

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

SAMPLES = 16  # so many are looked at


def blocks(network: object, what: str) -> nn.Sequential:
    """The blocks of an nn.Sequential in a plain one, whose slices are plain, too, and never call its constructor."""
    if not isinstance(network, nn.Sequential):
        got = type(network).__name__
        raise ValueError(f"DIB: {what} must be an nn.Sequential, so that [:k] is an encoder, got {got}")
    if type(network).forward is not nn.Sequential.forward or "forward" in vars(network):
        raise ValueError(f"DIB: {what} has a forward of its own, which its slices would not follow")
    if network._forward_hooks or network._forward_pre_hooks:
        raise ValueError(f"DIB: {what} has a hook, which its slices would not have: hook its blocks, or remove it")
    return nn.Sequential(OrderedDict(network._modules))


def splits(given: Iterable[int], model: nn.Sequential) -> list[int]:
    """The splits as integers, in order."""
    for k in (given := list(given)):
        if not hasattr(k, "__index__") or not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k!r}")
    return sorted(set(map(index, given)))


def function(fresh: object) -> None:
    if isinstance(fresh, nn.Module) or not callable(fresh):
        raise ValueError(f"DIB: fresh must be a function that builds the network anew, got {described(fresh)}")


def made(fresh: Callable[[], nn.Sequential], device: torch.device) -> nn.Sequential:
    """The blocks of what fresh() makes: on CUDA made there, as made on a CPU and copied they cost minutes a run."""
    try:
        with device if device.type == "cuda" else nullcontext():
            network = fresh()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        if device.type != "cuda":
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"DIB: fresh() fails where {device} is torch's default device: {reason}") from error
    return blocks(network, "what fresh() makes")


def labels(samples: object, measure: str) -> Tensor:
    """A copy of the samples' labels, (N,) int64; measure: who asks, DIB or NC1."""
    if not all(hasattr(samples, name) for name in ("labels", "batch", "__len__")):
        expected = "samples must have len(), labels and batch(indices), as data.Split.of(...) has"
        raise ValueError(f"{measure}: {expected}, got {type(samples).__name__}")
    y = samples.labels
    integer = isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex()
    if not integer or y.dim() != 1 or not 0 < len(y) == len(samples):
        expected = f"an integer tensor (N,) with a label for each of the {len(samples)} samples, at least one"
        raise ValueError(f"{measure}: samples.labels must be {expected}, got {described(y)}")
    return y.to(torch.int64, copy=True)


def inputs(samples: object, labels: Tensor, measure: str) -> Tensor:
    """The inputs of some samples, spread over all."""
    some = torch.arange(0, len(labels), -(-len(labels) // SAMPLES), device=labels.device)
    given = samples.batch(some)
    x, y = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, None)
    if not all(isinstance(t, Tensor) and t.shape[:1] == some.shape and t.device == labels.device for t in (x, y)):
        expected = f"two tensors with a row for each index, inputs and labels, on the labels' device, {labels.device}"
        raise ValueError(f"{measure}: samples.batch(indices) must give {expected}, got {described(given)}")
    x_again, y_again = samples.batch(some.flip(0))
    same = torch.equal(x.nan_to_num(), x_again.flip(0).nan_to_num()) and torch.equal(y, y_again.flip(0))
    if not same or not torch.equal(y.long(), labels[some]):
        raise ValueError(
            f"{measure}: samples.batch(indices) must give each sample as it gave it before, with its own label, in the "
            "order of the indices: without augmentation, shuffling or sorting"
        )
    return x


def constructor(model: nn.Sequential, made: nn.Sequential, again: nn.Sequential, k: int) -> None:
    """Refuse a fresh(), which made two networks, that does not build the decoder of split k anew each time."""
    if len(made) != len(model):
        raise ValueError(f"DIB: fresh() makes {len(made)} blocks, and the model has {len(model)}")
    own, anew = tensors(model[k:]), tensors(made[k:])
    for name in own | anew:
        here, there = sized(own.get(name)), sized(anew.get(name))
        if here != there or is_lazy(anew[name]):
            raise ValueError(f"DIB: fresh() makes another network: {name} is {there}, and {here} in the model")
    for other, which in ((model, "the model"), (again, "what it made before")):
        places = {t.untyped_storage().data_ptr() for t in tensors(other).values()}
        for name, t in anew.items():
            untouched = isinstance(t, nn.Parameter) and not t.requires_grad  # by training
            if t.numel() and not untouched and t.untyped_storage().data_ptr() in places:
                raise ValueError(f"DIB: fresh() must build the network anew, and {name} is that of {which}")
    twice = tensors(again[k:])
    drawn = [name for name, t in anew.items() if t.requires_grad and t.numel() and (t != t.flatten()[0]).any()]
    if drawn and all(torch.equal(anew[name], twice[name]) for name in drawn):
        raise ValueError("DIB: fresh() must draw weights from torch's global generators, and gives the same ones twice")


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return dict([*network.named_parameters(), *network.named_buffers()])


def sized(t: Tensor | None) -> str:
    if t is None:
        return "missing"
    return "without a size" if is_lazy(t) else f"of shape {tuple(t.shape)}"


@torch.no_grad()
def network(model: nn.Sequential, made: nn.Sequential, splits: list[int], x: Tensor, num_classes: int) -> None:
    """Refuse a model that gives no encodings or logits for the inputs x, or gives a sample other ones in other batches
    or at another time, and a network made by fresh() that is another function of its weights; both in eval mode."""
    names, out = list(model._modules), x
    z, since = x, 0  # what goes into block `since`; between it and block k may be what is no tensor
    for k, name in enumerate(names):
        if k in splits and since < k:
            gives = f"block {names[k - 1]!r} gives {described(out)}"
            raise ValueError(f"DIB: split {k} needs encodings, a row for each of {len(x)} samples, and {gives}")
        part, twin = model[since : k + 1], made[since : k + 1]
        try:
            out, of_some = part(z.clone()), part(z[::2].clone())
            of_twin = functional_call(twin, tensors(part), (z.clone(),)) if since >= splits[0] else out
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a network raises on inputs that are not for it
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"DIB: block {name!r} fails on {described(z)}: {reason}") from error
        if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            continue
        refuse_mixing(f"DIB: block {name!r}", out[::2], of_some)
        if not alike(out, of_twin):
            raise ValueError(
                f"DIB: block {name!r} of what fresh() makes, given the model's weights, gives other outputs than the "
                "model's: fresh() makes other layers, or a hook changes them"
            )
        z, since = out, k + 1
    if since < len(model) or z.dim() != 2 or z.shape[1] < num_classes or not z.is_floating_point():
        expected = f"logits, ({len(x)}, {num_classes}) or wider for {len(x)} samples"
        raise ValueError(f"DIB: the model must give {expected}, got {described(out)}")
    if (z >= 0).all() and (z.float().sum(1) - 1).abs().max() < max(1e-3, 2 * torch.finfo(z.dtype).eps):
        raise ValueError("DIB: the outputs of the model are probabilities, and must be logits: leave out the softmax")


def refuse_mixing(what: str, among_all: Tensor, among_some: Tensor) -> None:
    """Refuse outputs (B, ...) of the same samples that depend on the samples beside them, or on when they are taken."""
    if not alike(among_all, among_some):
        raise ValueError(
            f"{what} gives a sample other outputs beside other samples, or other ones each time: "
            "BatchNorm without running statistics, say, or dropout that is always on"
        )


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether outputs (B, ...) of the same samples differ by no more than rounding and other algorithms make them."""
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
    a, b = a.double(), b.double()
    most = 0.01 * (a - a.mean(0)).norm() + min(100 * eps, eps**0.5) * a.norm()
    return not (a - b).norm() > most  # outputs that are not finite are found where all samples are passed


def described(thing: object) -> str:
    if isinstance(thing, Tensor):
        return f"{thing.dtype} {tuple(thing.shape)} on {thing.device}"
    if isinstance(thing, (tuple, list)) and len(thing) < 5:
        return f"{type(thing).__name__} of {', '.join(map(described, thing))}"
    return type(thing).__name__
