"""The processes of one run, as torchrun starts them: who this process is, what it works on, and what all of them share.

Every function also works in a program that is a single process.
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
    """Return the number of this process, from 0."""
    return dist.get_rank() if _is_distributed() else 0


def get_world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _is_distributed() else 1


def take_share(items: Sequence) -> Sequence:
    """Return every n-th of the items, for n processes: shares are disjoint, and their lengths differ by 1 at most."""
    return items[get_rank() :: get_world_size()]


def deal_probes(costs: dict[int, float], J: int, world_size: int) -> list[list[tuple[int, int]]]:
    """Assign the probes (k, j), J of each split k, to processes of about the same total cost.

    costs: {k: cost of one probe}. The probes of a split share products and an encoder. They stay in one process as
    long as its load is at most 1.1 times the mean.
    """
    shares, loads = [[] for _ in range(world_size)], [0.0] * world_size
    most = 1.1 * J * sum(costs.values()) / world_size
    for k, cost in sorted(costs.items(), key=lambda item: -item[1]):
        j = 0
        while j < J:
            idlest = loads.index(min(loads))
            count = min(J - j, max(1, int((most - loads[idlest]) / cost)))
            shares[idlest] += [(k, i) for i in range(j, j + count)]
            loads[idlest] += count * cost
            j += count
    return [sorted(share) for share in shares]


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
    """Return the object that the first process passes, in every process."""
    things = [thing]
    if _is_distributed():
        dist.broadcast_object_list(things)
    return things[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Raise a ValueError or OSError of one process as a ValueError in all, so that none of them goes on alone."""
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
    """Let the first process run the body before the others do, if enabled."""
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
