"""DIB of a run's last epoch again, with more steps."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dib
import runs
import settle
import train
from analysis import gallery, tables
from tests.test_resume import TINY, half, whole  # noqa: F401 (fixtures)
from tests.test_train import ROOT


def lines(path: Path, *starts: str) -> list[str]:
    return [line for line in path.read_text().splitlines() if line.startswith(starts)]


def refusal(capsys, folder: Path, *more: str) -> str:
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        settle.main([str(folder), *more])
    assert stop.value.code == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (error,) = capsys.readouterr().err.splitlines()
    return error


@pytest.mark.parametrize("kind", ["tuned", "thesis"])
def test_once_the_steps_are_the_heads_of_the_last_epoch(tmp_path, kind):
    run = tmp_path / "run"
    train.main([*TINY, "--heads", kind, "--labelings", "2", "--run-dir", str(run)])
    checkpoint = (run / "checkpoint.pt").read_bytes()
    settle.main([str(run)])
    (header,) = lines(run / "settle.csv", "factor")
    assert header == runs.SETTLE
    found = [line.split(",", 2) for line in lines(run / "settle.csv", "1,") if ",input," not in line]
    assert [f"2,{rest}" for _, _, rest in found] == lines(run / "dib.csv", "2,")
    steps = {name: 20 if kind == "tuned" else -(-n // 16) for name, n in (("train", 64), ("test", 615))}
    for factor in (1, 2, 4, 8):
        of_factor = [line.split(",") for line in lines(run / "settle.csv", f"{factor},")]
        assert {(line[2], int(line[1])) for line in of_factor} == {(n, factor * s) for n, s in steps.items()}
        assert [line[2:6] for line in of_factor if line[3] != "input"] == [rest.split(",")[:4] for _, _, rest in found]
    of_input = [line.split(",") for line in lines(run / "settle.csv", "1,") if ",input," in line]
    first = [line.split(",") for line in lines(run / "dib.csv", "0,") if ",input," in line]
    assert [line[2:6] for line in of_input] == [line[1:5] for line in first]  # measured once, in the first epoch
    for a, b in zip(of_input, first, strict=True):
        assert float(a[7]) == pytest.approx(float(b[6]), rel=1e-4)
    bounds = {tuple(line[2:6]): float(line[8]) for line in of_input}
    for _, _, rest in found:  # input holds what any layer does
        name, _, *which, _, _, bound = rest.split(",")
        assert bounds[name, "input", *which] <= float(bound)
    assert (run / "checkpoint.pt").read_bytes() == checkpoint
    train.main([*TINY, "--heads", kind, "--labelings", "2", "--epochs", "3", "--resume", "--run-dir", str(run)])
    assert not (run / "settle.csv").exists()  # it was of epoch 2


def test_more_steps_find_more_and_a_second_call_replaces_the_first(whole, monkeypatch, capsys):  # noqa: F811
    settle.main([str(whole)])
    first = (whole / "settle.csv").read_text()
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said[-5:-1]] == [f"{factor} times the steps" for factor in (1, 2, 4, 8)]
    losses = {f: [float(line.split(",")[7]) for line in lines(whole / "settle.csv", f"{f},")] for f in (1, 8)}
    assert sum(losses[8]) < sum(losses[1])
    settle.main([str(whole), "--device", "cpu"])
    assert (whole / "settle.csv").read_text() == first
    with pytest.raises(SystemExit):
        settle.main([str(whole), "--device", "cuda:9"])
    assert "--device cuda:9 is not to be had here" in capsys.readouterr().err
    assert "settle" in gallery.names(tables.groups([whole]))


def test_refuses_what_it_cannot_settle(half, tmp_path, capsys, monkeypatch):  # noqa: F811
    with runs.locked(half):
        assert f"another process is writing to {half}" in refusal(capsys, half)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not a checkpoint to go on from" in refusal(capsys, empty)
    train.main([*TINY, "--no-dib", "--epochs", "1", "--run-dir", str(tmp_path / "without")])
    expected = f"{tmp_path / 'without'} holds no epoch in which DIB was measured"
    assert expected in refusal(capsys, tmp_path / "without")
    (half / "dib.csv").write_text("")
    assert "dib.csv is not as epoch 1 left it" in refusal(capsys, half)
    monkeypatch.chdir(empty)
    with pytest.raises(SystemExit):
        settle.main([])
    assert "no run in" in capsys.readouterr().err


def test_what_fails_keeps_the_settle_csv_of_before(whole, capsys, monkeypatch):  # noqa: F811
    (whole / "settle.csv").write_text("of before")
    monkeypatch.setattr(dib, "measure_splits", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        settle.main([str(whole)])

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dib, "measure_splits", full)
    with pytest.raises(SystemExit) as stop:
        settle.main([str(whole)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith("No space left on device; settle.csv is as it was\n")
    assert (whole / "settle.csv").read_text() == "of before"


@pytest.mark.slow  # as train.py's, which is not
def test_a_signal_ends_it_in_one_line(tmp_path):
    train.main([*TINY, "--epochs", "1", "--dib-epochs", "20", "--run-dir", str(tmp_path / "run")])
    command = [sys.executable, "-u", str(ROOT / "settle.py"), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("1 times the steps: ")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    assert error == "settle.py: stopped by SIGTERM; settle.csv is as it was, and the same command begins again\n"
    assert not (tmp_path / "run" / "settle.csv").exists()
