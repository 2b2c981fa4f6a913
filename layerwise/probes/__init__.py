"""Probes: decoders that are trained on frozen encodings. `fit` returns their losses. Tuned and Thesis train them."""

from layerwise.probes.encodings import Source
from layerwise.probes.fitting import fit
from layerwise.probes.held_out import HeldOut, choose_half
from layerwise.probes.linear import can_fit_linear
from layerwise.probes.task import Task
from layerwise.probes.training import BATCH_SIZE, RATE, Thesis, Tuned, count_steps

__all__ = [
    "BATCH_SIZE",
    "RATE",
    "HeldOut",
    "Source",
    "Task",
    "Thesis",
    "Tuned",
    "can_fit_linear",
    "choose_half",
    "count_steps",
    "fit",
]
