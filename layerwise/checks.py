"""Validation of the models, samples and make_model functions that are passed to nc1 and dib.

Some errors can be detected only by running the network, for example blocks that mix the samples of a batch. The network
is run on a few samples before probes are trained.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from operator import index

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import is_lazy

TRIAL_SAMPLES = 16  # most samples on which networks are run for validation


def validate_sequential(network: object, what: str) -> nn.Sequential:
    """Return an nn.Sequential with the blocks of `network`. Slices of a subclass would have the type of the subclass.

    Raises ValueError if network is not an nn.Sequential, overrides forward, or has hooks. Slices would lose these.
    """
    if not isinstance(network, nn.Sequential):
        got = type(network).__name__
        raise ValueError(f"DIB: {what} must be an nn.Sequential, whose slice [:k] is the encoder, got {got}")
    if type(network).forward is not nn.Sequential.forward or "forward" in vars(network):
        raise ValueError(f"DIB: {what} overrides forward, which its slices would not do")
    if network._forward_hooks or network._forward_pre_hooks:
        raise ValueError(f"DIB: {what} has a hook, which its slices would not run: move it to a block, or remove it")
    return nn.Sequential(OrderedDict(network._modules))


def validate_splits(given: Iterable[int], model: nn.Sequential) -> list[int]:
    """Return the splits as integers, each once, in order. Raises ValueError for one outside 0 .. len(model) - 1."""
    splits = set()
    for k in given:
        if not hasattr(k, "__index__") or not 0 <= k < len(model):
            raise ValueError(f"DIB: k must lie in 0..{len(model) - 1}, so that model[k:] is not empty, got {k!r}")
        splits.add(index(k))
    return sorted(splits)


def validate_make_model(make_model: object) -> None:
    """Raise ValueError if make_model is not a function."""
    if isinstance(make_model, nn.Module) or not callable(make_model):
        got = describe(make_model)
        raise ValueError(f"DIB: make_model must be a function that returns a newly initialised model, got {got}")


def call_make_model(make_model: Callable[[], nn.Sequential], device: torch.device) -> nn.Sequential:
    """Call make_model, and return the blocks of the model.

    On CUDA the model is built on the device, which saves minutes over a run.
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


