"""The precision, the memory and the errors of a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

CACHE_BYTES = 4 * 2**30  # the default; train.py calls choose_cache_bytes instead


@contextmanager
def disable_tf32() -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA in float32, not in TF32. Restore the settings afterwards.

    Within the context torch may refuse to read these settings by their older names (allow_tf32).
    """
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device is a GPU that supports bfloat16. On a CPU bfloat16 saves little time."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def choose_cache_bytes(device: torch.device) -> int:
    """Return the number of bytes to cache: on CUDA a third of the unused memory, on a CPU CACHE_BYTES."""
    if device.type != "cuda":
        return CACHE_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 3


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error is an out-of-memory error.

    torch on CUDA raises OutOfMemoryError. Errors of the driver, cuBLAS, cuDNN and the CPU are known by their message.
    """
    messages = ("out of memory", "alloc_failed", "allocation_failed", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error).lower() for words in messages)
