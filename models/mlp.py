"""MLP: fully connected blocks, by default with the widths of Shwartz-Ziv & Tishby (2017)."""

from math import prod

from torch import nn

WIDTHS = (10, 7, 5, 4, 3)
NONLINEARITIES = {f.__name__: f for f in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.ELU, nn.LeakyReLU)}


def build(
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: tuple[int, ...] = WIDTHS,
    nonlinearity: str = "ReLU",
) -> nn.Sequential:
    """Build the blocks flatten, hidden1 .. hiddenL (linear layer and nonlinearity) and classifier (linear).

    Raises ValueError for widths below 1 or none, and for an unknown nonlinearity.
    """
    if not widths or min(widths) < 1:
        raise ValueError(f"widths must be positive integers, got {' '.join(map(str, widths)) or 'none'}")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"unknown nonlinearity {nonlinearity!r}: expected one of {', '.join(NONLINEARITIES)}")
    model = nn.Sequential()
    model.add_module("flatten", nn.Flatten())
    fan_in = prod(input_shape)
    for i, width in enumerate(widths, 1):
        model.add_module(f"hidden{i}", nn.Sequential(nn.Linear(fan_in, width), NONLINEARITIES[nonlinearity]()))
        fan_in = width
    model.add_module("classifier", nn.Linear(fan_in, num_classes))
    model.layer_names = model.split_names = tuple(f"hidden{i}" for i in range(1, len(widths) + 1))
    return model
