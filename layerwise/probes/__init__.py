"""Probes: decoders that are trained on frozen encodings. `fit` fits them; Tuned and Thesis say how they are trained."""

from layerwise.probes.fitting import fit
from layerwise.probes.task import Streams, Task, make_seed
from layerwise.probes.training import BATCH_SIZE, RATE, Thesis, Tuned, count_steps

__all__ = ["BATCH_SIZE", "RATE", "Streams", "Task", "Thesis", "Tuned", "count_steps", "fit", "make_seed"]
