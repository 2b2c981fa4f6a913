"""What probes are fitted to: the splits of a model, its inputs, and the labelings."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.probes.encodings import Encoder


def make_seed(*words: object) -> int:
    """Return the seed of a random stream. The words name its purpose and what it depends on."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Streams:
    """The random streams of one measurement. Each purpose has a stream of its own, which depends on seed and epoch."""

    seed: int
    epoch: int
    device: torch.device

    def start(self, *words: object) -> torch.Generator:
        """Seed torch's global generators for the purpose that the words name. Return a CPU generator of that seed."""
        number = make_seed(*words, self.seed, self.epoch)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        return torch.Generator().manual_seed(number)


@dataclass(frozen=True)
class Task:
    """The splits and labelings for which probes are fitted.

    model: in eval mode. reference: the network as constructed, in eval mode; it shows how decoders are made and how
    large their parameters are. splits: each k, in order, where the model is split into the encoder model[:k] and the
    decoder model[k:]. inputs: indices (B,) -> inputs (B, ...). targets: the labelings, (J, N) int64. make_probe(k,
    *words): constructs a decoder of split k from the random stream of the words. streams: the random streams.
    """

    model: nn.Sequential
    reference: nn.Sequential
    splits: list[int]
    inputs: Encoder
    targets: Tensor
    make_probe: Callable[..., nn.Sequential]
    streams: Streams
