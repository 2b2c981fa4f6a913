import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import devices
import heads
import train
from tests import gpu, lookalike
from tests.test_train import ROOT


@pytest.fixture
def table(tmp_path, monkeypatch) -> Callable[..., tuple[int, list[dict]]]:
    """The exit status of the look-alike's table and its rows, on tiny sizes."""
    if torch.cuda.is_available():
        pytest.skip("make check-gpu is this on a GPU")

    def make(*flags: str) -> tuple[int, list[dict]]:
        sizes = ["--model", "MNISTNet", "--train-size", "40", "--test-size", "20", "--batch-size", "20"]
        options = ["--dib-epochs", "1", "--data-dir", str(tmp_path), "--out", str(tmp_path / "gpu.csv")]
        with lookalike.cuda(monkeypatch), pytest.raises(SystemExit) as end:
            gpu.main([*sizes, *options, *flags])
        with (tmp_path / "gpu.csv").open() as file:
            return end.value.code, list(csv.DictReader(file))

    monkeypatch.setattr(data, "SOURCES", {**data.SOURCES})
    return make


@pytest.fixture
def seen(monkeypatch) -> list[tuple[Counter, Counter]]:
    """Of every run that is timed: (dtype, precision of products and of convolutions) of its losses that have a
    gradient, one a step, and (layout of images, layout of weights) of the convolutions of these images."""
    found, now = [], []  # of the runs that are over and the one that is not
    timed, convolve = gpu.timed, nn.Conv2d.forward

    def layout(x: torch.Tensor) -> str:
        return "channels last" if x.is_contiguous(memory_format=torch.channels_last) else "channels first"

    def watched(run: Callable[[], object], *rest) -> tuple:
        def watched_run() -> None:
            now.append((Counter(), Counter()))
            run()
            found.append(now.pop())

        return timed(watched_run, *rest)

    def loss(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        if now and logits.requires_grad:
            precisions = (kind.fp32_precision for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))
            now[-1][0][str(logits.dtype).removeprefix("torch."), *precisions] += 1
        return F.cross_entropy(logits, *rest, **options)

    def forward(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if now and layer.in_channels == 3:
            now[-1][1][layout(x), layout(layer.weight)] += 1
        return convolve(layer, x)

    monkeypatch.setattr(gpu, "timed", watched)
    for module in (gpu, heads, train):
        monkeypatch.setattr(module, "F", SimpleNamespace(cross_entropy=loss))
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return found


def test_the_table_of_a_gpu_is_made_on_the_look_alike(table, seen, capsys):
    """Every part of it; what a row says of its steps is how they were taken."""
    status, rows = table("--splits", "input", "conv2", "--no-tests")
    assert status == 0
    assert {row["card"] for row in rows} == {"a look-alike of CUDA"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    seconds = {row["what"]: float(row["seconds"]) for row in rows}
    for name in ("input", "conv2"):
        for kind in ("tuned", "thesis"):
            assert {f"DIB {name}, {kind}, {precision}" for precision in gpu.PRECISIONS} <= set(seconds)
    (dib,) = (row for row in rows if row["what"] == "DIB conv2, tuned, TF32")
    assert float(dib["scaled"]) == pytest.approx(15 * float(dib["seconds"]))
    first, second = (float(word) for word in re.findall(r"\d+\.\d+", rows[-1]["detail"]))
    whole = float(rows[-1]["seconds"])  # what comes before the first epoch, too
    assert first + second < 1.01 * whole
    assert float(rows[-1]["scaled"]) == pytest.approx(whole + 13 * second, rel=0.01)
    assert capsys.readouterr().out.count("\n| ") == 1 + len(rows)
    for row, (losses, layouts) in zip(rows, seen, strict=True):
        kind, *words = row["what"].split(", ")
        precision = next((word for word in words if word in gpu.PRECISIONS), None)
        if precision:
            dtype, products = ("float32", "tf32") if precision == "TF32" else (precision, "ieee")
            epochs = 3 if kind == "training epoch" else 1
            assert losses == {(dtype, products, products): epochs * int(row["detail"].split()[0])}, row
        if kind == "bare steps":
            assert set(layouts) == {(words[-1], words[-1])}, row


def test_a_part_that_fails_has_a_row_and_the_others_go_on(table, monkeypatch, capsys):
    def training(bench: gpu.Bench) -> Iterator[gpu.Row]:
        yield gpu.Row("a step", "of this test", 1.0)
        raise RuntimeError("out of\n  memory")

    popen, output = gpu.subprocess.Popen, "print('== 1 failed =='); raise SystemExit(1)"
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda _, **rest: popen([sys.executable, "-c", output], **rest))
    monkeypatch.setattr(gpu, "training", training)
    status, rows = table("--splits", "conv7")
    assert status == 1
    what = ["tests", "tests", "a step", "training", "NC1", "DIB", "thesis run"]
    assert [row["what"] for row in rows] == what
    failed = [i for i, row in enumerate(rows) if not row["seconds"]]
    assert failed == [1, 3, 5, 6]
    assert rows[0]["detail"] == "1 failed"
    wanted = ["pytest.*exit status 1", "RuntimeError: out of memory$", "ValueError: .*conv7", "ValueError: .*conv7"]
    for i, words in zip(failed, wanted, strict=True):
        assert re.match(f"failed: .*{words}", rows[i]["detail"]), rows[i]
    shown = capsys.readouterr().out.split("|---")[-1]
    assert re.findall(r"\n\| (.*?) \|", shown) == what


def test_the_table_is_shown_of_what_was_stopped(table, monkeypatch, capsys):
    def stopped(bench: gpu.Bench) -> Iterator[gpu.Row]:
        yield gpu.Row("a step", "of this test", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "training", stopped)
    with pytest.raises(KeyboardInterrupt):
        table("--no-tests")
    assert "\n| a step | of this test | 1 |" in capsys.readouterr().out


def test_heads_are_timed_in_the_precision_that_the_row_names(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    for name, of_products in (("float32", "ieee"), ("TF32", "tf32"), ("bfloat16", "ieee")):
        with gpu.precision(name):
            assert [kind.fp32_precision for kind in kinds] == [of_products] * 2
            assert devices.has_bfloat16(torch.device("cuda")) == (name == "bfloat16")
        assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.slow  # seconds to import torch again
def test_the_tests_have_a_row(monkeypatch, capfd):
    """One of them here; its output is shown as it comes."""
    popen = gpu.subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda command, **rest: popen([*command, "-k", "test_relabel"], cwd=ROOT, **rest)
    )
    (row,) = gpu.tests()
    assert row.what == "tests"
    assert row.detail.startswith("1 passed")
    assert "test_relabel PASSED" in capfd.readouterr().out


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "no CUDA device is to be had here" in capsys.readouterr().err
