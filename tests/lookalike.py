"""A stand-in for CUDA on machines without it: tensors whose memory is on the CPU, and whose device is cuda:0.

    with fake_cuda(monkeypatch) as device:    torch.cuda.is_available() is True, and code runs as on a GPU
        device.waits                          the names of the calls that waited for the device so far

It tests what depends on the device of a tensor:

- Tensors of two devices in one call raise, as on CUDA.
- A call that waits for the device is counted. With torch.cuda.set_sync_debug_mode("error") it raises, as on CUDA. So
  does a copy into memory that is not pinned, which torch does not report.
- Random numbers on the device come from a generator of its own.
- Code that runs on CUDA only is run.

It cannot test speed, memory, streams or races between them: a copy that does not block is complete at once. Numbers are
those of the CPU, and so are the operations that autocast chooses and the algorithms that repeat bit for bit. It cannot
test torch.compile. Of a call of torch it looks at the arguments, not at what happens inside, in C++ or in Python.

A TorchFunctionMode intercepts every call. A tensor is on the device if its storage is marked; views share the mark.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda:0")
GIB = 2**30

# Calls that need values, or a shape that depends on values: they wait until the device has computed them.
READS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__format__"),
    *("__repr__", "nonzero", "argwhere", "masked_select", "unique", "bincount", "equal", "allclose", "is_nonzero"),
    *("repeat_interleave", "multinomial", "linalg_eigh", "linalg_eigvalsh", "svd", "linalg_svd", "linalg_svdvals"),
    *("inverse", "linalg_inv", "linalg_solve", "linalg_cholesky", "pinverse", "linalg_pinv", "linalg_matrix_rank"),
}
# Calls that accept tensors of several devices.
ANY = {"copy_", "to", "cuda", "cpu", "__get__", "__set__", "__deepcopy__", "_has_compatible_shallow_copy_type", "save"}
# Calls that draw random numbers.
DRAWS = re.compile("rand|uniform|normal|bernoulli|dropout|multinomial|exponential|stochastic")


def is_on_cuda(tensor: Tensor) -> bool:
    """Return whether the tensor is marked as on the device."""
    return hasattr(tensor.untyped_storage(), "looks_like_cuda")


def is_pinned(tensor: Tensor) -> bool:
    """Return whether the tensor is marked as pinned."""
    return hasattr(tensor.untyped_storage(), "looks_pinned")


def mark_pinned(tensor: Tensor) -> Tensor:
    """Mark a tensor as pinned. Raises RuntimeError if it is on the device."""
    if is_on_cuda(tensor):
        raise RuntimeError("only tensors of the CPU can be pinned")
    tensor.untyped_storage().looks_pinned = True
    return tensor


def mark_on_cuda(result: Any) -> None:
    """Mark every tensor in the result of a call as on the device."""
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor):
            tensor.untyped_storage().looks_like_cuda = True


def is_waiting_copy(to: Tensor, other: Tensor, non_blocking: bool = False) -> bool:
    """Return whether a copy between devices waits: if it blocks, or if it goes into memory that is not pinned."""
    return not non_blocking or not (is_on_cuda(to) or is_pinned(to))


def needs_values(name: str, args: tuple, kwargs: dict) -> bool:
    """Return whether a call needs values, or a shape that depends on values."""
    if name == "where":  # with a condition alone it is nonzero
        return len(args) + len(kwargs) == 1
    if name == "one_hot":  # without a number of classes it takes the largest label
        return (args[1:] or (kwargs.get("num_classes", -1),))[0] == -1
    return name in READS


class Lookalike(TorchFunctionMode):
    """The device: which calls waited for it, and the state of its random generator."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.strict = False  # whether a call that waits raises
        self.state = torch.Generator().manual_seed(0).get_state()

    def wait(self, name: str) -> None:
        """Count a call that waits. Raises RuntimeError if waiting is an error."""
        self.waits.append(name)
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {name}")

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run a call of torch as if marked tensors were on CUDA."""
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        marked = [tensor for tensor in tensors if is_on_cuda(tensor)]
        if func == Tensor.device.__get__:
            return CUDA if marked else func(*args)
        if func == Tensor.is_cuda.__get__:
            return bool(marked)
        if name in ("to", "cuda", "cpu"):
            return self.move(name, *args, **kwargs)
        if name == "is_pinned":
            return is_pinned(args[0])
        if name == "pin_memory":
            return mark_pinned(args[0] if marked or is_pinned(args[0]) else args[0].clone())
        if marked:
            self.check(name, args, kwargs, tensors, marked)
        device = kwargs.get("device")
        if device is None:
            on_cuda = bool(marked) and not (name == "copy_" and not is_on_cuda(args[0]))
        else:
            on_cuda, kwargs["device"] = torch.device(device).type == "cuda", "cpu"
        if on_cuda and (name == "new_tensor" or (name in ("tensor", "as_tensor") and not marked)):
            self.wait("a copy to the device")
        pinned = kwargs.pop("pin_memory", False)
        with self.use_generator(kwargs.get("generator")) if on_cuda and DRAWS.search(name) else nullcontext():
            result = func(*args, **kwargs)
        if on_cuda:
            mark_on_cuda(result)
        return mark_pinned(result) if pinned else result

    def check(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], marked: list[Tensor]) -> None:
        """Count a call with marked tensors if it waits. Raises RuntimeError for tensors of two devices."""
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        indexing = name in ("__getitem__", "__setitem__")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        into_cpu = in_place and not is_on_cuda(tensors[0])
        # 0-D tensors of the CPU are numbers, which any device accepts
        others = [tensor for tensor in tensors if not is_on_cuda(tensor) and (tensor.dim() or into_cpu)]
        if others and name not in ANY:
            if not indexing or into_cpu or not is_on_cuda(args[0]):
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, got some on cuda:0 and "
                    f"{', '.join(str(tuple(tensor.shape)) for tensor in others)} on cpu"
                )
            self.wait("indices of the CPU")
        masked = indexing and any(leaf.dtype == torch.bool for leaf in tensors[1:])
        copied = name == "copy_" and len(marked) < 2 and is_waiting_copy(*args, **kwargs)
        if needs_values(name, args, kwargs) or masked or copied:
            self.wait(name)

    def move(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the result of tensor.to(...), .cuda(...) or .cpu(...)."""
        if name != "to":
            kwargs["device"], args = name, args[1:]
        args = [CUDA if isinstance(arg, Tensor) and is_on_cuda(arg) else arg for arg in args]
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        from_cuda = is_on_cuda(tensor)
        on_cuda = from_cuda if device is None else device.type == "cuda"
        if on_cuda != from_cuda and not non_blocking:
            self.wait(f"a copy to the {'device' if on_cuda else 'CPU'}")
        options = {} if layout is None else {"memory_format": layout}
        result = tensor.to(dtype=dtype or tensor.dtype, copy=copy or on_cuda != from_cuda, **options)
        if on_cuda:
            mark_on_cuda(result)
        elif from_cuda and non_blocking:  # torch allocates pinned memory for such a copy
            mark_pinned(result)
        return result

    @contextmanager
    def use_generator(self, given: torch.Generator | None) -> Iterator[None]:
        """Draw random numbers from the generator of the device. Raises RuntimeError for a generator of the CPU."""
        if given is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        of_cpu = torch.default_generator.get_state()
        torch.default_generator.set_state(self.state)
        try:
            yield
        finally:
            self.state = torch.default_generator.get_state()
            torch.default_generator.set_state(of_cpu)


