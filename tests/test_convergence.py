"""DIB of a run's last epoch is measured again, with more steps of the probes."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dib
import train
from analysis import gallery, tables
from layerwise import runs, schema
from tests.toys import QUICK, ROOT
from tools import convergence


def read_lines(path: Path, *starts: str) -> list[str]:
    """Return the lines of a table that begin with one of these words."""
    return [line for line in path.read_text().splitlines() if line.startswith(starts)]


def refusal(capsys, folder: Path, *more: str) -> str:
    """Return the one line with which the program refuses a run, and assert that no file changes."""
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        convergence.main([str(folder), *more])
    assert stop.value.code == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    (error,) = capsys.readouterr().err.splitlines()
    return error


@pytest.mark.parametrize("kind", ["tuned", "thesis"])
def test_with_the_same_steps_probes_are_those_of_the_last_epoch(tmp_path, kind):
    run = tmp_path / "run"
    train.main([*QUICK, "--probes", kind, "--enumerations", "2", "--run-dir", str(run)])
    checkpoint = (run / "checkpoint.pt").read_bytes()
    convergence.main([str(run)])
    (header,) = read_lines(run / "convergence.csv", "factor")
    assert header == schema.CONVERGENCE
    found = [line.split(",", 2) for line in read_lines(run / "convergence.csv", "1,") if ",input," not in line]
    assert [f"2,{rest}" for _, _, rest in found] == read_lines(run / "dib.csv", "2,")
    steps = {name: 20 if kind == "tuned" else -(-n // 16) for name, n in (("train", 64), ("test", 615))}
    for factor in (1, 2, 4, 8):
        of_factor = [line.split(",") for line in read_lines(run / "convergence.csv", f"{factor},")]
        assert {(line[2], int(line[1])) for line in of_factor} == {(n, factor * s) for n, s in steps.items()}
        assert [line[2:6] for line in of_factor if line[3] != "input"] == [rest.split(",")[:4] for _, _, rest in found]
    of_input = [line.split(",") for line in read_lines(run / "convergence.csv", "1,") if ",input," in line]
    first = [line.split(",") for line in read_lines(run / "dib.csv", "0,") if ",input," in line]
    assert [line[2:6] for line in of_input] == [line[1:5] for line in first]  # measured in the first epoch only
    for a, b in zip(of_input, first, strict=True):
        assert float(a[7]) == pytest.approx(float(b[6]), rel=1e-4)
    uppers = {tuple(line[2:6]): float(line[9]) for line in of_input}
    for _, _, rest in found:  # `upper` of the input is at most that of any layer
        name, _, enumeration, labeling, *_, upper = rest.split(",")
        assert labeling == "held-out" or uppers[(name, "input", enumeration, labeling)] <= float(upper)
    held_out = [line for line in of_input if line[5] == "held-out"]
    assert len(held_out) == 1
    assert all(line[9] == line[7] for line in held_out)  # no bound but its loss
    assert (run / "checkpoint.pt").read_bytes() == checkpoint
    train.main([*QUICK, "--probes", kind, "--enumerations", "2", "--epochs", "3", "--resume", "--run-dir", str(run)])
    assert not (run / "convergence.csv").exists()  # it was of epoch 2


def test_more_steps_lower_the_losses_and_a_second_call_writes_the_same(whole, capsys):
    convergence.main([str(whole)])
    first = (whole / "convergence.csv").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[-5:-1]] == [f"{factor} times the steps" for factor in (1, 2, 4, 8)]
    rows = {factor: read_lines(whole / "convergence.csv", f"{factor},") for factor in (1, 8)}
    losses = {factor: sum(float(line.split(",")[7]) for line in rows[factor]) for factor in rows}
    assert losses[8] < losses[1]
    convergence.main([str(whole), "--device", "cpu"])
    assert (whole / "convergence.csv").read_text() == first
    with pytest.raises(SystemExit):
        convergence.main([str(whole), "--device", "cuda:9"])
    assert "--device cuda:9 is not available" in capsys.readouterr().err
    assert "convergence" in gallery.list_figures(tables.read_groups([whole]))


def test_runs_that_cannot_be_measured_are_refused(half, tmp_path, capsys, monkeypatch):
    with runs.lock(half):
        assert f"another process is writing to {half}" in refusal(capsys, half)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "is not a checkpoint of a run" in refusal(capsys, empty)
    train.main([*QUICK, "--no-dib", "--epochs", "1", "--run-dir", str(tmp_path / "without")])
    expected = f"DIB was not measured in any epoch of {tmp_path / 'without'}"
    assert expected in refusal(capsys, tmp_path / "without")
    (half / "dib.csv").write_text("")
    assert "dib.csv has changed since epoch 1" in refusal(capsys, half)
    monkeypatch.chdir(empty)
    with pytest.raises(SystemExit):
        convergence.main([])
    assert "no run in" in capsys.readouterr().err


def test_a_failure_keeps_the_convergence_csv_of_an_earlier_call(whole, capsys, monkeypatch):
    (whole / "convergence.csv").write_text("of before")
    monkeypatch.setattr(dib, "measure_splits", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convergence.main([str(whole)])

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dib, "measure_splits", full)
    with pytest.raises(SystemExit) as stop:
        convergence.main([str(whole)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.endswith("No space left on device; convergence.csv was not changed\n")
    assert (whole / "convergence.csv").read_text() == "of before"


@pytest.mark.slow  # the same test of train.py is not slow
def test_a_signal_stops_it_with_one_line(tmp_path):
    train.main([*QUICK, "--epochs", "1", "--dib-epochs", "20", "--run-dir", str(tmp_path / "run")])
    command = [sys.executable, "-u", "-m", "tools.convergence", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("1 times the steps: ")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143
    rest = "convergence.csv was not changed; to start again, repeat the command"
    assert error == f"convergence: stopped by SIGTERM; {rest}\n"
    assert not (tmp_path / "run" / "convergence.csv").exists()
