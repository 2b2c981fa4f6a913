"""What several tests need: small data with the interface of data.Split, and a check of a whole run.

It imports nothing but torch and pytest beside the project, as test_cuda.py runs where nothing else may be."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import models
import nc1
import runs
import train
from flags import PRECISIONS


class Toy:
    def __init__(self, x: torch.Tensor, labels: torch.Tensor):
        self.x, self.labels = x, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[indices], self.labels[indices]


def random_images(*shape: int) -> Callable[[str, bool], tuple]:
    """A source of 40 + 20 images of ten classes, each of a brightness of its own."""

    def load(root: str, download: bool) -> tuple:
        g = torch.Generator().manual_seed(0)
        y = [torch.arange(n) % 10 for n in (40, 20)]
        x = [(torch.randint(0, 200, (len(c), *shape), generator=g) + 5 * c[:, None, None, None]).byte() for c in y]
        return x[0], y[0], x[1], y[1], 10

    return load


def clusters(N: int, d: int, C: int, spread: float = 1.0, seed: int = 0) -> Toy:
    """Gaussian classes of different sizes around means of unit scale, every class present."""
    g = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(C), torch.rand(N - C, generator=g).square().mul(C).long()])
    x = torch.randn(C, d, generator=g)[y] + spread * torch.randn(N, d, generator=g)
    return Toy(x, y)


LAST = {"MLP": "hidden2", "MNISTNet": "hidden1", "CIFARNet": "group3", "ResNet": "block8", "ConvNeXt": "block18"}


def check_run(monkeypatch, folder: Path, model: str, device: str, precision: str, *flags: str) -> None:
    """A run of every part on the fixture pictures: its figures are those of the weights it saved, its training steps
    had the precision that was asked for."""
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
    expected = nc1.measure(network, models.taps(network), dataset.test, 10)

    tables = {}
    for name in runs.COLUMNS:
        with (folder / name).open() as file:
            rows = list(csv.DictReader(file))
        tables[name] = [row for row in rows if row["set"] == "test" and row["epoch"] == rows[-1]["epoch"]]
    assert float(tables["epochs.csv"][0]["loss"]) == pytest.approx(loss, rel=1e-3)
    values = {row["layer"]: float(row["nc1"]) for row in tables["nc1.csv"] if row["layer"] != "input"}
    assert values == pytest.approx({tap: its.nc1 for tap, its in expected.items()}, rel=1e-2, nan_ok=True)
    assert {row["split"] for row in tables["dib.csv"]} == {LAST[model]}
    assert all(math.isfinite(float(row["loss"])) for row in tables["dib.csv"])


def measured(
    folder: Path, layers: list[str], seed: int = 0, epochs: int = 3, factors: tuple[int, ...] = (), **flags: object
) -> Path:
    """A run's CSVs without a run: NC1 halves from layer to layer, and what decoders tell grows over the epochs.

    NC1 of the input is 100. The heads of labeling 1 did not find it all, by 0.01 nats. factors: write a settle.csv of
    these, too, in which what decoders tell grows with them, and the heads of labeling 1 find it all from a factor of 4.
    """
    folder.mkdir()
    hparams = {"model": "MLP", "data": "SZT", "seed": seed, "epochs": epochs, "run_dir": str(folder)}
    hparams |= {"num_classes": 2, "dib_samples": {"train": 60, "test": 60}, **flags}
    (folder / "hparams.json").write_text(json.dumps(hparams))
    rows: dict[str, list] = {name: [] for name in runs.COLUMNS}
    for epoch in range(1, epochs + 1):
        for each, more in (("train", 1.0), ("test", 1.5)):
            rows["epochs.csv"].append((epoch, each, (more + seed) / epoch, 1 - 0.5**epoch, 0))
            if epoch == 1:
                rows["nc1.csv"].append((epoch, each, "input", 12, 1, (1 + seed) * more * 100, 1, 0))
            for k, layer in enumerate(layers, 1):
                rows["nc1.csv"].append((epoch, each, layer, 8, 1, (1 + seed) * more * 100 * 0.5**k / epoch, 1, 0))
            for split in layers if epoch > 1 else ["input", *layers]:
                for labeling in ("0", "1", "y"):
                    told = 0.1 * epoch * (1 + 0.1 * seed) + (labeling == "y") * 0.2
                    bound = 0.69 - told
                    loss = bound + 0.01 * (labeling == "1")
                    rows["dib.csv"].append((epoch, each, split, 0, labeling, 0.69, loss, bound))
    settled = [
        (factor, factor * steps, each, split, 0, labeling, 0.69, bound + 0.01 * (labeling == "1" and factor < 4), bound)
        for factor in factors
        for each, steps in (("train", 270), ("test", 60))
        for split in ["input", *layers]
        for labeling in ("0", "1", "y")
        for bound in [0.69 - 0.04 * factor * (1 + 0.1 * seed)]
    ]
    columns = dict(runs.COLUMNS)
    if factors:
        rows["settle.csv"] = settled
        columns["settle.csv"] = "factor,steps,set,split,permutation,labeling,entropy,loss,bound"
    for name, lines in rows.items():
        (folder / name).write_text("\n".join([columns[name], *(",".join(map(str, line)) for line in lines)]) + "\n")
    return folder
