"""Functions for the processes that torchrun starts: rank and world size, shares of work, and collective operations.

All functions also work without torchrun, in a single process.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join_group() -> None:
    """Connect to the other processes, if torchrun started several: by nccl on CUDA, by gloo on a CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave_group() -> None:
    """Disconnect from the other processes."""
    if _is_distributed():
        dist.destroy_process_group()


def get_rank() -> int:
    """Return the index of this process, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def take_share(items: Sequence) -> Sequence:
    """Return the items of this process: every n-th item, from index rank on, where n is the number of processes."""
    return items[get_rank() :: get_world_size()]


def all_reduce_sum(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes. All processes pass tensors of the same shapes."""
    if _is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)


def broadcast(*tensors: Tensor) -> None:
    """Replace each tensor by that of the first process."""
    if _is_distributed():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def broadcast_object(thing: Any) -> Any:
    """Broadcast a picklable object from the first process, and return it."""
    things = [thing]
    if _is_distributed():
        dist.broadcast_object_list(things)
    return things[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise ValueError in all processes if one of them raises ValueError or OSError in the `with` block."""
    refusal = None
    try:
        yield
    except (ValueError, OSError) as error:
        refusal = str(error)
    refusals = [refusal]
    if _is_distributed():
        refusals = [None] * get_world_size()
        dist.all_gather_object(refusals, refusal)
    for text in refusals:
        if text:
            raise ValueError(text)


@contextmanager
def wait_for_first_rank(enabled: bool) -> Iterator[None]:
    """Run the `with` block in the first process before the others run it, if enabled."""
    if enabled and get_rank() > 0:
        wait_for_all()
    try:
        yield
    finally:
        if enabled and get_rank() == 0:
            wait_for_all()


def wait_for_all() -> None:
    """Wait until every process has come to this call."""
    if _is_distributed():
        dist.barrier()


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
