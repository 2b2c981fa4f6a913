"""What a device computes float32 in, how much of its memory a measure may keep, and whether it ran out."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

KEEP_BYTES = 4 * 2**30  # on a CPU


@contextmanager
def exact_float32() -> Iterator[None]:
    """Products and convolutions of float32 in float32 on CUDA, too, not in TF32; afterwards as it was found.

    Within, torch may refuse to read these settings by their older names (allow_tf32), as where both are used.
    """
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    found = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, precision in zip(kinds, found, strict=True):
            kind.fp32_precision = precision


def has_bfloat16(device: torch.device) -> bool:
    """Whether training steps are in bfloat16 there by default: on a GPU that has it; a CPU has it, and gains little."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def bytes_to_keep(device: torch.device) -> int:
    """Of activations, in each of the measures: on CUDA a third of what is free, or torch holds and does not use."""
    if device.type != "cuda":
        return KEEP_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 3


def is_out_of_memory(error: Exception) -> bool:
    """torch's allocators raise errors of their own; the driver, cuBLAS, cuDNN and the CPU say it in words."""
    words = ("out of memory", "alloc_failed", "allocation_failed", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)
