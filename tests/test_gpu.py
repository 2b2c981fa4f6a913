"""tools/gpu.py makes its table on the look-alike of CUDA."""

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
import train
from layerwise import devices
from layerwise.probes import group
from tests import lookalike
from tests.toys import ROOT
from tools import gpu


@pytest.fixture
def make_table(tmp_path, monkeypatch) -> Callable[..., tuple[int, list[dict]]]:
    """Return a function that makes the table of the look-alike in tiny sizes, and returns the exit status and rows."""
    if torch.cuda.is_available():
        pytest.skip("make check-gpu is this on a GPU")

    def make(*flags: str) -> tuple[int, list[dict]]:
        sizes = ["--model", "MNISTNet", "--train-size", "40", "--test-size", "20", "--batch-size", "20"]
        options = ["--dib-epochs", "1", "--data-dir", str(tmp_path), "--out", str(tmp_path / "gpu.csv")]
        with lookalike.fake_cuda(monkeypatch), pytest.raises(SystemExit) as end:
            gpu.main([*sizes, *options, *flags])
        with (tmp_path / "gpu.csv").open() as file:
            return end.value.code, list(csv.DictReader(file))

    monkeypatch.setattr(data, "SOURCES", {**data.SOURCES})
    return make


@pytest.fixture
def seen(monkeypatch) -> list[tuple[Counter, Counter]]:
    """Return two counts for each call that is timed.

    The first is of losses with a gradient, one a step, by (dtype, precision of products, precision of convolutions).
    The second is of convolutions of images, by (layout of the images, layout of the weights).
    """
    found, current = [], []  # of the calls that have returned, and of the one that has not
    time_call, convolve = gpu.time_call, nn.Conv2d.forward

    def get_layout(x: torch.Tensor) -> str:
        return "channels last" if x.is_contiguous(memory_format=torch.channels_last) else "channels first"

    def watch_call(run: Callable[[], object], *rest) -> tuple:
        def watched() -> None:
            current.append((Counter(), Counter()))
            run()
            found.append(current.pop())

        return time_call(watched, *rest)

    def cross_entropy(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        if current and logits.requires_grad:
            precisions = (kind.fp32_precision for kind in (torch.backends.cuda.matmul, torch.backends.cudnn.conv))
            current[-1][0][(str(logits.dtype).removeprefix("torch."), *precisions)] += 1
        return F.cross_entropy(logits, *rest, **options)

    def forward(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if current and layer.in_channels == 3:
            current[-1][1][get_layout(x), get_layout(layer.weight)] += 1
        return convolve(layer, x)

    monkeypatch.setattr(gpu, "time_call", watch_call)
    for module in (gpu, group, train):
        monkeypatch.setattr(module, "F", SimpleNamespace(cross_entropy=cross_entropy))
    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    return found


def test_the_table_of_a_gpu_is_made_on_the_look_alike(make_table, seen, capsys):
    """The table has every part. Steps are taken in the precision and the layout that their row names."""
    status, rows = make_table("--splits", "input", "conv2", "--no-tests")
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
    whole = float(rows[-1]["seconds"])  # with the time before the first epoch
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


def test_a_part_that_fails_has_a_row_and_the_others_go_on(make_table, monkeypatch, capsys):
    def fail(case: gpu.Case) -> Iterator[gpu.Row]:
        yield gpu.Row("a step", "of this test", 1.0)
        raise RuntimeError("out of\n  memory")

    popen, output = gpu.subprocess.Popen, "print('== 1 failed =='); raise SystemExit(1)"
    monkeypatch.setattr(gpu.subprocess, "Popen", lambda _, **rest: popen([sys.executable, "-c", output], **rest))
    monkeypatch.setattr(gpu, "time_training", fail)
    status, rows = make_table("--splits", "conv7")
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


def test_the_table_is_printed_when_it_is_interrupted(make_table, monkeypatch, capsys):
    def interrupt(case: gpu.Case) -> Iterator[gpu.Row]:
        yield gpu.Row("a step", "of this test", 1.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "time_training", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_table("--no-tests")
    assert "\n| a step | of this test | 1 |" in capsys.readouterr().out


def test_probes_are_timed_in_the_precision_that_the_row_names(monkeypatch):
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: True)
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    for name, of_products in (("float32", "ieee"), ("TF32", "tf32"), ("bfloat16", "ieee")):
        with gpu.use_precision(name):
            assert [kind.fp32_precision for kind in kinds] == [of_products] * 2
            assert devices.has_bfloat16(torch.device("cuda")) == (name == "bfloat16")
        assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.slow  # it takes seconds to import torch again
def test_the_tests_have_a_row(monkeypatch, capfd):
    """One of the tests runs here. Its output is printed as it comes."""
    popen = gpu.subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess,
        "Popen",
        lambda command, **rest: popen([*command, "-k", "test_relabel_is_that_of_the_cpu"], cwd=ROOT, **rest),
    )
    (row,) = gpu.run_tests()
    assert row.what == "tests"
    assert row.detail.startswith("1 passed")
    assert "test_relabel_is_that_of_the_cpu PASSED" in capfd.readouterr().out


def test_without_a_gpu_it_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "expected a CUDA device, found none" in capsys.readouterr().err
