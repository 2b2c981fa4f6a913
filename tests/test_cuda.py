"""What needs a CUDA device; `make check-gpu` runs this file. It imports nothing but torch, torchvision and pytest."""

from functools import partial

import pytest
import torch
from torch import nn

import dib
import heads
import models
import nc1
import train
from flags import PRECISIONS
from relabel import relabel
from tests.toys import Toy, check_run, clusters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")


def on_cuda(split: Toy) -> Toy:
    return Toy(split.x.cuda(), split.labels.cuda())


def convolutional() -> nn.Sequential:
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    return nn.Sequential(conv, nn.Dropout(0.2), nn.Flatten(), nn.Linear(12, 3))


def test_relabel():
    labels = torch.arange(500) % 7
    assert torch.equal(relabel(labels.cuda(), 7).cpu(), relabel(labels, 7))


@pytest.mark.parametrize("keep_bytes", [0, nc1.KEEP_BYTES])
def test_nc1_is_that_of_the_cpu(keep_bytes):
    torch.manual_seed(0)
    split, model = clusters(200, 12, 3), nn.Sequential(nn.Linear(12, 9), nn.Sequential(nn.Tanh(), nn.Linear(9, 5)))
    taps = {"first": model[0], "second": model[1]}
    expected = nc1.measure(model, taps, split, 3)
    got = nc1.measure(model.cuda(), taps, on_cuda(split), 3, 64, keep_bytes)
    assert {t: v[:2] for t, v in got.items()} == {t: v[:2] for t, v in expected.items()}
    assert {t: v[2] for t, v in got.items()} == pytest.approx({t: v[2] for t, v in expected.items()}, rel=1e-3)


def test_plain_heads_are_those_of_the_cpu():
    """In float64, from the same start and on the same batches: both are drawn on the CPU."""
    split = clusters(90, 6, 3)
    split.x = split.x.double()

    def build() -> nn.Sequential:
        return models.build("MLP", (6,), 3, widths=(5, 4), nonlinearity="Tanh").double()

    torch.manual_seed(0)
    model, recipe = build(), heads.Thesis(partial(torch.optim.SGD, lr=0.1, fused=True), epochs=5)
    expected = dib.measure(model, 2, split, 3, build, recipe, batch_size=40, labelings=2)
    got = dib.measure(model.cuda(), 2, on_cuda(split), 3, build, recipe, batch_size=40, labelings=2)
    assert [h.loss for h in got] == pytest.approx([h.loss for h in expected], rel=1e-6)


def test_heads_that_draw_repeat_and_leave_the_random_state():
    split = clusters(90, 25, 3)
    split.x = split.x.view(90, 1, 5, 5)
    torch.manual_seed(0)
    model, recipe = convolutional().cuda(), heads.Thesis(partial(torch.optim.SGD, lr=0.01), epochs=2)
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    a, b = (dib.measure(model, 0, on_cuda(split), 3, convolutional, recipe) for _ in range(2))
    assert [h.loss for h in a] == pytest.approx([h.loss for h in b], rel=1e-4)  # cuDNN may add in another order
    assert torch.equal(random[0], torch.get_rng_state())
    assert torch.equal(random[1], torch.cuda.get_rng_state())


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model", models.ARCHITECTURES)
def test_two_epochs_of_every_model(tmp_path, pictures, monkeypatch, model, precision, compiled):
    torch._dynamo.reset()  # it compiles a function eight times at most, and all models are run by the same one
    torch._dynamo.utils.counters.clear()
    check_run(monkeypatch, tmp_path / "run", model, "cuda", precision, "--epochs", "2", compiled)
    assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == (compiled == "--compile")


def test_training_steps_do_not_synchronise(tmp_path, pictures, monkeypatch):
    """From the first loss of an epoch to the clock at its end, whatever waits for the device raises."""
    cross_entropy, clock = train.F.cross_entropy, train.clock

    def strict(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        if logits.requires_grad:
            torch.cuda.set_sync_debug_mode("error")
        return cross_entropy(logits, *rest, **options)

    def relaxed(device: torch.device) -> float:
        torch.cuda.set_sync_debug_mode("default")
        return clock(device)

    monkeypatch.setattr(train.F, "cross_entropy", strict)
    monkeypatch.setattr(train, "clock", relaxed)
    flags = ["-m", "CIFARNet", "-d", "CIFAR10", "-b", "10", "--no-dib", "--no-nc1", "--no-compile", "--epochs", "2"]
    train.main([*flags, "--run-dir", str(tmp_path / "run")])


@pytest.mark.parametrize("model", ["MLP", "CIFARNet", "ResNet", "ConvNeXt"])
def test_deterministic_runs_repeat_also_when_resumed(tmp_path, pictures, model):
    """The models that pool, normalise and draw; every byte of the CSVs but the seconds."""
    flags = ["-m", model, "-d", "CIFAR10", "-b", "20", "--dib-epochs", "2", "--splits", "input", "--deterministic"]
    for name, epochs in (("a", ["2"]), ("b", ["2"]), ("c", ["1", "2"])):
        for i, number in enumerate(epochs):
            train.main([*flags, "--epochs", number, "--run-dir", str(tmp_path / name), *["--resume"] * (i > 0)])
    a, b, c = ([(tmp_path / run / name).read_text() for name in ("nc1.csv", "dib.csv")] for run in "abc")
    assert a == b
    assert a == c


def test_a_loss_that_is_not_finite_is_seen_without_waiting_for_it(tmp_path, pictures, capsys):
    flags = ["-m", "MLP", "-d", "CIFAR10", "-b", "4", "-lr", "1e18", "-opt", "SGD", "--precision", "float32"]
    with pytest.raises(SystemExit) as end:
        train.main([*flags, "--no-compile", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert "the training loss is not finite in epoch 1, step" in capsys.readouterr().err
