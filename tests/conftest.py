import pytest
import torch

import data
import train
from tests.toys import QUICK, make_image_source
from training import checkpoint


class Crash(BaseException):
    """The power fails."""


def pytest_configure() -> None:
    torch.set_num_threads(1)  # the tests are small: several threads would wait for one another


@pytest.fixture
def pictures(monkeypatch):
    """CIFAR10 and MNIST become 40 + 20 random images, each class with a brightness of its own."""
    monkeypatch.setitem(data.SOURCES, "CIFAR10", make_image_source(3, 32, 32))
    monkeypatch.setitem(data.SOURCES, "MNIST", make_image_source(1, 28, 28))


@pytest.fixture
def whole(tmp_path):
    """A run that was not interrupted."""
    train.main([*QUICK, "--run-dir", str(tmp_path / "whole")])
    return tmp_path / "whole"


def crash_in_epoch(monkeypatch, end: int, flags: list[str]) -> None:
    """Start a run that ends in this epoch, before its checkpoint is written."""
    save = checkpoint.save

    def crash(folder, epoch, *rest):
        if epoch == end:
            raise Crash
        save(folder, epoch, *rest)

    with monkeypatch.context() as failing:
        failing.setattr(checkpoint, "save", crash)
        with pytest.raises(Crash):
            train.main(flags)


@pytest.fixture
def half(tmp_path, monkeypatch):
    """A run that ended within its second epoch."""
    crash_in_epoch(monkeypatch, 2, [*QUICK, "--run-dir", str(tmp_path / "half")])
    return tmp_path / "half"
