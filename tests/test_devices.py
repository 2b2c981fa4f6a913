"""Measures and training do not use TF32, and a measure may cache a third of the unused memory of a GPU."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import dib
import models
import nc1
import train
from layerwise import devices
from layerwise.samples import Samples
from tests.toys import make_clusters

BACKENDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def read_precisions() -> list[str]:
    return [backend.fp32_precision for backend in BACKENDS]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allow TF32 during a test, as a caller may do."""
    before = read_precisions()
    for backend in BACKENDS:
        backend.fp32_precision = "tf32"
    yield
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
def test_tf32_is_off_within_the_context_and_restored_afterwards(tf32, before):
    for backend in BACKENDS:
        backend.fp32_precision = before

    @devices.disable_tf32()
    def measure() -> None:
        assert read_precisions() == ["ieee"] * 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert read_precisions() == [before] * 3


def test_measures_and_training_do_not_use_tf32(tf32, tmp_path, monkeypatch):
    """This holds for the measures called from Python, for the range test and for the training of a run."""
    seen, batch = [], Samples.batch

    def watch(*arguments) -> tuple:
        seen.extend(read_precisions())
        return batch(*arguments)

    monkeypatch.setattr(Samples, "batch", watch)
    samples, make_model = make_clusters(30, 6, 3), partial(models.build, "MLP", (6,), 3, widths=(4,))
    model = make_model()
    flags = ["--epochs", "1", "--tune", "--no-dib", "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    for call in (
        lambda: nc1.measure(model, models.layers(model), samples, 3),
        lambda: dib.measure(model, 0, samples, 3, make_model),
        lambda: train.main(flags),
    ):
        seen.clear()
        call()
        assert set(seen) == {"ieee"}
        assert read_precisions() == ["tf32"] * 3


def test_a_third_of_the_unused_memory_of_a_gpu_may_be_cached(monkeypatch):
    """Memory that torch has reserved and does not use counts as unused: else there would be less after each epoch."""
    values = {"mem_get_info": (50, 80), "memory_reserved": 20, "memory_allocated": 10}
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.choose_cache_bytes(SimpleNamespace(type="cuda")) == 20
    assert devices.choose_cache_bytes(torch.device("cpu")) == devices.CACHE_BYTES
