import csv
import re

import pytest
import torch

import data
from tests import gpu, lookalike
from tests.test_train import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="make check-gpu is this on a GPU")
def test_the_table_of_a_gpu_is_made_on_the_look_alike(tmp_path, monkeypatch, capsys):
    """Every part of it, on tiny sizes."""
    monkeypatch.setattr(data, "SOURCES", {**data.SOURCES})
    sizes = ["--model", "MNISTNet", "--splits", "input", "conv2", "--train-size", "40", "--test-size", "20"]
    flags = [*sizes, "--batch-size", "20", "--dib-epochs", "1", "--data-dir", str(tmp_path), "--no-tests"]
    with lookalike.cuda(monkeypatch), pytest.raises(SystemExit) as end:
        gpu.main([*flags, "--out", str(tmp_path / "gpu.csv")])
    assert end.value.code == 0
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
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


def test_heads_are_timed_in_the_precision_that_the_row_names(monkeypatch):
    monkeypatch.setitem(gpu.heads.BFLOAT16_ON, "cuda", lambda: True)
    kinds = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [kind.fp32_precision for kind in kinds]
    for name, of_products in (("float32", "ieee"), ("TF32", "tf32"), ("bfloat16", "ieee")):
        with gpu.precision(name):
            assert [kind.fp32_precision for kind in kinds] == [of_products] * 2
            assert ("cuda" in gpu.heads.BFLOAT16_ON) == (name == "bfloat16")
        assert [kind.fp32_precision for kind in kinds] == before


@pytest.mark.slow  # seconds to import torch again
def test_the_tests_have_a_row(monkeypatch, capfd):
    """One of them here; its output is shown as it comes."""
    popen = gpu.subprocess.Popen
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda command, **rest: popen([*command, "-k", "test_relabel"], cwd=ROOT, **rest)
    )
    status, row = gpu.tests()
    assert (status, row.what) == (0, "tests")
    assert row.detail.startswith("1 passed")
    assert "test_relabel PASSED" in capfd.readouterr().out


def test_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "no CUDA device is to be had here" in capsys.readouterr().err
