"""A run that ends at any moment can be continued from its last finished epoch, as if it had not ended."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import pandas as pd
import pytest
import torch

import dib
import nc1
import train
from layerwise import devices, runs, schema
from tests.conftest import Crash, crash_in_epoch
from tests.toys import QUICK, ROOT, assert_same_run, refusal
from tools import convergence
from tools.evidence import kill_repeatedly, read_results
from training import checkpoint
from training.hardware import choose_precision

OLD_RUN = ROOT / "tests" / "old_run"
NO_CHECKPOINT = "checkpoint.pt is not a checkpoint of a run:"


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files in the folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_run_can_be_continued_after_a_crash_at_any_write(tmp_path, monkeypatch, whole, call):
    original, flags = getattr(os, call), [*QUICK, "--run-dir", str(tmp_path / "run")]
    crashes = resumed = 0
    while True:
        left = iter(range(crashes))

        def failing(*args, left=left, **options):
            if next(left, None) is None:
                raise Crash
            return original(*args, **options)

        with monkeypatch.context() as power:
            power.setattr(os, call, failing)
            try:
                train.main(flags)
                break
            except Crash:
                crashes += 1
        has_begun = (tmp_path / "run" / "hparams.json").exists()  # if not, there is nothing to resume
        train.main([*flags, *["--resume"] * has_begun])
        assert_same_run(whole, tmp_path / "run")
        resumed += has_begun
        shutil.rmtree(tmp_path / "run")
    assert crashes == {"fsync": 25, "replace": 8}[call]
    assert resumed == {"fsync": 16, "replace": 3}[call]


def test_resume_removes_the_rows_of_an_unfinished_epoch_and_incomplete_rows(whole, half):
    for name in schema.COLUMNS:
        assert "\n2," in (half / name).read_text()
        with (half / name).open("a") as file:
            file.write("1,tra")
    train.main(["--run-dir", str(half), "--resume"])  # without flags: all are those of the run
    assert_same_run(whole, half)
    train.main(["--run-dir", str(half), "--resume"])  # nothing is left to do
    assert_same_run(whole, half)


@pytest.mark.parametrize(
    "flags",
    [[name, "--precision", "float32"] for name in ("MNISTNet", "CIFARNet")]
    + [pytest.param([name, "--precision", "float32"], marks=pytest.mark.slow) for name in ("ResNet", "ConvNeXt")]
    + [["MLP", "--precision", "float16"], ["MLP", "-opt", "SGD"]],
    ids=" ".join,
)
def test_a_run_that_gets_more_epochs_is_that_of_a_longer_run(tmp_path, pictures, flags):
    command = ["-m", *flags, "-d", "CIFAR10", "-b", "20", "--no-dib", "--sets", "test", "--device", "cpu"]
    train.main([*command, "--epochs", "2", "--run-dir", str(tmp_path / "a")])
    train.main([*command, "--epochs", "1", "--run-dir", str(tmp_path / "b")])
    train.main([*command, "--epochs", "2", "--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    states = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in "ab"]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert json.loads((tmp_path / "b" / "hparams.json").read_text())["epochs"] == 2


def test_tuned_probes_of_a_resumed_run_are_those_of_a_run_that_did_not_end(tmp_path):
    command = [*QUICK, "--probes", "tuned", "--dib-epochs", "2"]
    train.main([*command, "--run-dir", str(tmp_path / "a")])
    train.main([*command, "--epochs", "1", "--run-dir", str(tmp_path / "b")])
    train.main([*command, "--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_kept_weights_of_a_resumed_run_are_those_of_a_run_that_did_not_end(tmp_path, monkeypatch):
    """The run ends between writing the weights of epoch 1 and the checkpoint."""
    command = [*QUICK, "--no-dib", "--save-weights", "--run-dir"]
    train.main([*command, str(tmp_path / "a")])
    crash_in_epoch(monkeypatch, 1, [*command, str(tmp_path / "b")])
    (tmp_path / "b" / "weights" / "epoch1.pt").write_text("damaged")
    train.main(["--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert read_files(tmp_path / "b" / "weights") == read_files(tmp_path / "a" / "weights")
    assert sorted(read_files(tmp_path / "a" / "weights")) == ["epoch0.pt", "epoch1.pt", "epoch2.pt"]


def test_resume_removes_kept_weights_of_an_unfinished_epoch_that_is_no_longer_measured(tmp_path, monkeypatch):
    """The last epoch is always measured with --measure log. In a longer run, epoch 5 is not the last one."""
    command = [*QUICK, "--no-dib", "--measure", "log", "--save-weights", "--run-dir"]
    crash_in_epoch(monkeypatch, 5, [*command, str(tmp_path / "b"), "--epochs", "5"])
    assert (tmp_path / "b" / "weights" / "epoch5.pt").exists()
    train.main(["--run-dir", str(tmp_path / "b"), "--resume", "--epochs", "7"])
    train.main([*command, str(tmp_path / "a"), "--epochs", "7"])
    assert read_files(tmp_path / "b" / "weights") == read_files(tmp_path / "a" / "weights")


def test_a_new_run_removes_kept_weights_of_an_old_one(tmp_path):
    (tmp_path / "weights").mkdir()
    for name in ("epoch0.pt", "epoch17.pt", "epochs.pt", "mine.pt"):
        (tmp_path / "weights" / name).write_text("of before")
    train.main([*QUICK, "--no-dib", "--run-dir", str(tmp_path)])
    assert set(read_files(tmp_path / "weights")) == {"epochs.pt", "mine.pt"}


def test_noise_is_measured_again_if_its_epoch_was_not_finished(tmp_path, monkeypatch):
    command = [*QUICK, "--probes", "tuned", "--dib-epochs", "1", "--epochs", "1"]
    train.main([*command, "--run-dir", str(tmp_path / "a")])
    with monkeypatch.context() as failing:
        failing.setattr(runs, "append_rows", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            train.main([*command, "--run-dir", str(tmp_path / "b")])
    (tmp_path / "b" / "noise.csv").write_text("damaged")
    train.main([*command, "--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert "noise.csv" in read_results(tmp_path / "a")


@pytest.mark.parametrize("epochs", ["2", "3"])
def test_noise_is_measured_again_if_its_file_is_missing(tmp_path, epochs):
    """Also if no epoch is left to train."""
    command = [*QUICK, "--probes", "tuned", "--dib-epochs", "1"]
    train.main([*command, "--epochs", "2", "--run-dir", str(tmp_path / "b")])
    shutil.copytree(tmp_path / "b", tmp_path / "a")
    (tmp_path / "b" / "noise.csv").unlink()
    for name in ("a", "b"):
        train.main([*command, "--epochs", epochs, "--run-dir", str(tmp_path / name), "--resume"])
    assert (tmp_path / "a" / "noise.csv").read_bytes() == (tmp_path / "b" / "noise.csv").read_bytes()
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("flag", ["--no-controls", "--no-dib"])
def test_a_resumed_run_without_noise_does_not_measure_it(tmp_path, flag):
    command = [*QUICK, "--probes", "tuned", "--dib-epochs", "1", "--run-dir", str(tmp_path / "run"), flag]
    train.main([*command, "--epochs", "1"])
    train.main([*command, "--epochs", "2", "--resume"])
    assert not (tmp_path / "run" / "noise.csv").exists()


def test_a_run_may_be_moved(half, tmp_path, whole):
    half.rename(tmp_path / "moved")
    train.main(["--run-dir", str(tmp_path / "moved"), "--resume"])
    assert_same_run(whole, tmp_path / "moved")


def test_a_run_that_ended_within_its_first_epoch_may_be_replaced(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*QUICK, "--seed", "3", "--run-dir", str(tmp_path / "run")])
    train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "--seed is 1, but was 0 in"),
        (["-lr", "0.1"], "--learning-rate is 0.1, but was 0.002 in"),
        (["-m", "ResNet"], "--model is ResNet, but was MLP in"),
        (["-w", "4"], "--widths is [4], but was [4, 3] in"),
        (["--sets", "test"], "--sets is ['test'], but was ['train', 'test'] in"),
        (["--splits", "hidden2"], "--splits is ['hidden2'], but was ['input', 'hidden1', 'hidden2'] in"),
        (["--no-dib"], "--dib is False, but was True in"),
        (["--save-weights"], "--save-weights is True, but was False in"),
        (["--epochs", "1"], "--epochs must be at least 2, got 1"),
    ],
)
def test_resume_refuses_other_flags_by_name(half, capsys, flags, message):
    assert_resume_refused(half, capsys, message, *flags)


def assert_resume_refused(folder: Path, capsys, message: str, *flags: str) -> None:
    """Assert that --resume is refused with this message, and changes no file."""
    before = read_files(folder)
    assert message in refusal(capsys, "--run-dir", str(folder), "--resume", *flags)
    assert read_files(folder) == before


def test_resume_accepts_the_flags_of_the_run(half, whole):
    train.main([*QUICK, "--sets", "test", "train", "--run-dir", str(half), "--resume"])
    assert_same_run(whole, half)


def edit(path: Path, old: str, new: str) -> None:
    """Replace the first occurrence of a text in a file."""
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def edit_checkpoint(run: Path, **changes) -> None:
    """Replace entries of checkpoint.pt."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | changes, run / "checkpoint.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoint.pt").unlink(), f"{NO_CHECKPOINT} [Errno 2]"),
        (lambda run: os.truncate(run / "checkpoint.pt", 1000), NO_CHECKPOINT),
        (lambda run: (run / "checkpoint.pt").write_bytes(b""), NO_CHECKPOINT),
        (lambda run: torch.save({"epoch": 1}, run / "checkpoint.pt"), NO_CHECKPOINT),
        (lambda run: torch.save([1], run / "checkpoint.pt"), NO_CHECKPOINT),
        (lambda run: torch.save(torch.nn.ReLU(), run / "checkpoint.pt"), NO_CHECKPOINT),
        (lambda run: (run / "hparams.json").unlink(), "hparams.json cannot be read: No such file or directory"),
        (lambda run: edit(run / "hparams.json", ",\n", "\n"), "hparams.json cannot be read: Expecting ',' delimiter"),
        (lambda run: (run / "hparams.json").write_text("[]"), "hparams.json does not hold the flags of a run"),
        (lambda run: edit(run / "hparams.json", '"seed"', '"sead"'), "seed is missing in"),
        (lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": 7'), "seed is 7 in"),
        (lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": 0.0'), "seed is 0.0 in"),
        (lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": []'), "seed is [] in"),
        (lambda run: edit_checkpoint(run, tables={}), f"{NO_CHECKPOINT} the entries of the tables"),
        (lambda run: edit_checkpoint(run, epoch=99), f"{NO_CHECKPOINT} the entries of the tables or the"),
        (lambda run: edit_checkpoint(run, epoch="x"), NO_CHECKPOINT),
        (lambda run: edit_checkpoint(run, tables=[1]), NO_CHECKPOINT),
        (lambda run: edit_checkpoint(run, hparams=None), NO_CHECKPOINT),
        (lambda run: edit_checkpoint(run, model={}), "checkpoint.pt does not fit the model: Error(s) in loading"),
        (lambda run: edit(run / "nc1.csv", "1,train", "1,tarin"), "nc1.csv has changed since epoch 1"),
        (lambda run: os.truncate(run / "dib.csv", 100), "dib.csv has changed since epoch 1"),
        (lambda run: (run / "epochs.csv").unlink(), "epochs.csv has changed since epoch 1"),
    ],
)
def test_resume_refuses_a_damaged_file_by_name(half, capsys, damage, message):
    damage(half)
    assert_resume_refused(half, capsys, message)


def test_resume_refuses_a_run_with_other_columns(half, capsys):
    """The table is intact, and lacks the columns kept and dropped."""
    edit(half / "nc1.csv", ",kept,dropped", "")
    content = (half / "nc1.csv").read_bytes()
    tables = torch.load(half / "checkpoint.pt", weights_only=True)["tables"]
    edit_checkpoint(half, tables=tables | {"nc1.csv": (len(content), crc32(content))})
    columns = "epoch,set,layer,dim,rank,nc1,kept,dropped"
    assert_resume_refused(half, capsys, f"nc1.csv was written by a different version: expected the columns {columns}")


@pytest.mark.parametrize(
    ("program", "flags"), [(train, ["--resume", "--run-dir"]), (train, ["--run-dir"]), (convergence, [])]
)
def test_a_run_of_an_earlier_version_is_refused_and_left_as_it_is(tmp_path, capsys, program, flags):
    run = shutil.copytree(OLD_RUN, tmp_path / "run")
    before = read_files(run)
    with pytest.raises(SystemExit) as end:
        program.main([*flags, str(run)])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run} holds a run of an earlier version" in line
    assert "--resume" not in line
    assert read_files(run) == before


