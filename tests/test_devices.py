from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import data
import devices
import dib
import models
import nc1
import train
from tests.toys import Toy, clusters

KINDS = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions() -> list[str]:
    return [kind.fp32_precision for kind in KINDS]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Allowed, as a caller may have it."""
    found = precisions()
    for kind in KINDS:
        kind.fp32_precision = "tf32"
    yield
    for kind, precision in zip(KINDS, found, strict=True):
        kind.fp32_precision = precision


@pytest.mark.parametrize("before", ["ieee", "tf32", "none"])
def test_tf32_is_off_within_and_afterwards_as_it_was(tf32, before):
    for kind in KINDS:
        kind.fp32_precision = before

    @devices.exact_float32()
    def measure() -> None:
        assert precisions() == ["ieee"] * 3
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        measure()
    assert precisions() == [before] * 3


def test_measures_and_runs_go_without_tf32(tf32, tmp_path, monkeypatch):
    """Also where they are called from Python; the range test and the training, too."""
    seen = []

    def watched(batch):
        return lambda *those: seen.extend(precisions()) or batch(*those)

    monkeypatch.setattr(Toy, "batch", watched(Toy.batch))
    monkeypatch.setattr(data.Split, "batch", watched(data.Split.batch))
    split, build = clusters(30, 6, 3), partial(models.build, "MLP", (6,), 3, widths=(4,))
    model = build()
    for run in (
        lambda: nc1.measure(model, models.taps(model), split, 3),
        lambda: dib.measure(model, 0, split, 3, build),
        lambda: train.main(["--epochs", "1", "--tune", "--no-dib", "--device", "cpu", "--run-dir", f"{tmp_path}/run"]),
    ):
        seen.clear()
        run()
        assert set(seen) == {"ieee"}
        assert precisions() == ["tf32"] * 3


def test_bytes_to_keep_are_a_share_of_what_a_gpu_has_left(monkeypatch):
    """What torch holds and does not use counts as free: it would be less from epoch to epoch."""
    of_driver = {"mem_get_info": (50, 80), "memory_reserved": 20, "memory_allocated": 10}
    for name, value in of_driver.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert devices.bytes_to_keep(SimpleNamespace(type="cuda")) == 20
    assert devices.bytes_to_keep(torch.device("cpu")) == devices.KEEP_BYTES
