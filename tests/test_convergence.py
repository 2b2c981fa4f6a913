"""DIB of an epoch of a run is measured again, with more steps of the probes."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from math import inf, log, nan
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import dib
import train
from analysis import gallery, tables
from layerwise import runs, schema
from tests.toys import QUICK, ROOT
from tools import convergence
from training.flags import Config


def read_lines(path: Path, *starts: str) -> list[str]:
    """Return the lines of a table that begin with one of these words."""
    return [line for line in path.read_text().splitlines() if line.startswith(starts)]


def refusal(capsys, folder: Path, *more: str) -> str:
    """Return the one line with which the program refuses a run, and assert that no file changes."""
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        convergence.main([str(folder), *more])
    assert stop.value.code == 2
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
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
    assert [rest for _, _, rest in found] == read_lines(run / "dib.csv", "2,")
    steps = {name: 20 if kind == "tuned" else -(-n // 16) for name, n in (("train", 64), ("test", 615))}
    for factor in (1, 2, 4, 8):
        of_factor = [line.split(",") for line in read_lines(run / "convergence.csv", f"{factor},")]
        assert {(line[3], int(line[1])) for line in of_factor} == {(n, factor * s) for n, s in steps.items()}
        assert {line[2] for line in of_factor} == {"2"}
        assert [line[2:7] for line in of_factor if line[4] != "input"] == [rest.split(",")[:5] for _, _, rest in found]
    of_input = [line.split(",") for line in read_lines(run / "convergence.csv", "1,") if ",input," in line]
    first = [line.split(",") for line in read_lines(run / "dib.csv", "0,") if ",input," in line]
    assert [line[3:7] for line in of_input] == [line[1:5] for line in first]  # measured in the first epoch only
    for a, b in zip(of_input, first, strict=True):
        assert float(a[8]) == pytest.approx(float(b[6]), rel=1e-4)
    uppers = {tuple(line[3:7]): float(line[10]) for line in of_input}
    for _, _, rest in found:  # `upper` of the input is at most that of any layer
        _, name, _, enumeration, labeling, *_, upper = rest.split(",")
        assert labeling == "held-out" or uppers[(name, "input", enumeration, labeling)] <= float(upper)
    held_out = [line for line in of_input if line[6] == "held-out"]
    assert len(held_out) == 1
    assert all(line[10] == line[8] for line in held_out)  # no bound but its loss
    assert (run / "checkpoint.pt").read_bytes() == checkpoint
    train.main([*QUICK, "--probes", kind, "--enumerations", "2", "--epochs", "3", "--resume", "--run-dir", str(run)])
    assert not (run / "convergence.csv").exists()  # it was of epoch 2


def test_more_steps_lower_the_losses_and_a_second_call_writes_the_same(whole, capsys):
    convergence.main([str(whole)])
    first = (whole / "convergence.csv").read_text()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed[-9:-5]] == [f"{factor} times the steps" for factor in (1, 2, 4, 8)]
    goal = "minimality within 0.01 bits of that with 8 times the steps"
    assert printed[-5] == f"the smallest --dib-epochs for {goal}, in epoch 2:"
    assert [line.split(": ")[0] for line in printed[-4:-1]] == ["input", "hidden1", "hidden2"]
    rows = {factor: read_lines(whole / "convergence.csv", f"{factor},") for factor in (1, 8)}
    losses = {factor: sum(float(line.split(",")[8]) for line in rows[factor]) for factor in rows}
    assert losses[8] < losses[1]
    convergence.main([str(whole), "--device", "cpu"])
    assert (whole / "convergence.csv").read_text() == first
    with pytest.raises(SystemExit):
        convergence.main([str(whole), "--device", "cuda:9"])
    assert "--device cuda:9 is not available" in capsys.readouterr().err
    assert "convergence" in gallery.list_figures(tables.read_groups([whole]))


@pytest.fixture
def kept(tmp_path):
    """A run that kept the weights of all epochs."""
    train.main([*QUICK, "--probes", "tuned", "--save-weights", "--run-dir", str(tmp_path / "kept")])
    return tmp_path / "kept"


def test_with_the_same_steps_probes_of_an_earlier_epoch_are_those_of_the_run(kept):
    checkpoint = (kept / "checkpoint.pt").read_bytes()
    for epoch, split in ((0, None), (1, ",input,")):  # the input was measured in epoch 0 alone
        convergence.main([str(kept), "--epoch", str(epoch)])
        found = read_lines(kept / "convergence.csv", *(f"{factor}," for factor in (1, 2, 4, 8)))
        assert {line.split(",")[2] for line in found} == {str(epoch)}
        of_run = [line.split(",", 2)[2] for line in found if line.startswith("1,") and (split or "?") not in line]
        assert of_run == read_lines(kept / "dib.csv", f"{epoch},")
        assert len(found) == 4 * len(read_lines(kept / "dib.csv", "0,"))  # all splits, also the input
    assert (kept / "checkpoint.pt").read_bytes() == checkpoint
    convergence.main([str(kept)])
    last = (kept / "convergence.csv").read_text()
    shutil.rmtree(kept / "weights")
    convergence.main([str(kept), "--epoch", "2"])  # the checkpoint has the weights of the last epoch
    assert (kept / "convergence.csv").read_text() == last


def test_an_epoch_in_which_dib_was_not_measured_may_be_measured(tmp_path):
    train.main([*QUICK, "--measure-dib", "1", "--save-weights", "--run-dir", str(tmp_path)])
    convergence.main([str(tmp_path), "--epoch", "0"])
    found, of_run = pd.read_csv(tmp_path / "convergence.csv"), pd.read_csv(tmp_path / "dib.csv")
    assert set(found["epoch"]) == {0}
    found = found[(found["factor"] == 1) & (found["split"] == "input")]
    of_run = of_run[of_run["split"] == "input"]  # its probes depend on no weights
    assert found["loss"].tolist() == pytest.approx(of_run["loss"].tolist(), rel=1e-4)


def test_bounds_are_those_of_all_smaller_numbers_of_steps(kept):
    """`upper` does not rise, `lower` does not fall, and rule 1 of dib.py still holds."""
    convergence.main([str(kept), "--epoch", "1"])
    table = pd.read_csv(kept / "convergence.csv")
    held_out = table[table["labeling"] == "held-out"]
    assert (held_out["upper"] == held_out["loss"]).all()
    assert (held_out["lower"] == 0).all()
    table = table[table["labeling"] != "held-out"]
    assert (table["lower"] <= table["upper"]).all()
    keys = ["set", "enumeration", "labeling"]
    assert (table.groupby([*keys, "split"])["upper"].diff().dropna() <= 0).all()
    assert (table.groupby([*keys, "split"])["lower"].diff().dropna() >= 0).all()
    assert (table.groupby([*keys, "split"])["loss"].diff().dropna() > 0).any()  # `upper` is not the loss alone
    depth = table["split"].map({"input": 0, "hidden1": 1, "hidden2": 2})
    by_depth = table.assign(depth=depth).sort_values("depth").groupby([*keys, "factor"])
    assert (by_depth["upper"].diff().dropna() >= 0).all()


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        # (loss, lower, upper) at 1, 2, 4 and 8 times the steps, and then (lower, upper)
        ([(0.5, 0.1, 0.4), (0.3, 0.2, 0.3), (0.6, 0.0, 0.6), (0.2, 0.1, 0.2)],
         [(0.1, 0.4), (0.2, 0.3), (0.2, 0.3), (0.2, 0.2)]),
        ([(0.5, 0.0, 0.5), (nan, 0.0, nan), (inf, 0.0, 0.6), (0.4, 0.0, 0.4)],
         [(0.0, 0.5), (0.0, 0.5), (0.0, 0.5), (0.0, 0.4)]),
        ([(nan, 0.0, nan), (0.4, 0.0, 0.4), (0.4, 0.0, 0.4), (0.4, 0.0, 0.4)],
         [(0.0, nan), (0.0, 0.4), (0.0, 0.4), (0.0, 0.4)]),
        # bounds that are equal but for rounding
        ([(0.4, 0.4, 0.4), (0.5, 0.41, 0.5), (0.4, 0.4, 0.4), (0.4, 0.4, 0.4)], [(0.4, 0.4)] * 4),
    ],
)  # fmt: skip
def test_bounds_are_carried_over_the_factors(monkeypatch, results, expected):
    def measure(run: SimpleNamespace, epoch: int, factor: int) -> list[convergence.Row]:
        loss, lower, upper = results[convergence.FACTORS.index(factor)]
        probe = dib.ProbeResult(1, 0, 0.69, loss, lower, upper)
        held_out = dib.ProbeResult(0, "held-out", 0.69, factor, 0.0, factor)
        return [("test", "a", probe), ("test", "b", probe._replace(loss=9.0, upper=9.0)), ("test", "a", held_out)]

    monkeypatch.setattr(convergence, "measure_epoch", measure)
    monkeypatch.setattr(train, "count_dib_steps", lambda *_: 20)
    rows = convergence.measure_convergence(SimpleNamespace(config=Config(sets=["test"])), 5)
    assert [row[:4] for row in rows[::3]] == [(factor, 20 * factor, 5, "test") for factor in (1, 2, 4, 8)]
    assert [row[8:] for row in rows[::3]] == [
        pytest.approx((loss, *bounds), nan_ok=True) for (loss, *_), bounds in zip(results, expected, strict=True)
    ]
    assert [row[10] for row in rows[1::3]] == [9.0] * 4  # of another split
    assert [row[8:] for row in rows[2::3]] == [(factor, 0.0, factor) for factor in (1, 2, 4, 8)]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5], 1),
        ([0.4, 0.491, 0.495, 0.5], 2),
        ([0.4, 0.4, 0.495, 0.5], 4),
        ([0.4, 0.4, 0.48, 0.5], None),
        ([nan, nan, 0.5, 0.5], 4),
        ([0.5, 0.5, 0.5, nan], None),
    ],
)
def test_the_smallest_sufficient_factor_of_made_up_rows(bits, expected):
    """Minimality is the mean over two digits of two enumerations. Other labelings, splits and sets do not count."""
    rows = []
    for factor, information in zip((1, 2, 4, 8), bits, strict=True):
        values = {("train", "a", i, digit): information + more for i in (1, 2) for digit, more in ((0, 0.3), (1, -0.3))}
        values |= {("train", "a", 0, word): factor for word in ("y", "shuffled", "held-out")}
        values |= {("test", "a", 1, 0): factor, ("train", "b", 1, 0): 0.1}
        rows += [(factor, 20 * factor, 3, *key, 0.69, 9.0, 0.0, 0.69 - value * log(2)) for key, value in values.items()]
    found = convergence.find_sufficient_factors(rows)
    assert found == {"a": {"train": expected, "test": None}, "b": {"train": 1}}


def test_the_line_of_a_split_names_its_sufficient_epochs():
    config = Config(dib_epochs=30, linear_splits=["hidden2"])
    line = convergence.describe_split(config, "hidden1", {"train": 2, "test": None})
    assert line == "hidden1: --dib-epochs 60 (train), not converged (test)"
    assert convergence.describe_split(config, "hidden1", {"test": 1}) == "hidden1: --dib-epochs 30 (test)"
    line = convergence.describe_split(config, "hidden2", {"train": 1, "test": 1})
    assert line == "hidden2: any, because the probes are linear"


def test_an_epoch_without_weights_is_refused(kept, half, capsys):
    expected = f"{kept / 'weights'} does not hold the weights of epoch 3: it holds those of epochs 0, 1, 2"
    assert expected in refusal(capsys, kept, "--epoch", "3")
    (kept / "weights" / "epoch1.pt").unlink()
    assert "epoch 1: it holds those of epochs 0, 2" in refusal(capsys, kept, "--epoch", "1")
    shutil.copy(kept / "weights" / "epoch2.pt", kept / "weights" / "epoch3.pt")  # of an epoch that is not finished
    assert "epoch 3: it holds those of epochs 0, 2" in refusal(capsys, kept, "--epoch", "3")
    shutil.rmtree(kept / "weights")
    assert "epoch 0: it holds none" in refusal(capsys, kept, "--epoch", "0")
    expected = f"{half} does not hold the weights of epoch 0, only those of epoch 1: the run was made without --save-"
    assert expected in refusal(capsys, half, "--epoch", "0")
    assert "argument --epoch: expected a number of at least 0, got -1" in refusal(capsys, half, "--epoch", "-1")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:500]),
        lambda path: torch.save([1], path),
        lambda path: torch.save({"hidden1.weight": torch.ones(4, 12)}, path),
        lambda path: shutil.copy(path.parent.parent / "checkpoint.pt", path),
        lambda path: torch.save({n: w[:1] for n, w in torch.load(path, weights_only=True).items()}, path),
    ],
)
def test_a_file_that_does_not_hold_weights_of_the_model_is_refused(kept, capsys, damage: Callable[[Path], object]):
    path = kept / "weights" / "epoch1.pt"
    damage(path)
    assert f"convergence: error: {path} does not hold weights of the model: " in refusal(capsys, kept, "--epoch", "1")


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
