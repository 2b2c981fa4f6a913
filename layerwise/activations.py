"""Record the activations of layers: run the model on batches, and cache the activations that fit in memory."""

from collections.abc import Callable, Iterator
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.func import functional_call

from layerwise import checks
from layerwise.probes.decoders import ELEMENTWISE

# Networks of FLOAT64_LAYERS only, with at most SMALL parameters, run in float64. In float32, rounding errors
# change the rank of the class means of deep saturated layers. NC1 then changes by orders of magnitude. float64 takes
# 1.5 to 2.2 times as long: at this size 0.1 s instead of 0.05 s for 7,000 samples on a core.
SMALL = 200_000
FLOAT64_LAYERS = (nn.Sequential, nn.Flatten, nn.Dropout, nn.Linear, *ELEMENTWISE)

# Bytes of activations that are converted to float64 at a time. Larger chunks were slower on a CPU. On CUDA, a chunk of
# 8 MiB takes less time than a kernel launch (an estimate), so larger chunks are used.
CHUNK_BYTES = {"cpu": 8 * 2**20, "cuda": 64 * 2**20}

Batches = list[tuple[Tensor, Tensor]]  # activations h (B, d) and classes y (B,)


def make_forward(model: nn.Module) -> Callable[[Tensor], object]:
    """Return the model, or a function that runs it in float64 if it is small and has FLOAT64_LAYERS only."""
    for m in model.modules():
        if type(m) not in FLOAT64_LAYERS or m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m):
            return model
    params = dict(model.named_parameters())
    is_small = 0 < sum(p.numel() for p in params.values()) <= SMALL
    if not is_small or any(p.dtype != torch.float32 for p in params.values()):
        return model
    params = {name: p.detach().double() for name, p in params.items()}
    return lambda x: functional_call(model, params, (x.double(),))


class ActivationRecorder:
    """Record the outputs of layers {name: module} for all batches.

    run: runs the model on inputs (B, ...). x: the inputs of a few samples, on which the model is run three times to
    find the order of the layers and the outputs that a later layer overwrites. Raises ValueError for outputs that
    depend on the other samples or change from call to call.

    Attributes:
        layers: by depth, which is the order of the calls.
        first: {name: the activation of one sample, (1, d)}.
    """

    def __init__(self, run: Callable, layers: dict[str, nn.Module], x: Tensor):
        outputs: dict[str, Tensor] = {}
        of_some: dict[str, Tensor] = {}
        not_copied: dict[str, Tensor] = {}
        run_hooked(run, layers, x.clone(), lambda name, h: outputs.update({name: h.clone()}))
        run_hooked(run, layers, x[::2].clone(), lambda name, h: of_some.update({name: h.clone()}))
        given = x.clone()
        run_hooked(run, layers, given, lambda name, h: not_copied.update({name: h}))
        for name, h in outputs.items():
            checks.validate_independence(f"NC1: layer {name!r}", h[::2], of_some[name])
        self.run = run if torch.equal(given, x) else lambda x: run(x.clone())  # the model changes its inputs
        self.layers = {name: layers[name] for name in outputs}
        self.first = {name: h[:1] for name, h in outputs.items()}
        self.overwritten = {name for name, h in outputs.items() if not torch.equal(h, not_copied[name])}
        self.cached: dict[str, Batches] = {}

    def choose_cached(self, N: int, cache_bytes: int) -> None:
        """Choose the layers whose activations for N samples are cached, the deepest first."""
        for name in reversed(self.layers):
            needed = N * self.first[name].nbytes
            if needed > cache_bytes:
                break  # caching layers before this one would save nothing: the second pass runs up to this layer
            self.cached[name] = []
            cache_bytes -= needed

    def run_pass(self, batches: Iterator[tuple[Tensor, Tensor]], update: Callable[[str, Tensor, Tensor], None]) -> None:
        """Call update(name, h (B, d), y (B,)) for every layer and batch, with the batches of each layer in order.

        The model runs on the batches (x, y), up to the last layer that is not cached yet. Each output is passed on
        while the model runs. Yielding outputs would keep those of all layers until the forward pass ends.
        """
        layers = {name: layer for name, layer in self.layers.items() if not self.cached.get(name)}
        if layers:
            *_, last = layers
            for x, y in batches:

                def handle(name: str, h: Tensor, y: Tensor = y) -> None:
                    if name in self.cached:
                        self.cached[name].append((h.clone() if name in self.overwritten else h, y.to(h.device)))
                    else:
                        update(name, h, y.to(h.device))

                run_hooked(self.run, layers, x, handle, last)
        for name, cached in self.cached.items():
            for h, y in join_batches(cached):
                update(name, h, y)


class _EndOfForwardPass(BaseException):
    """Raised by the hook of the last layer. As a BaseException, it passes `except Exception` in a model."""


@torch.no_grad()
def run_hooked(
    run: Callable,
    layers: dict[str, nn.Module],
    x: Tensor,
    handle: Callable[[str, Tensor], None],
    end_at: str | None = None,
) -> None:
    """Run the model on inputs x (B, ...), and call handle(name, output (B, d)) when a layer is called.

    end_at: the layer at which the forward pass ends. Raises ValueError for a layer that is not called exactly once, or
    whose output is not (B, ...).
    """
    calls: list[str] = []

    def make_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            calls.append(name)
            handle(name, flatten_output(name, output, len(x)))
            if name == end_at:
                raise _EndOfForwardPass

        return hook

    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in layers.items()]
    try:
        with suppress(_EndOfForwardPass):
            run(x)
    finally:
        for each in handles:
            each.remove()
    for name in layers:
        count = calls.count(name)
        if count != 1:
            raise ValueError(f"NC1: layer {name!r} is called {count} times in a forward pass, expected once")


def flatten_output(name: str, output: object, B: int) -> Tensor:
    """Return an output (B, ...) as (B, d), in channels-last order, so that channels-last outputs are not copied."""
    is_valid = isinstance(output, Tensor) and output.is_floating_point() and output.dim() > 1 and output.numel()
    if not is_valid or len(output) != B:
        raise ValueError(
            f"NC1: layer {name!r} returns {checks.describe(output)}, "
            f"expected a floating-point tensor of shape ({B}, ...)"
        )
    return output.detach().movedim(1, -1).flatten(1)


def count_chunk_rows(h: Tensor) -> int:
    """Return the number of rows of activations h (B, d) that are converted to float64 at a time."""
    return max(1, CHUNK_BYTES.get(h.device.type, CHUNK_BYTES["cpu"]) // (8 * h.shape[1]))


def join_batches(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches (h, y), concatenated to chunks of at most count_chunk_rows(h) rows if they are smaller."""
    if not batches:
        return
    h, _ = batches[0]
    together = max(1, count_chunk_rows(h) // len(h))  # batches
    for i in range(0, len(batches), together):
        if together == 1:
            yield batches[i]
        else:
            h_parts, y_parts = zip(*batches[i : i + together], strict=True)
            yield torch.cat(h_parts), torch.cat(y_parts)
