"""The splits, inputs and labelings for which probes are fitted."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from layerwise.probes.encodings import Source
from layerwise.probes.held_out import HeldOut
from layerwise.streams import Streams


@dataclass(frozen=True)
class Task:
    """The splits and labelings for which probes are fitted.

    model: in eval mode. reference: a newly initialised model in eval mode, for the structure of decoders and the sizes
    of their parameters. splits: in increasing order. inputs: indices (B,) -> inputs (B, ...). targets: the labelings,
    (J, N) int64. make_probe(k, *words): returns a decoder of split k, with weights from the stream that the words name.
    held_out: samples on which the probes of the first labeling are scored.
    """

    model: nn.Sequential
    reference: nn.Sequential
    splits: list[int]
    inputs: Source
    targets: Tensor
    make_probe: Callable[..., nn.Sequential]
    streams: Streams
    held_out: HeldOut | None = None
