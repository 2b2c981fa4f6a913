"""A look-alike of CUDA for machines without it: tensors that live on the CPU and say cuda:0.

    with cuda(monkeypatch) as device:    torch.cuda.is_available(), and the code under test takes it for a GPU
        device.waits                     what has waited for the device so far, by name

It shows what depends on where tensors are, not on what computes them: that tensors of two devices are not mixed (which
raises, as on CUDA), that nothing waits for the device where it must not (torch.cuda.set_sync_debug_mode("error") raises
here, too, and for copies into memory that is not pinned, of which torch itself says nothing), that what is drawn on the
device comes from its own generator, that the code meant for CUDA runs.
It cannot show speed, memory, streams and races between them (a copy that does not block is over at once), numbers (they
are the CPU's, and so are autocast's choice of operations and algorithms that repeat), torch.compile, or what happens
inside one call of torch, in a module's C++ or a Python function of torch's own: only its arguments are looked at.

How: a TorchFunctionMode sees every call, a mark on a tensor's storage, which views share, says that it is "there".
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

# What needs a value, or a shape that depends on values, and so waits until the device has computed it.
READS = {
    *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__format__"),
    *("__repr__", "nonzero", "argwhere", "masked_select", "unique", "bincount", "equal", "allclose", "is_nonzero"),
    *("repeat_interleave", "multinomial", "linalg_eigh", "linalg_eigvalsh", "svd", "linalg_svd", "linalg_svdvals"),
    *("inverse", "linalg_inv", "linalg_solve", "linalg_cholesky", "pinverse", "linalg_pinv", "linalg_matrix_rank"),
}
# What takes tensors of several devices.
ANY = {"copy_", "to", "cuda", "cpu", "__get__", "__set__", "__deepcopy__", "_has_compatible_shallow_copy_type", "save"}
DRAWS = re.compile("rand|uniform|normal|bernoulli|dropout|multinomial|exponential|stochastic")


def is_there(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "looks_like_cuda")


def is_pinned(tensor: Tensor) -> bool:
    return hasattr(tensor.untyped_storage(), "looks_pinned")


def put_pinned(tensor: Tensor) -> Tensor:
    if is_there(tensor):
        raise RuntimeError("only tensors of the CPU can be pinned")
    tensor.untyped_storage().looks_pinned = True
    return tensor


def copy_waits(to: Tensor, other: Tensor, non_blocking: bool = False) -> bool:
    """Of a copy between devices: what is not to block waits, too, on its way into memory that is not pinned."""
    return not non_blocking or not (is_there(to) or is_pinned(to))


def reads(name: str, args: tuple, kwargs: dict) -> bool:
    """Whether the call needs a value, or a shape that depends on values."""
    if name == "where":  # of a condition alone: nonzero
        return len(args) + len(kwargs) == 1
    if name == "one_hot":  # as many classes as the labels have
        return (args[1:] or (kwargs.get("num_classes", -1),))[0] == -1
    return name in READS


def put_there(result: Any) -> None:
    for tensor in tree_leaves(result):
        if isinstance(tensor, Tensor):
            tensor.untyped_storage().looks_like_cuda = True


class Lookalike(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.strict = False  # whether to wait raises
        self.state = torch.Generator().manual_seed(0).get_state()  # of the device's generator

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.strict:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if is_there(tensor)]
        if func == Tensor.device.__get__:
            return CUDA if there else func(*args)
        if func == Tensor.is_cuda.__get__:
            return bool(there)
        if name in ("to", "cuda", "cpu"):
            return self.move(name, *args, **kwargs)
        if name == "is_pinned":
            return is_pinned(args[0])
        if name == "pin_memory":
            return put_pinned(args[0] if there or is_pinned(args[0]) else args[0].clone())
        if there:
            self.check(name, args, kwargs, tensors, there)
        device = kwargs.get("device")
        if device is None:
            on_cuda = bool(there) and not (name == "copy_" and not is_there(args[0]))
        else:
            on_cuda, kwargs["device"] = torch.device(device).type == "cuda", "cpu"
        if on_cuda and (name == "new_tensor" or (name in ("tensor", "as_tensor") and not there)):
            self.wait("a copy to the device")
        pinned = kwargs.pop("pin_memory", False)
        with self.generator(kwargs.get("generator")) if on_cuda and DRAWS.search(name) else nullcontext():
            result = func(*args, **kwargs)
        if on_cuda:
            put_there(result)
        return put_pinned(result) if pinned else result

    def check(self, name: str, args: tuple, kwargs: dict, tensors: list[Tensor], there: list[Tensor]) -> None:
        """Raise for tensors of two devices, and note what waits: of a call with tensors there."""
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        indexing = name in ("__getitem__", "__setitem__")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        into_cpu = in_place and not is_there(tensors[0])
        apart = [tensor for tensor in tensors if not is_there(tensor) and (tensor.dim() or into_cpu)]
        if apart and name not in ANY:
            if not indexing or into_cpu or not is_there(args[0]):  # numbers of the CPU, 0-D tensors, go with any device
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, got some on cuda:0 and "
                    f"{', '.join(str(tuple(tensor.shape)) for tensor in apart)} on cpu"
                )
            self.wait("indices of the CPU")
        masked = indexing and any(leaf.dtype == torch.bool for leaf in tensors[1:])
        if reads(name, args, kwargs) or masked or (name == "copy_" and len(there) < 2 and copy_waits(*args, **kwargs)):
            self.wait(name)

    def move(self, name: str, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """tensor.to(...), .cuda(...) and .cpu(...)."""
        if name != "to":
            kwargs["device"], args = name, args[1:]
        args = [CUDA if isinstance(arg, Tensor) and is_there(arg) else arg for arg in args]
        copy = kwargs.pop("copy", False)
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        from_there = is_there(tensor)
        on_cuda = from_there if device is None else device.type == "cuda"
        if on_cuda != from_there and not non_blocking:
            self.wait(f"a copy to the {'device' if on_cuda else 'CPU'}")
        options = {} if layout is None else {"memory_format": layout}
        result = tensor.to(dtype=dtype or tensor.dtype, copy=copy or on_cuda != from_there, **options)
        if on_cuda:
            put_there(result)
        elif from_there and non_blocking:  # torch does so: it waits for no copy that it has memory for
            put_pinned(result)
        return result

    @contextmanager
    def generator(self, given: torch.Generator | None) -> Iterator[None]:
        """What is drawn within comes from the generator of the device."""
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
def cuda(monkeypatch) -> Iterator[Lookalike]:
    """Within, there is one CUDA device; all that is faked goes with the fixture monkeypatch."""
    mode, autocast = Lookalike(), torch.autocast

    def seed(number: int) -> None:
        mode.state = torch.Generator().manual_seed(number ^ 1).get_state()  # a seed draws something else than on a CPU

    def set_state(state: Tensor, device: object = None) -> None:
        mode.state = state.clone()

    constants = {  # of a card too old for torch.compile, that has bfloat16
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
    # asks the driver whether a graph is being captured
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check", lambda _: None, raising=False)
    with mode:
        yield mode
