"""Probes: decoders that are trained on frozen encodings. `fit` returns their losses. Tuned and Thesis train them."""

from layerwise.probes.fitting import fit
from layerwise.probes.linear import can_fit_linear
from layerwise.probes.task import Task
from layerwise.probes.training import BATCH_SIZE, RATE, Thesis, Tuned, count_steps

__all__ = ["BATCH_SIZE", "RATE", "Task", "Thesis", "Tuned", "can_fit_linear", "count_steps", "fit"]
