"""The mode in which models are measured."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def set_eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode. Afterwards restore the mode of each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