def test_resume_refuses_the_checkpoint_of_another_run(tmp_path, half, capsys):
    train.main([*QUICK, "--seed", "5", "--run-dir", str(tmp_path / "other")])
    shutil.copy(tmp_path / "other" / "checkpoint.pt", half)
    assert_resume_refused(half, capsys, f"seed is 0 in {half / 'hparams.json'}, but 5 in checkpoint.pt")


def test_resume_refuses_a_folder_to_which_another_process_writes(half, capsys):
    with runs.lock(half):
        assert_resume_refused(half, capsys, f"another process is writing to {half}")


@pytest.mark.parametrize("name", [*schema.COLUMNS, "checkpoint.pt"])
def test_a_new_run_is_refused_where_one_file_of_another_is_left(half, capsys, name):
    for other in {*schema.COLUMNS, "checkpoint.pt", "hparams.json"} - {name}:
        (half / other).unlink()
    before = read_files(half)
    assert list(before) == [name]
    assert str(half) in refusal(capsys, *QUICK, "--run-dir", str(half))
    assert read_files(half) == before


def test_a_new_run_is_refused_where_a_table_was_emptied(half, capsys):
    (half / "epochs.csv").write_bytes(b"")
    before = read_files(half)
    assert str(half) in refusal(capsys, *QUICK, "--run-dir", str(half))
    assert read_files(half) == before


