"""What several tests need: small data, flags of short runs, and checks of a run's folder.

It imports nothing but torch and pytest beside the project: test_cuda.py runs where nothing else is installed.
"""

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

import data
import models
import nc1
import train
from layerwise.samples import Samples
from layerwise.schema import COLUMNS, CONVERGENCE, NOISE
from tools.evidence import QUICK, make_clusters, read_results
from training.hardware import PRECISIONS

ROOT = Path(train.__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def make_image_source(*shape: int) -> Callable[[str, bool], tuple]:
    """Return a source of 40 + 20 images of ten classes, each class with a brightness of its own."""

    def load(root: str, download: bool) -> tuple:
        g = torch.Generator().manual_seed(0)
        y = [torch.arange(n) % 10 for n in (40, 20)]
        x = [(torch.randint(0, 200, (len(c), *shape), generator=g) + 5 * c[:, None, None, None]).byte() for c in y]
        return x[0], y[0], x[1], y[1], 10

    return load


LAST = {"MLP": "hidden2", "MNISTNet": "hidden1", "CIFARNet": "group3", "ResNet": "block8", "ConvNeXt": "block18"}


def check_run(monkeypatch, folder: Path, model: str, device: str, precision: str, *flags: str) -> None:
    """Run every part on the images of the fixture `pictures`.

    The tables hold the values of the weights in the checkpoint, and training steps have the given precision.
    """
    dtypes = set()

    def cross_entropy(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        dtypes.update([logits.dtype] if logits.requires_grad else [])
        return F.cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(train, "F", SimpleNamespace(cross_entropy=cross_entropy))
    options = ["--device", device, "--precision", precision, "--run-dir", str(folder), *flags]
    options += ["--widths", "4", "3"] if model == "MLP" else []
    train.main(["-m", model, "-d", "CIFAR10", "-b", "20", "--dib-epochs", "1", "--splits", LAST[model], *options])
    assert dtypes == {PRECISIONS[precision]}

    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert bool(checkpoint["scaler"]) == (precision == "float16")
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in checkpoint["model"].values() if w.dim() == 4)
    dataset = data.load("CIFAR10")
    network = models.build(model, (3, 32, 32), 10, **({"widths": (4, 3)} if model == "MLP" else {})).eval()
    network.load_state_dict(checkpoint["model"])
    x, y = dataset.test.batch(torch.arange(20))
    assert x.is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        loss = F.cross_entropy(network(x), y).item()
    expected = nc1.measure(network, models.layers(network), dataset.test, 10)

    tables = {}
    for name in COLUMNS:
        with (folder / name).open() as file:
            rows = list(csv.DictReader(file))
        tables[name] = [row for row in rows if row["set"] == "test" and row["epoch"] == rows[-1]["epoch"]]
    assert float(tables["epochs.csv"][0]["loss"]) == pytest.approx(loss, rel=1e-3)
    values = {row["layer"]: float(row["nc1"]) for row in tables["nc1.csv"] if row["layer"] != "input"}
    assert values == pytest.approx({layer: value.nc1 for layer, value in expected.items()}, rel=1e-2, nan_ok=True)
    assert {row["split"] for row in tables["dib.csv"]} == {LAST[model]}
    assert all(math.isfinite(float(row["loss"])) for row in tables["dib.csv"])


def write_run(
    folder: Path,
    layers: list[str],
    seed: int = 0,
    epochs: int = 3,
    factors: tuple[int, ...] = (),
    enumerations: int = 1,
    linear: tuple[str, ...] = (),
    **flags: object,
) -> Path:
    """Write the tables of a run that never ran. NC1 halves from layer to layer, and information grows over the epochs.

    NC1 of the input is 100. The probes of digit 1 are 0.01 nats above `upper`. The information of a digit grows by
    0.01 nats from one enumeration to the next. In every epoch the information of the shuffled labels is 0.02 nats, and
    that of the held-out samples 0.15.

    Parameters:
        factors: also write a convergence.csv of these factors, in which information grows with the factor, and probes
            of digit 1 reach `upper` from factor 4.
        enumerations: number of random enumerations.
        linear: the splits whose probes are linear. Their `lower` is 1e-6 nats below `upper`. Also write a noise.csv, in
            which the information of the digits is 0.08 nats.
        flags: hparams. With controls=False the rows of the controls and noise.csv are left out.
    """
    folder.mkdir()
    hparams = {"model": "MLP", "data": "SZT", "seed": seed, "epochs": epochs, "run_dir": str(folder)}
    hparams |= {"enumerations": enumerations, "controls": True, "linear_splits": list(linear)}
    hparams |= {"num_classes": 2, "dib_samples": {"train": 60, "test": 60}, **flags}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    digits = [(i, digit, 0.01 * (i - 1)) for i in range(1, enumerations + 1) for digit in ("0", "1")]

    def list_probes(set_name: str, split: str, nats: float, above: float, more_of_labels: float = 0.2) -> list[tuple]:
        """Return the columns from `set` on. nats: information of the digits. above: loss - upper of digit 1."""
        told = [(0, "y", nats + more_of_labels), *((i, digit, nats + more) for i, digit, more in digits)]
        if hparams["controls"]:
            told += [(0, "shuffled", 0.02), *([(0, "held-out", 0.15)] if set_name == "test" else [])]
        found = []
        for enumeration, labeling, information in told:
            upper = 0.69 - information
            lower = upper - 1e-6 if split in linear and labeling != "held-out" else 0.0
            loss = upper + above * (labeling == "1")
            found.append((set_name, split, enumeration, labeling, 0.69, loss, lower, upper))
        return found

    rows: dict[str, list] = {name: [] for name in COLUMNS}
    for epoch in range(1, epochs + 1):
        for each, more in (("train", 1.0), ("test", 1.5)):
            rows["epochs.csv"].append((epoch, each, (more + seed) / epoch, 1 - 0.5**epoch, 0))
            if epoch == 1:
                rows["nc1.csv"].append((epoch, each, "input", 12, 1, (1 + seed) * more * 100, 1, 0))
            for k, layer in enumerate(layers, 1):
                rows["nc1.csv"].append((epoch, each, layer, 8, 1, (1 + seed) * more * 100 * 0.5**k / epoch, 1, 0))
            for split in layers if epoch > 1 else ["input", *layers]:
                told = 0.1 * epoch * (1 + 0.1 * seed)
                rows["dib.csv"] += [(epoch, *probe) for probe in list_probes(each, split, told, 0.01)]
    if factors:
        rows["convergence.csv"] = [
            (factor, factor * steps, epochs, *probe)
            for factor in factors
            for each, steps in (("train", 270), ("test", 60))
            for split in ["input", *layers]
            for probe in list_probes(each, split, 0.04 * factor * (1 + 0.1 * seed), 0.01 * (factor < 4), 0)
        ]
    if linear and hparams["controls"]:
        noise = [probe for each in ("train", "test") for split in linear for probe in list_probes(each, split, 0.08, 0)]
        rows["noise.csv"] = [probe for probe in noise if probe[3] != "held-out"]
    columns = {**COLUMNS, "convergence.csv": CONVERGENCE, "noise.csv": NOISE}
    for name, lines in rows.items():
        (folder / name).write_text("\n".join([columns[name], *(",".join(map(str, line)) for line in lines)]) + "\n")
    return folder


def refusal(capsys, *flags: str) -> str:
    """Return the one line with which train.py refuses flags, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(list(flags))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


def assert_same_run(a: Path, b: Path) -> None:
    """Assert that two runs have the same tables, but for the seconds, the same weights and the same random state."""
    assert read_results(a) == read_results(b)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert torch.equal(one["random"], other["random"])


def run_torchrun(*arguments: str) -> None:
    """Run a program in two processes of one CPU thread each."""
    done = subprocess.run([*TORCHRUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def make_mlp() -> nn.Sequential:
    """Build a float64 MLP for 6 numbers and 3 classes, of the blocks flatten, hidden1, hidden2 and classifier."""
    return models.build("MLP", (6,), 3, widths=(5, 4), nonlinearity="Tanh").double()


def make_wide_mlp() -> nn.Sequential:
    """Build a float64 MLP for 6 numbers and 3 classes, with hidden layers of 17, 16, 4, 18 and 17 units.

    Probes of splits 0 to 3 have several starts, because of the layer of 4 units, and those of splits 4 and 5 have one.
    """
    return models.build("MLP", (6,), 3, widths=(17, 16, 4, 18, 17), nonlinearity="Tanh").double()


def make_wide_conv_net() -> nn.Sequential:
    """Build a float64 network for images (2, 5, 5) and 3 classes, with filters wide enough for orthogonalised steps.

    Its last filters see one pixel and padding.
    """
    first = nn.Sequential(nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3))
    last = nn.Sequential(nn.Conv2d(16, 17, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten())
    return nn.Sequential(first, last, nn.Linear(17, 3)).double()


def make_conv_net() -> nn.Sequential:
    """Build a network of float64 with convolutions and BatchNorm, for images (1, 5, 5) and 3 classes."""
    conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3))
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(12, 3)).double()


def make_random_net() -> nn.Sequential:
    """Build a network of float64 that draws random numbers in training: stochastic depth, as in ConvNeXt, and dropout.

    It is for inputs of 6 numbers and 3 classes.
    """
    return nn.Sequential(nn.Linear(6, 6), StochasticDepth(0.4, "row"), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def make_toy_samples(N: int = 90, shape: tuple[int, ...] = (6,)) -> Samples:
    """Return float64 samples of this shape, in 3 Gaussian classes."""
    samples = make_clusters(N, math.prod(shape), 3)
    return Samples(samples.inputs.double().view(N, *shape), samples.labels)


# Flags of short runs: of any model but the MLP, of a small MLP, and of an MLP with enough batches for a range test.
NO_MLP = ["--epochs", "2", "--dib-epochs", "2", "--device", "cpu"]
SMALL = [*NO_MLP, "--widths", "4", "3"]
TUNED = [*QUICK, "--train-size", "1280", "-b", "128", "--widths", "10", "7", "-nl", "Tanh"]