def read_trial_inputs(samples: object, labels: Tensor, measure: str) -> Tensor:
    """Return the inputs (B, ...) of a few samples, equally spaced in the set.

    Raises ValueError if samples.batch does not return (inputs, labels), or returns different values for the same index.
    """
    some = torch.arange(0, len(labels), -(-len(labels) // TRIAL_SAMPLES), device=labels.device)
    given = samples.batch(some)
    x, y = given if isinstance(given, (tuple, list)) and len(given) == 2 else (given, None)
    if not all(isinstance(t, Tensor) and t.shape[:1] == some.shape and t.device == labels.device for t in (x, y)):
        expected = f"two tensors (inputs, labels) of {len(some)} rows on {labels.device} for {len(some)} indices"
        raise ValueError(f"{measure}: samples.batch(indices) must return {expected}, got {describe(given)}")
    x_again, y_again = samples.batch(some.flip(0))
    same = torch.equal(x.nan_to_num(), x_again.flip(0).nan_to_num()) and torch.equal(y, y_again.flip(0))
    if not same or not torch.equal(y.long(), labels[some]):
        raise ValueError(
            f"{measure}: samples.batch(indices) must return the same values for the same indices, in the order of the "
            "indices, without augmentation, shuffling or sorting"
        )
    return x


def validate_made_models(model: nn.Sequential, made: nn.Sequential, again: nn.Sequential, k: int) -> None:
    """Raise ValueError unless make_model() returns a decoder of split k like the model's, with new weights each time.

    made, again: the results of two calls of make_model.
    """
    if len(made) != len(model):
        raise ValueError(f"DIB: make_model() returns {len(made)} blocks, but the model has {len(model)}")
    in_model, in_made, in_again = (get_tensors(network[k:]) for network in (model, made, again))
    for name in in_model | in_made:
        here, there = describe_shape(in_model.get(name)), describe_shape(in_made.get(name))
        if here != there or is_lazy(in_made[name]):
            raise ValueError(f"DIB: make_model() returns another network: {name} is {there}, but {here} in the model")
    for other, which in ((model, "the model"), (again, "the network that it returned before")):
        storages = {t.untyped_storage().data_ptr() for t in get_tensors(other).values()}
        for name, t in in_made.items():
            is_frozen = isinstance(t, nn.Parameter) and not t.requires_grad  # training does not change it
            if t.numel() and not is_frozen and t.untyped_storage().data_ptr() in storages:
                raise ValueError(f"DIB: make_model() must return new tensors, but {name} shares memory with {which}")
    random = [name for name, t in in_made.items() if t.requires_grad and t.numel() and (t != t.flatten()[0]).any()]
    if random and all(torch.equal(in_made[name], in_again[name]) for name in random):
        raise ValueError(
            "DIB: make_model() must draw its weights from torch's global generators, but two calls return equal weights"
        )


def get_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return {name: parameter or buffer}."""
    return dict([*network.named_parameters(), *network.named_buffers()])


def describe_shape(t: Tensor | None) -> str:
    """Return a phrase for error messages: the shape of a parameter or buffer."""
    if t is None:
        return "missing"
    return "without a shape" if is_lazy(t) else f"of shape {tuple(t.shape)}"


@torch.no_grad()
def validate_network(model: nn.Sequential, made: nn.Sequential, splits: list[int], x: Tensor, num_classes: int) -> None:
    """Raise ValueError for a model that cannot be measured. Both networks are in eval mode.

    Errors are: encodings without a row for each sample, outputs that are not logits, blocks whose output for a sample
    depends on the rest of the batch or on random numbers, and a network `made` by make_model() that computes different
    outputs with the weights of the model.
    """
    names, out = list(model._modules), x
    z, since = x, 0  # z: the last intermediate result with a row for each sample. since: the block that gets z
    for k, name in enumerate(names):
        if k in splits and since < k:
            got = f"block {names[k - 1]!r} returns {describe(out)}"
            raise ValueError(f"DIB: the encodings of split {k} must be a tensor with {len(x)} rows, but {got}")
        part, twin = model[since : k + 1], made[since : k + 1]
        try:
            out, of_some = part(z.clone()), part(z[::2].clone())
            of_twin = functional_call(twin, get_tensors(part), (z.clone(),)) if since >= splits[0] else out
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a network may raise any type of exception for inputs of the wrong shape or type
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"DIB: block {name!r} fails on {describe(z)}: {reason}") from error
        if not isinstance(out, Tensor) or out.shape[:1] != x.shape[:1]:
            continue
        validate_independence(f"DIB: block {name!r}", out[::2], of_some)
        if not are_close(out, of_twin):
            raise ValueError(
                f"DIB: with the same weights, block {name!r} of the network that make_model() returns has different "
                "outputs: make_model() builds different layers, or a hook changes the outputs"
            )
        z, since = out, k + 1
    validate_logits(out, len(x), num_classes)


def validate_logits(out: object, N: int, num_classes: int) -> None:
    """Raise ValueError if the outputs for N samples are not logits (N, num_classes) or wider."""
    is_matrix = isinstance(out, Tensor) and out.is_floating_point() and out.dim() == 2
    if not is_matrix or len(out) != N or out.shape[1] < num_classes:
        raise ValueError(
            f"DIB: the model must return logits, ({N}, {num_classes}) or wider for {N} samples, got {describe(out)}"
        )
    if (out >= 0).all() and (out.float().sum(1) - 1).abs().max() < max(1e-3, 2 * torch.finfo(out.dtype).eps):
        raise ValueError("DIB: the model must return logits, got probabilities: remove the softmax")


def validate_independence(what: str, among_all: Tensor, among_some: Tensor) -> None:
    """Raise ValueError if the outputs (B, ...) of the same samples differ between two batches or two calls."""
    if not are_close(among_all, among_some):
        raise ValueError(
            f"{what}: the output for a sample depends on the other samples of the batch or changes between calls, as "
            "with BatchNorm without running statistics or dropout in eval mode"
        )


def are_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two outputs (B, ...) of the same samples are equal up to rounding and the choice of algorithms."""
    if not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0
    a, b = a.double(), b.double()
    most = 0.01 * (a - a.mean(0)).norm() + min(100 * eps, eps**0.5) * a.norm()
    return not (a - b).norm() > most  # also True for NaN, which is detected in the pass over all samples


def describe(thing: object) -> str:
    """Return a description for error messages: type, shape and device."""
    if isinstance(thing, Tensor):
        return f"{thing.dtype} {tuple(thing.shape)} on {thing.device}"
    if isinstance(thing, (tuple, list)) and len(thing) < 5:
        return f"{type(thing).__name__} of {', '.join(map(describe, thing))}"
    return type(thing).__name__
