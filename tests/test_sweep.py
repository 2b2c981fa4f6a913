import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import runs
import sweep
import train
from tests.test_resume import TINY
from tests.test_train import ROOT


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list[list[str]]:
    """The flags of every train.py that was started, here in this process."""
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


def run(*flags: str) -> str | int | None:
    with pytest.raises(SystemExit) as end:
        sweep.main(["3", *TINY, "--no-dib", *flags])
    return end.value.code


def test_begins_skips_and_goes_on(launched, capsys):
    train.main([*TINY, "--no-dib", "--seed", "0", "--epochs", "1"])  # one epoch of the two of TINY
    train.main([*TINY, "--no-dib", "--seed", "1"])
    assert run("--epochs", "2") == 0
    assert [flags[-2:] for flags in launched] == [["0", "--resume"], ["--seed", "2"]]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "runs/MLP-SZT-seed0: done",
        "runs/MLP-SZT-seed1: finished before",
        "runs/MLP-SZT-seed2: done",
    ]
    assert run("--epochs", "2") == 0
    assert len(launched) == 2
    assert run("--epochs", "3") == 0  # more epochs for all
    assert [flags[-1] for flags in launched[2:]] == ["--resume"] * 3


def test_a_failure_does_not_end_the_others(launched, capsys, tmp_path, monkeypatch):
    train.main([*TINY, "--no-dib", "--seed", "0"])
    (tmp_path / "runs" / "MLP-SZT-seed0" / "nc1.csv").write_text("edited")
    train.main([*TINY, "--no-dib", "--seed", "1", "-lr", "0.1"])
    assert run("-lr", "0.01") == 1
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "seed0: failed: runs/MLP-SZT-seed0/nc1.csv is not as epoch 2 left it" in lines[0]
    assert "seed1: failed: --resume: --learning-rate is 0.01, and the run in runs/MLP-SZT-seed1 has 0.1" in lines[1]
    assert lines[2] == "runs/MLP-SZT-seed2: done"
    monkeypatch.setattr(sweep, "launch", lambda flags: 1)
    assert run("-nl", "Tanh", "--data", "MNIST") == 1
    assert capsys.readouterr().out.count("failed with status 1") == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "starting"])
def test_a_signal_ends_the_sweep(tmp_path, name, status, training):
    command = [sys.executable, ROOT / "sweep.py", "3", *TINY, "--no-dib", "--epochs", "5000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    if training:
        process.stdout.readline()
    else:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():
            time.sleep(0.05)
    os.killpg(process.pid, getattr(signal, name))  # as a keyboard, or a scheduler that tells everyone, does
    out, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert out.splitlines()[-1] == f"runs/MLP-SZT-seed0: stopped by {name}; the same command goes on"
    assert error.splitlines()[-1] == "sweep.py: 3 of 3 runs are not finished"


def test_a_task_of_a_job_array_runs_its_seed(launched, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert run() == 0
    assert runs.load(Path("runs/MLP-SZT-seed2"))["hparams"]["seed"] == 2
    assert len(launched) == 1
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert run() == 2
    assert "SLURM_ARRAY_TASK_ID is 3, expected one of 0..2, the seeds of the sweep" in capsys.readouterr().err


def test_folders_may_be_named(launched, capsys):
    assert run("--run-dir", "runs/tanh", "-nl", "Tanh") == 0
    assert run("--run-dir=runs/tanh", "-nl", "Tanh") == 0
    assert len(launched) == 3
    assert capsys.readouterr().out.splitlines()[-3:] == [f"runs/tanh-seed{i}: finished before" for i in range(3)]


@pytest.mark.parametrize("flags", [["--seed", "0"], ["--seed=4"], ["--resume"], ["-b", "0"], ["--tune", "only"]])
def test_refuses_what_it_chooses_itself_and_bad_flags(launched, capsys, flags):
    assert run(*flags) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not launched


def test_from_a_shell(tmp_path):
    command = [sys.executable, ROOT / "sweep.py", "1", *TINY, "--no-dib"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "runs/MLP-SZT-seed0: done"
    assert runs.load(tmp_path / "runs" / "MLP-SZT-seed0")["epoch"] == 2