@contextmanager
def fake_cuda(monkeypatch) -> Iterator[Lookalike]:
    """Pretend that there is one CUDA device. monkeypatch restores the names in torch at the end of the test."""
    mode, autocast = Lookalike(), torch.autocast

    def seed(number: int) -> None:
        mode.state = torch.Generator().manual_seed(number ^ 1).get_state()  # other random numbers than on a CPU

    def set_state(state: Tensor, device: object = None) -> None:
        mode.state = state.clone()

    constants = {  # of a card that has bfloat16 and is too old for torch.compile
        **{"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "a look-alike of CUDA"},
        **{"get_device_capability": (6, 0), "is_bf16_supported": True, "mem_get_info": (8 * GIB, 16 * GIB)},
        **{"memory_reserved": 0, "memory_allocated": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None},
        **{"set_device": None, "synchronize": None, "empty_cache": None, "device": nullcontext()},
    }
    fakes = {name: lambda *_, value=value, **__: value for name, value in constants.items()}
    fakes |= {"manual_seed": seed, "manual_seed_all": seed, "set_rng_state": set_state}
    fakes["get_rng_state"] = lambda device=None: mode.state.clone()
    fakes["set_sync_debug_mode"] = lambda how: setattr(mode, "strict", how in ("error", 2))
    fakes["get_sync_debug_mode"] = lambda: 2 * mode.strict
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "autocast", lambda _, *rest, **options: autocast("cpu", *rest, **options))
    # these checks call the driver of CUDA
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check", lambda _: None, raising=False)
    with mode:
        yield mode
