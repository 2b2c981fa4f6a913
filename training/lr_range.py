"""The learning-rate range test (Smith, "Cyclical learning rates for training neural networks", WACV 2017).

A copy of the model is trained with a learning rate that grows exponentially from step to step. The loss falls when the
rate is large enough, and rises when the rate is too large. The chosen rate is where the loss falls most steeply.
"""

import copy
from collections.abc import Callable
from math import ceil, exp, inf, isfinite, log
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from layerwise.samples import Samples
from training.hardware import make_autocast, make_scaler

LOWEST, HIGHEST = 1e-6, 1.0
STEPS = 100  # minimum number of steps: several passes over the samples if one has fewer batches
SMOOTHING = 0.8  # of the exponential mean of the loss, about five steps
DIVERGED = 4.0  # the test ends when the smoothed loss exceeds DIVERGED times its minimum
WINDOW = 5  # steps on either side through which a line is fitted: with 100 steps a factor of 2 in the rate
STEADY = 0.8  # minimum R^2 of that line: at rates that are too large the loss is noisy


class Step(NamedTuple):
    """One step of the test."""

    learning_rate: float
    loss: float  # nats
    smoothed: float  # nats


def run_test(
    model: nn.Module,
    samples: Samples,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    batch_size: int,
    precision: str,
) -> list[Step]:
    """Return the steps before the loss diverged. The model and the random states are not changed.

    make_optimizer: called with the parameters and lr. precision: a key of hardware.PRECISIONS.
    """
    model = copy.deepcopy(model).train()
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], lr=LOWEST)
    device, steps, mean, lowest = samples.labels.device, [], 0.0, inf
    autocast, scaler = make_autocast(device, precision), make_scaler(device, precision)
    batches = ceil(len(samples) / batch_size)
    passes = ceil(STEPS / batches)
    growth = log(HIGHEST / LOWEST) / (passes * batches - 1)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        orders = [torch.randperm(len(samples)).to(device) for _ in range(passes)]
        for i, indices in enumerate(batch for order in orders for batch in order.tensor_split(batches)):
            rate = optimizer.param_groups[0]["lr"] = LOWEST * exp(growth * i)
            x, y = samples.batch(indices)
            with autocast():
                loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            value = loss.item()  # the only synchronisation of a step
            mean = SMOOTHING * mean + (1 - SMOOTHING) * value
            smoothed = mean / (1 - SMOOTHING ** (i + 1))  # the mean began at 0
            if not isfinite(smoothed) or smoothed > DIVERGED * lowest:
                break
            lowest = min(lowest, smoothed)
            steps.append(Step(rate, value, smoothed))
    return steps


def find_steepest(steps: list[Step]) -> int:
    """Return the index of the step where the loss falls most steeply over log rate, before its lowest point.

    The slope is that of a line fitted to WINDOW steps on either side. Lines with R^2 < STEADY are ignored. The lowest
    point is that of the smoothed loss. Raises ValueError if there is no such step.
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
            f"--tune found no learning rate from {LOWEST:g} to {HIGHEST:g} at which the loss falls steadily: "
            "set --learning-rate"
        )
    return min(slopes, key=slopes.get)
