"""The learning-rate range test (Smith, "Cyclical learning rates for training neural networks", WACV 2017).

A copy of the model is trained with a rate that grows exponentially from step to step, over passes of the training
set, and the loss is watched: it falls once the rate is large enough to learn, and rises once it is too large. The rate
where it falls most steeply is the one to train with.
"""

import copy
from collections.abc import Callable
from math import ceil, exp, inf, isfinite, log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

LOWEST, HIGHEST = 1e-6, 1.0
STEPS = 100  # at least: more passes where one has fewer batches
SMOOTHING = 0.8  # of the exponential mean of the loss, about five steps
DIVERGED = 4.0  # the sweep ends where the smoothed loss is so many times its lowest value
WINDOW = 5  # steps on either side through which a line is fitted: a factor of 2 in the rate
STEADY = 0.8  # of the variance that the line has to explain: at rates that are too large the loss jumps, up and down


class Step(NamedTuple):
    learning_rate: float
    loss: float  # nats
    smoothed: float  # nats


def sweep(
    model: nn.Module,
    split,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    batch_size: int,
    autocast: Callable,
    scaler: torch.amp.GradScaler,
) -> list[Step]:
    """The steps of the test, up to the one where the loss diverged; the model and all random states stay as they were.

    split: len(), .labels, .batch(indices) -> (inputs, labels). make_optimizer: of parameters and lr. autocast and
    scaler as in training, the scaler one of its own.
    """
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=LOWEST)
    device, steps, mean, lowest = split.labels.device, [], 0.0, inf
    batches = ceil(len(split) / batch_size)
    passes = ceil(STEPS / batches)
    growth = log(HIGHEST / LOWEST) / (passes * batches - 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        orders = [torch.randperm(len(split)).to(device) for _ in range(passes)]
        for i, indices in enumerate(batch for order in orders for batch in order.tensor_split(batches)):
            rate = optimizer.param_groups[0]["lr"] = LOWEST * exp(growth * i)
            x, y = split.batch(indices)
            with autocast():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            value = loss.item()  # the one wait for the device in a step
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smoothed = mean / (1 - SMOOTHING ** (i + 1))  # the mean began at 0
            if not isfinite(smoothed) or smoothed > DIVERGED * lowest:
                break
            lowest = min(lowest, smoothed)
            steps.append(Step(rate, value, smoothed))
    return steps


def steepest(steps: list[Step]) -> int:
    """The index of the step where the loss falls most steeply over the logarithm of the rate, before its lowest point.

    The slope is that of a line through WINDOW steps on either side, where the loss falls steadily along it; the
    smoothed loss, which lags behind the rate, tells the lowest point. Raises ValueError where the loss falls nowhere.
    """
    rates, losses, smoothed = np.array(steps).reshape(-1, 3).T
    slopes = {}
    for i in range(WINDOW, min(smoothed.argmin() + 1, len(steps) - WINDOW) if steps else 0):
        x, y = np.log(rates[i - WINDOW : i + WINDOW + 1]), losses[i - WINDOW : i + WINDOW + 1]
        slope = np.polyfit(x, y, 1)[0]
        if slope < 0 and slope**2 * x.var() >= STEADY * y.var():
            slopes[i] = slope
    if not slopes:
        raise ValueError(
            f"--tune: the loss falls steadily at no rate from {LOWEST:g} to {HIGHEST:g}: give a --learning-rate"
        )
    return min(slopes, key=slopes.get)
