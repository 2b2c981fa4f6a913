"""Optimizers and schedules of the network's training."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.optim import lr_scheduler

OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
SCHEDULES = ("constant", "steps", "cosine", "one-cycle")
LEARNING_RATE = 2e-3


def make_optimizer(
    name: str, options: dict, learning_rate: float | None = None
) -> Callable[..., torch.optim.Optimizer]:
    """Return a function of parameters that makes the optimizer. Without a learning rate it must also be given lr."""
    options = dict(options)
    if not (options.get("foreach") or options.get("differentiable")):  # these exclude fused
        options.setdefault("fused", True)
    if learning_rate is not None:
        options["lr"] = learning_rate
    return partial(OPTIMIZERS[name], **options)


def validate_optimizer(name: str, options: dict, device: torch.device, steps: int) -> None:
    """Raise ValueError if the optimizer cannot be made with these options, or if one of its steps fails."""
    p = nn.Parameter(torch.zeros(1, device=device))
    p.grad = torch.zeros_like(p)
    try:
        optimizer = make_optimizer(name, options, LEARNING_RATE)([p])
        for _ in range(steps):
            optimizer.step()
    except Exception as error:  # torch raises many types
        given = " ".join(f"{key}={value}" for key, value in options.items()) or "its default options"
        reason = " ".join(str(error).split())
        raise ValueError(f"torch.optim.{name} does not accept {given}: {reason}") from None


def make_schedule(
    name: str, optimizer: torch.optim.Optimizer, learning_rate: float, steps: int
) -> lr_scheduler.LRScheduler:
    """Return a learning-rate schedule for this number of training steps. It is stepped after each of them."""
    if name == "steps":
        return lr_scheduler.MultiStepLR(optimizer, milestones=[round(steps / 3), round(2 * steps / 3)], gamma=0.1)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    if name == "one-cycle":  # cycle_momentum=False: the momentum of the flags is used
        return lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, cycle_momentum=False)
    return lr_scheduler.ConstantLR(optimizer, factor=1.0)
