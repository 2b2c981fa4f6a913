"""Rows of the table that tools/evidence.py prints."""

from collections.abc import Iterable
from math import inf, isnan
from typing import NamedTuple


class Row(NamedTuple):
    """A row of the table."""

    measure: str
    known: str
    measured: str
    error: float
    unit: str  # of the error
    most: float  # the error that is allowed


def compute_error(found: float, known: float) -> float:
    """Return the absolute difference, or inf if `found` is NaN, which max would skip."""
    return inf if isnan(found) else abs(found - known)


def compute_largest_error(found: Iterable[float], known: Iterable[float]) -> float:
    """Return the largest error of a list of values."""
    return max(compute_error(*pair) for pair in zip(found, known, strict=True))


def format_values(values: Iterable[float]) -> str:
    """Return the values with three decimals, separated by commas."""
    return ", ".join(f"{round(value, 3) + 0.0:.3f}" for value in values)  # + 0.0 makes 0 of -0
