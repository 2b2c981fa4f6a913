"""Choose the device and the precision of training, and whether training is compiled."""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from layerwise import devices

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | None) -> torch.device:
    """Return the device of this process. Raises ValueError for a device that does not exist here."""
    count = torch.cuda.device_count()
    available = ["cpu"]
    if torch.cuda.is_available():
        available = ["cpu", "cuda", *(f"cuda:{i}" for i in range(count))]
    name = name or ("cuda" if "cuda" in available else "cpu")
    if name not in available:
        raise ValueError(f"--device {name} is not available: expected one of {', '.join(available)}")
    world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name.startswith("cuda") and world_size > 1:  # torchrun started a process for each GPU
        if name != "cuda" or world_size > count:
            raise ValueError(
                f"--device {name}: {world_size} processes need --device cuda and at least {world_size} GPUs, "
                f"found {count}"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # torch.cuda.manual_seed and nccl use the current device
    return torch.device(name)


def choose_compile(device: torch.device, wanted: bool | None) -> bool:
    """Return whether to compile, by default on CUDA if everything that torch.compile needs is installed.

    Raises ValueError if it is wanted and something is missing.
    """
    if device.type == "cpu":
        needs = {"a C++ compiler ($CXX or g++)": shutil.which(os.environ.get("CXX", "g++"))}
    else:
        needs = {
            "a C compiler ($CC, gcc or clang)": any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))),
            "the package triton": find_spec("triton"),
            "Python's C headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
            "a GPU of compute capability 7.0": torch.cuda.get_device_capability(device) >= (7, 0),
        }
    missing = [name for name, found in needs.items() if not found]
    if wanted and missing:
        raise ValueError(f"--compile requires {', '.join(missing)}, not found")
    if wanted is None:
        return device.type == "cuda" and not missing
    return wanted


def choose_precision(device: torch.device, wanted: str | None) -> str:
    """Return the precision of training: by default bfloat16 if the GPU has it, else float16; float32 on a CPU."""
    if device.type != "cuda":
        return wanted or "float32"
    has_bfloat16 = devices.has_bfloat16(device)
    if wanted == "bfloat16" and not has_bfloat16:
        raise ValueError(f"--precision bfloat16 is not supported by {device}: expected float32 or float16")
    return wanted or ("bfloat16" if has_bfloat16 else "float16")


def make_autocast(device: torch.device, precision: str) -> Callable[[], torch.autocast]:
    """Return a function that makes the context of a forward pass."""
    dtype = PRECISIONS[precision]
    return partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return the scaler of the loss. Only float16 needs it: bfloat16 has the range of float32."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
