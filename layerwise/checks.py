"""What the measures refuse: networks, samples and constructors that cannot be measured, each in one sentence.

Some faults show only when the network runs: blocks that mix the samples of a batch, or that draw random numbers. These
are looked for on a few samples, before anything is trained.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from operator import index

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

TRIAL_SAMPLES = 16  # on which networks are tried


def validate_sequential(network: object, what: str) -> nn.Sequential:
    """Return the blocks of an nn.Sequential in a new one, whose slices are of type nn.Sequential.

    Raises ValueError for another type, a forward of its own or a hook, which slices would not have.
    """
    if not isinstance(network, nn.Sequential):
        got = type(network).__name__
        raise ValueError(f"DIB: {what} must be an nn.Sequential, so that [:k] is an encoder, got {got}")
    if type(network).forward is not nn.Sequential.forward or "forward" in vars(network):
        raise ValueError(f"DIB: {what} has a forward of its own, which its slices would not have")
    if network._forward_hooks or network._forward_pre_hooks:
        raise ValueError(f"DIB: {what} has a hook, which its slices would not have: hook its blocks, or remove it")
    return nn.Sequential(OrderedDict(network._modules))


def validate_splits(given: Iterable[int], model: nn.Sequential) -> list[int]:
    """Return the splits as integers, each once, in order. Raises ValueError for one outside 0 .. len(model) - 1."""
    for k in (given := list(given)):
        if not hasattr(k, "__index__") or not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that a decoder is left, got {k!r}")
    return sorted(set(map(index, given)))


def validate_make_model(make_model: object) -> None:
    """Raise ValueError if make_model is not a function."""
    if isinstance(make_model, nn.Module) or not callable(make_model):
        got = describe(make_model)
        raise ValueError(f"DIB: make_model must be a function that builds the network anew, got {got}")


def call_make_model(make_model: Callable[[], nn.Sequential], device: torch.device) -> nn.Sequential:
    """Return the blocks of what make_model() builds.

    On CUDA it is built on the device: building it on a CPU and copying it takes minutes in a run.
    """
    try:
        with device if device.type == "cuda" else nullcontext():
            network = make_model()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        if device.type != "cuda":
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"DIB: make_model() fails while {device} is torch's default device: {reason}") from error
    return validate_sequential(network, "what make_model() returns")


def validate_labels(samples: object, measure: str) -> Tensor:
    """Return a copy of the labels, (N,) int64. Raises ValueError for other labels, naming the measure, DIB or NC1."""
    if not all(hasattr(samples, name) for name in ("labels", "batch", "__len__")):
        expected = "samples must have len(), labels and batch(indices), as Samples.of(...) has"
        raise ValueError(f"{measure}: {expected}, got {type(samples).__name__}")
    y = samples.labels
    is_integer = isinstance(y, Tensor) and not y.is_floating_point() and not y.is_complex()
    if not is_integer or y.dim() != 1 or not 0 < len(y) == len(samples):
        expected = f"an integer tensor (N,) with a label for each of the {len(samples)} samples, at least one"
        raise ValueError(f"{measure}: samples.labels must be {expected}, got {describe(y)}")
    return y.to(torch.int64, copy=True)


def validate_inputs(samples: object, labels: Tensor, measure: str) -> Tensor:
    """Return the inputs (B, ...) of a few samples, evenly spaced in the set.

    Raises ValueError if samples.batch does not return (inputs, labels), or not the same for a sample each time.
    """
    some = torch.arange(0, len(labels), -(-len(labels) // TRIAL_SAMPLES), device=labels.device)
    given = samples.batch(some)
    x, y = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, None)
    if not all(isinstance(t, Tensor) and t.shape[:1] == some.shape and t.device == labels.device for t in (x, y)):
        expected = f"two tensors with a row for each index, inputs and labels, on the labels' device, {labels.device}"
        raise ValueError(f"{measure}: samples.batch(indices) must return {expected}, got {describe(given)}")
    x_again, y_again = samples.batch(some.flip(0))
    same = torch.equal(x.nan_to_num(), x_again.flip(0).nan_to_num()) and torch.equal(y, y_again.flip(0))
    if not same or not torch.equal(y.long(), labels[some]):
        raise ValueError(
            f"{measure}: samples.batch(indices) must return the same input and label for a sample each time, in the "
            "order of the indices: without augmentation, shuffling or sorting"
        )
    return x


def validate_constructor(model: nn.Sequential, made: nn.Sequential, again: nn.Sequential, k: int) -> None:
    """Raise ValueError unless make_model() builds the decoder of split k anew each time.

    made, again: the results of two calls of make_model.
    """
    if len(made) != len(model):
        raise ValueError(f"DIB: make_model() returns {len(made)} blocks, and the model has {len(model)}")
    own, anew = get_tensors(model[k:]), get_tensors(made[k:])
    for name in own | anew:
        here, there = describe_shape(own.get(name)), describe_shape(anew.get(name))
        if here != there or is_lazy(anew[name]):
            raise ValueError(f"DIB: make_model() returns another network: {name} is {there}, and {here} in the model")
    for other, which in ((model, "the model"), (again, "the network that it returned before")):
        storages = {t.untyped_storage().data_ptr() for t in get_tensors(other).values()}
        for name, t in anew.items():
            is_frozen = isinstance(t, nn.Parameter) and not t.requires_grad  # training does not change it
            if t.numel() and not is_frozen and t.untyped_storage().data_ptr() in storages:
                raise ValueError(f"DIB: make_model() must build the network anew, and {name} is that of {which}")
    twice = get_tensors(again[k:])
    drawn = [name for name, t in anew.items() if t.requires_grad and t.numel() and (t != t.flatten()[0]).any()]
    if drawn and all(torch.equal(anew[name], twice[name]) for name in drawn):
        raise ValueError(
            "DIB: make_model() must draw weights from torch's global generators, and returns the same ones twice"
        )


def get_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return {name: parameter or buffer}."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def describe_shape(t: Tensor | None) -> str:
    """Describe the shape of a parameter in an error."""
    if t is None:
        return "missing"
    return "without a shape" if is_lazy(t) else f"of shape {tuple(t.shape)}"


@torch.no_grad()
def validate_network(model: nn.Sequential, made: nn.Sequential, splits: list[int], x: Tensor, num_classes: int) -> None:
    """Raise ValueError for a model that cannot be measured. Both networks are in eval mode.

    Refused are: encodings without a row for each sample, outputs that are not logits, blocks whose output for a sample
    depends on the other samples or changes from call to call, and a network `made` by make_model() that, with the
    model's weights, computes something else than the model.
    """
    names, out = list(model._modules), x
    z, since = x, 0  # the input of block `since`; the blocks from there to k may pass on something else than a tensor
    for k, name in enumerate(names):
        if k in splits and since < k:
            gives = f"block {names[k - 1]!r} returns {describe(out)}"
            raise ValueError(f"DIB: split {k} needs encodings, a row for each of {len(x)} samples, and {gives}")
        part, twin = model[since : k + 1], made[since : k + 1]
        try:
            out, of_some = part(z.clone()), part(z[::2].clone())
            of_twin = functional_call(twin, get_tensors(part), (z.clone(),)) if since >= splits[0] else out
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # networks raise all types for inputs that they are not made for
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"DIB: block {name!r} fails on {describe(z)}: {reason}") from error
        if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            continue
        refuse_mixing(f"DIB: block {name!r}", out[::2], of_some)
        if not are_close(out, of_twin):
            raise ValueError(
                f"DIB: block {name!r} of what make_model() returns, with the model's weights, computes other outputs "
                "than the model's: make_model() builds other layers, or a hook changes them"
            )
        z, since = out, k + 1
    if since < len(model) or z.dim() != 2 or z.shape[1] < num_classes or not z.is_floating_point():
        expected = f"logits, ({len(x)}, {num_classes}) or wider for {len(x)} samples"
        raise ValueError(f"DIB: the model must return {expected}, got {describe(out)}")
    if (z >= 0).all() and (z.float().sum(1) - 1).abs().max() < max(1e-3, 2 * torch.finfo(z.dtype).eps):
        raise ValueError("DIB: the model returns probabilities, and must return logits: leave out the softmax")


def refuse_mixing(what: str, among_all: Tensor, among_some: Tensor) -> None:
    """Raise ValueError if the outputs (B, ...) of the same samples differ between two batches or two calls."""
    if not are_close(among_all, among_some):
        raise ValueError(
            f"{what} returns other outputs for a sample when the other samples of the batch differ, or in each call: "
            "BatchNorm without running statistics, for example, or dropout that is always on"
        )


def are_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two outputs (B, ...) of the same samples are equal up to rounding and the choice of algorithms."""
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
    a, b = a.double(), b.double()
    most = 0.01 * (a - a.mean(0)).norm() + min(100 * eps, eps**0.5) * a.norm()
    return not (a - b).norm() > most  # True for NaN, which the pass over all samples refuses


def describe(thing: object) -> str:
    """Describe what was given in an error: type, shape and device."""
    if isinstance(thing, Tensor):
        return f"{thing.dtype} {tuple(thing.shape)} on {thing.device}"
    if isinstance(thing, (tuple, list)) and len(thing) < 5:
        return f"{type(thing).__name__} of {', '.join(map(describe, thing))}"
    return type(thing).__name__
