import pytest
import torch

import data


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests are small, and threads that wait for one another spin
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def pictures(monkeypatch):
    """CIFAR10 and MNIST of 40 + 20 random images, each class of a brightness of its own."""

    def source(shape: tuple[int, ...]):
        def load(root: str, download: bool) -> tuple:
            g = torch.Generator().manual_seed(0)
            y = [torch.arange(n) % 10 for n in (40, 20)]
            x = [(torch.randint(0, 200, (len(c), *shape), generator=g) + 5 * c[:, None, None, None]).byte() for c in y]
            return x[0], y[0], x[1], y[1], 10

        return load

    monkeypatch.setitem(data.SOURCES, "CIFAR10", source((3, 32, 32)))
    monkeypatch.setitem(data.SOURCES, "MNIST", source((1, 28, 28)))
