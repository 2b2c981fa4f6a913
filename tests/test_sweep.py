"""A sweep starts, continues and skips the runs of several seeds."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.toys import QUICK, ROOT
from tools import sweep
from training import checkpoint

SWEEP = [sys.executable, "-m", "tools.sweep"]


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list[list[str]]:
    """Run each train.py that a sweep launches in this process. Return their flags."""
    flags_of = []

    def launch(flags: list[str]) -> int:
        flags_of.append(flags)
        try:
            train.main(flags)
        except SystemExit as end:
            return end.code
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    monkeypatch.setattr(sweep, "launch", launch)
    return flags_of


def run_sweep(*flags: str) -> str | int | None:
    """Run a sweep of three seeds, and return its exit status."""
    with pytest.raises(SystemExit) as end:
        sweep.main(["3", *QUICK, "--no-dib", *flags])
    return end.value.code


def test_runs_are_started_skipped_or_continued(launched, capsys):
    train.main([*QUICK, "--no-dib", "--seed", "0", "--epochs", "1"])  # one epoch of the two of QUICK
    train.main([*QUICK, "--no-dib", "--seed", "1"])
    assert run_sweep("--epochs", "2") == 0
    assert [flags[-2:] for flags in launched] == [["0", "--resume"], ["--seed", "2"]]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "runs/MLP-SZT-seed0: done",
        "runs/MLP-SZT-seed1: finished before",
        "runs/MLP-SZT-seed2: done",
    ]
    assert run_sweep("--epochs", "2") == 0
    assert len(launched) == 2
    assert run_sweep("--epochs", "3") == 0  # more epochs for all
    assert [flags[-1] for flags in launched[2:]] == ["--resume"] * 3


def test_a_run_that_fails_does_not_stop_the_others(launched, capsys, tmp_path, monkeypatch):
    train.main([*QUICK, "--no-dib", "--seed", "0"])
    (tmp_path / "runs" / "MLP-SZT-seed0" / "nc1.csv").write_text("edited")
    train.main([*QUICK, "--no-dib", "--seed", "1", "-lr", "0.1"])
    assert run_sweep("-lr", "0.01") == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "seed0: failed: runs/MLP-SZT-seed0/nc1.csv has changed since epoch 2" in lines[0]
    assert "seed1: failed: --resume: --learning-rate is 0.01, but was 0.1 in runs/MLP-SZT-seed1" in lines[1]
    assert lines[2] == "runs/MLP-SZT-seed2: done"
    monkeypatch.setattr(sweep, "launch", lambda flags: 1)
    assert run_sweep("-nl", "Tanh", "--data", "MNIST") == 1
    assert capsys.readouterr().out.count("failed with status 1") == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "starting"])
def test_a_signal_stops_the_sweep(tmp_path, name, status, training):
    command = [*SWEEP, "3", *QUICK, "--no-dib", "--epochs", "5000", "--run-dir", str(tmp_path / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    if training:
        process.stdout.readline()
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, name))  # keyboards and some schedulers send it to all processes
    out, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert out.splitlines()[-1] == f"{tmp_path / 'run-seed0'}: stopped by {name}; to continue, repeat the command"
    assert error.splitlines()[-1] == "sweep: 3 of 3 runs are not finished"


def test_a_task_of_a_job_array_runs_its_seed(launched, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run_sweep() == 0
    assert checkpoint.load(Path("runs/MLP-SZT-seed2"))["hparams"]["seed"] == 2
    assert len(launched) == 1
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run_sweep() == 2
    assert "SLURM_ARRAY_TASK_ID is 3, expected one of 0..2, the seeds of the sweep" in capsys.readouterr().err


def test_folders_may_be_named(launched, capsys):
    assert run_sweep("--run-dir", "runs/tanh", "-nl", "Tanh") == 0
    assert run_sweep("--run-dir=runs/tanh", "-nl", "Tanh") == 0
    assert len(launched) == 3
    assert capsys.readouterr().out.splitlines()[-3:] == [f"runs/tanh-seed{i}: finished before" for i in range(3)]


@pytest.mark.parametrize("flags", [["--seed", "0"], ["--seed=4"], ["--resume"], ["-b", "0"], ["--tune", "only"]])
def test_flags_that_the_sweep_sets_and_invalid_flags_are_refused(launched, capsys, flags):
    assert run_sweep(*flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not launched


def test_a_sweep_can_be_started_from_a_shell(tmp_path):
    command = [*SWEEP, "1", *QUICK, "--no-dib", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'run-seed0'}: done"
    assert checkpoint.load(tmp_path / "run-seed0")["epoch"] == 2