@pytest.mark.parametrize("where", ["a" * 300, "file", "file/run", "run"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys, where):
    """A name that is too long, a file, a folder below a file, and a folder in which a table is a folder."""
    (tmp_path / "file").touch()
    (tmp_path / "run" / "nc1.csv").mkdir(parents=True)
    assert where in refusal(capsys, *QUICK, "--run-dir", str(tmp_path / where))
    assert "train.py: error:" in refusal(capsys, *QUICK, "--resume", "--run-dir", str(tmp_path / where))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "nc1.csv", "run"]


def test_resume_refuses_a_folder_that_does_not_exist(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "No such file or directory: 'runs/MLP-SZT-seed0'" in refusal(capsys, "--resume")
    assert not list(tmp_path.iterdir())


def run_with_limit(size: int, *flags: str) -> subprocess.CompletedProcess:
    """Run train.py in a process in which no file may grow beyond size bytes, as on a full disk."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2); import train; train.main()"
    return subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)


def test_a_full_disk_keeps_the_last_finished_epoch(whole, half):
    flags = ["--run-dir", str(half), "--resume"]
    room = (half / "dib.csv").stat().st_size  # enough for every table, not for the checkpoint
    assert room < (half / "checkpoint.pt").stat().st_size
    done = run_with_limit(room, *flags)
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    train.main(flags)
    assert_same_run(whole, half)


def test_a_disk_that_is_too_full_for_the_weights_keeps_the_last_finished_epoch(tmp_path, monkeypatch, capsys):
    flags, save = [*QUICK, "--no-dib", "--save-weights", "--run-dir", str(tmp_path / "run")], runs.write_atomically

    def write(path: Path, content: bytes) -> None:
        if path.name == "epoch1.pt":
            raise OSError(28, "No space left on device")
        save(path, content)

    with monkeypatch.context() as full:
        full.setattr(runs, "write_atomically", write)
        with pytest.raises(SystemExit) as end:
            train.main(flags)
    assert end.value.code == 1
    kept = f"finished epochs are saved in {tmp_path / 'run'}"
    assert capsys.readouterr().err == f"train.py: error: [Errno 28] No space left on device; {kept}\n"
    assert checkpoint.load(tmp_path / "run")["epoch"] == 0
    train.main([*flags, "--resume"])
    assert len(read_files(tmp_path / "run" / "weights")) == 3


@pytest.mark.slow
def test_a_disk_that_is_full_within_an_epoch_keeps_the_finished_epochs(tmp_path, whole):
    flags = [*QUICK, "--no-dib", "--epochs", "130", "--run-dir", str(tmp_path / "run")]
    room = (whole / "checkpoint.pt").stat().st_size + 2000  # the rows of some epochs also fit in that
    done = run_with_limit(room, *flags)
    assert done.returncode == 1
    kept = f"finished epochs are saved in {tmp_path / 'run'}"
    assert done.stderr == f"train.py: error: [Errno 27] File too large; {kept}\n"
    assert 2 < checkpoint.load(tmp_path / "run")["epoch"] < 130
    train.main(["--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*flags[:-1], str(tmp_path / "other")])
    assert_same_run(tmp_path / "other", tmp_path / "run")


def test_a_full_disk_leaves_nothing_of_a_new_run(tmp_path):
    done = run_with_limit(4096, *QUICK, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: {tmp_path / 'run'} cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "status"), [pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGTERM", 143)])
def test_a_signal_ends_the_run_with_a_line_that_says_how_to_continue(tmp_path, name, status):
    flags = ["--epochs", "20"]
    command = [sys.executable, "train.py", *QUICK, "--run-dir", str(tmp_path / "run"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()  # the line of a finished epoch
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    rest = f"finished epochs are saved in {tmp_path / 'run'}; to continue, repeat the command with --resume"
    assert error == f"train.py: stopped by {name}; {rest}\n"
    train.main([*QUICK, *flags, "--run-dir", str(tmp_path / "whole")])
    train.main([*QUICK, *flags, "--run-dir", str(tmp_path / "run"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_is_that_of_one_that_is_not(tmp_path):
    flags = ["--epochs", "400", "--dib-epochs", "2"]
    train.main([*QUICK, *flags, "--run-dir", str(tmp_path / "whole")])
    kill_repeatedly(tmp_path / "run", 20, *flags)
    train.main([*QUICK, *flags, "--run-dir", str(tmp_path / "run"), "--resume"])
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step(tmp_path, capsys, monkeypatch):
    cross_entropy, steps = train.F.cross_entropy, 0

    def diverging(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        nonlocal steps
        steps += logits.requires_grad
        return cross_entropy(logits, *rest, **options) * (float("nan") if steps == 7 else 1)

    monkeypatch.setattr(train.F, "cross_entropy", diverging)
    with pytest.raises(SystemExit) as end:
        train.main([*QUICK, "--no-dib", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert steps == 7  # an epoch has 4
    expected = "the training loss is not finite in epoch 2, step 3 of 4, at learning rate 0.002; finished"
    assert capsys.readouterr().err.startswith(f"train.py: error: {expected}")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)
    train.main([*QUICK, "--no-dib", "--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*QUICK, "--no-dib", "--run-dir", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_layer_whose_activations_are_not_finite_is_named(tmp_path, capsys, monkeypatch):
    measure = nc1.measure

    def broken(model: torch.nn.Module, *rest, **options) -> dict:
        if isinstance(model, torch.nn.Sequential):  # not in the call for the input
            model.hidden1[0].weight.data.fill_(float("inf"))
        return measure(model, *rest, **options)

    monkeypatch.setattr(nc1, "measure", broken)
    with pytest.raises(SystemExit) as end:
        train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert "NC1: the activations of layer 'hidden1' are not finite; finished epochs are" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    ],
)
def test_a_measure_that_runs_out_of_memory_is_called_once_more(capsys, error):
    calls = []

    def measure(**options) -> dict:
        calls.append(options)
        if len(calls) == 1:
            raise error
        return {"layer": 1.0}

    assert train.measure_with_retry("NC1 of the test set", measure, 400, 10**9) == {"layer": 1.0}
    assert calls == [{"batch_size": 400, "cache_bytes": 10**9}, {"batch_size": 200, "cache_bytes": 0}]
    expected = "NC1 of the test set: out of memory; repeating it with batch size 200 instead of 400, without a cache\n"
    assert capsys.readouterr().out == expected


def test_a_measure_that_raises_another_error_is_not_called_again():
    def measure(**options) -> dict:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        train.measure_with_retry("NC1", measure, 400, 10**9)


@pytest.mark.parametrize(("module", "name"), [(nc1, "measure"), (dib, "measure_splits")])
def test_a_run_in_which_memory_runs_out_is_finished(tmp_path, monkeypatch, whole, module, name):
    measure, sizes = getattr(module, name), []

    def short(*rest, batch_size: int, cache_bytes: int, **options) -> dict:
        sizes.append((batch_size, cache_bytes))
        if batch_size == 16:
            raise torch.OutOfMemoryError
        return measure(*rest, batch_size=batch_size, cache_bytes=cache_bytes, **options)

    monkeypatch.setattr(module, name, short)
    room = 2**30  # enough for all encodings; those that are computed again may be rounded differently
    monkeypatch.setattr(devices, "choose_cache_bytes", lambda device: room)
    train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    calls = 8 if module is nc1 else 6  # in epoch 0 NC1 is called for the input as well
    assert sizes == [(16, room), (8, 0)] * calls
    got, expected = read_results(tmp_path / "run"), read_results(whole)
    assert got["epochs.csv"] == expected["epochs.csv"]
    if module is nc1:
        assert got["dib.csv"] == expected["dib.csv"]
        tables = [pd.read_csv(folder / "nc1.csv") for folder in (tmp_path / "run", whole)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-5)  # smaller batches change rounding in float32


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_twice_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys, kind):
    def short(*_, **__) -> dict:
        raise kind("out of memory.\nTried to allocate much")

    monkeypatch.setattr(nc1, "measure", short)
    with pytest.raises(SystemExit) as end:
        train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    kept = f"finished epochs are saved in {tmp_path / 'run'}"
    assert capsys.readouterr().err == f"train.py: error: out of memory.\\nTried to allocate much; {kept}\n"


def test_a_loss_that_is_not_finite_at_the_end_of_an_epoch_ends_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "compute_score", lambda *_: (float("inf"), 0.5))
    with pytest.raises(SystemExit) as end:
        train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    expected = "the training loss is not finite after the last step of epoch 0, at learning rate 0.002; finished epochs"
    assert expected in capsys.readouterr().err


def test_a_batch_may_be_larger_than_the_set(tmp_path):
    train.main([*QUICK, "-b", "5000", "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    assert len((tmp_path / "run" / "epochs.csv").read_text().splitlines()) == 5


def test_a_deterministic_run_has_the_same_results_on_a_cpu(tmp_path, whole):
    train.main([*QUICK, "--deterministic", "--run-dir", str(tmp_path / "run")])
    assert torch.are_deterministic_algorithms_enabled()
    train.main([*QUICK, "--run-dir", str(tmp_path / "again")])
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_run(whole, tmp_path / "run")


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cuda = torch.device("cuda")
    assert choose_precision(cuda, None) == "float16"
    with pytest.raises(ValueError, match="--precision bfloat16 is not supported by cuda: expected float32 or float16"):
        choose_precision(cuda, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision(cuda, None) == "bfloat16"
    assert choose_precision(torch.device("cpu"), "float16") == "float16"


def test_a_new_run_removes_convergence_and_noise_of_an_old_one(tmp_path):
    """They would be drawn as those of the new run."""
    names = ["noise.csv", *schema.RENAMED_FILES, *schema.RENAMED_FILES.values()]
    for name in names:
        (tmp_path / name).write_text("of before")
    train.main([*QUICK, "--no-dib", "--run-dir", str(tmp_path)])
    assert not any((tmp_path / name).exists() for name in names)
