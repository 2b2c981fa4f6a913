"""Several processes of one run, started by torchrun: who this one is, what falls to it, and what they have in common.

Every function is for any number of processes; in a program that torch.distributed knows nothing of there is one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def join() -> None:
    """Meet the other processes, where torchrun started several: over nccl on CUDA, over gloo on a CPU."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    if _several():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world() -> int:
    return dist.get_world_size() if _several() else 1


def share(everything: Sequence) -> Sequence:
    """What falls to this process, dealt like cards: the shares are disjoint, and differ by one at most."""
    return everything[rank() :: world()]


def deal(costs: dict[int, float], J: int, world: int) -> list[list[tuple[int, int]]]:
    """The heads (k, j), J of each split k, that each process trains: every head once, about the same cost for each.

    The heads of a split stay together as far as a tenth more than a fair share allows: they share products and encoder.
    """
    shares, loads = [[] for _ in range(world)], [0.0] * world
    most = 1.1 * J * sum(costs.values()) / world
    for k, cost in sorted(costs.items(), key=lambda item: -item[1]):
        j = 0
        while j < J:
            idlest = loads.index(min(loads))
            count = min(J - j, max(1, int((most - loads[idlest]) / cost)))
            shares[idlest] += [(k, i) for i in range(j, j + count)]
            loads[idlest] += count * cost
            j += count
    return [sorted(share) for share in shares]


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over the processes, which call this with tensors of the same shapes."""
    for tensor in tensors if _several() else ():
        dist.all_reduce(tensor)


def from_first(*tensors: Tensor) -> None:
    """Replace each tensor by what the first process has in it."""
    for tensor in tensors if _several() else ():
        dist.broadcast(tensor, 0)


def told_by_first(thing: Any) -> Any:
    """What the first process passes, in every process."""
    things = [thing]
    if _several():
        dist.broadcast_object_list(things)
    return things[0]


@contextmanager
def together() -> Iterator[None]:
    """What one process refuses (ValueError, OSError) is raised as ValueError in all, so that none goes on alone."""
    refusal = None
    try:
        yield
    except (ValueError, OSError) as error:
        refusal = str(error)
    refusals = [refusal]
    if _several():
        refusals = [None] * world()
        dist.all_gather_object(refusals, refusal)
    for text in filter(None, refusals):
        raise ValueError(text)


@contextmanager
def first_alone(wanted: bool) -> Iterator[None]:
    """Where wanted, the first process goes through alone, and the others after it."""
    if wanted and rank() > 0:
        meet()
    try:
        yield
    finally:
        if wanted and rank() == 0:
            meet()


def meet() -> None:
    """Wait until every process is here."""
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()
