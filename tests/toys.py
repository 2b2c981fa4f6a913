"""Small data for the tests, with the interface of data.Split."""

import torch


class Toy:
    def __init__(self, x: torch.Tensor, labels: torch.Tensor):
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.labels[indices]


def clusters(N: int, d: int, C: int, spread: float = 1.0, seed: int = 0) -> Toy:
    """Gaussian classes of different sizes around means of unit scale, every class present."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(C), torch.rand(N - C, generator=g).square().mul(C).long()])
    x = torch.randn(C, d, generator=g)[y] + spread * torch.randn(N, d, generator=g)
    return Toy(x, y)
