import pytest
import torch

import data
from tests.toys import random_images


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests are small, and threads that wait for one another spin


@pytest.fixture
def pictures(monkeypatch):
    """CIFAR10 and MNIST of 40 + 20 random images, each class of a brightness of its own."""
    monkeypatch.setitem(data.SOURCES, "CIFAR10", random_images(3, 32, 32))
    monkeypatch.setitem(data.SOURCES, "MNIST", random_images(1, 28, 28))
