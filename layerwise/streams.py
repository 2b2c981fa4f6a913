"""Random streams: seeds that are hashes of words, and the states of torch's global generators."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def make_seed(*words: object) -> int:
    """Return a seed that is a hash of the words."""
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Streams:
    """The random streams of a call of DIB. Each purpose has a separate stream, which depends on seed and epoch."""

    seed: int
    epoch: int
    device: torch.device

    def seed_generators(self, *words: object) -> torch.Generator:
        """Seed torch's global generators with a hash of words, seed and epoch. Return a CPU generator so seeded."""
        number = make_seed(*words, self.seed, self.epoch)
        torch.default_generator.manual_seed(number)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(number)
        return torch.Generator().manual_seed(number)


def take_random_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators: `random` of the CPU, and on CUDA `random_cuda` of the device."""
    states = {"random": torch.get_rng_state()}
    if device.type == "cuda":
        states["random_cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Set torch's global generators to states that take_random_states returned, on this device or on another.

    On CUDA, states of a CPU give a new seed: the seed of the run would repeat its earlier random numbers.
    """
    torch.set_rng_state(states["random"])
    if device.type == "cuda" and "random_cuda" in states:
        torch.cuda.set_rng_state(states["random_cuda"], device)
    elif device.type == "cuda":
        torch.cuda.manual_seed(make_seed("cuda", states["random"].numpy().tobytes()))
