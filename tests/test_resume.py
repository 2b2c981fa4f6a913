"""A run that ends at any moment goes on from its last finished epoch, as if it had not ended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from zlib import crc32

import pandas as pd
import pytest
import torch

import devices
import dib
import nc1
import runs
import train
from flags import choose_precision
from tests.test_train import ROOT, refusal

# thesis heads, which take few steps
TINY = ["--device", "cpu", "--widths", "4", "3", "--train-size", "64", "-b", "16", "--dib-epochs", "1", "--epochs", "2"]
TINY += ["--heads", "thesis"]


class Crash(BaseException):
    """The power fails."""


def results(folder: Path) -> dict[str, str]:
    """The CSVs but for the seconds, which differ from run to run."""
    texts = {name: (folder / name).read_text() for name in runs.COLUMNS}
    texts["epochs.csv"] = "\n".join(line.rsplit(",", 1)[0] for line in texts["epochs.csv"].splitlines())
    return texts


def assert_same(a: Path, b: Path) -> None:
    assert results(a) == results(b)
    one, other = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (a, b))
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    assert torch.equal(one["random"], other["random"])


@pytest.fixture
def whole(tmp_path) -> Path:
    train.main([*TINY, "--run-dir", str(tmp_path / "whole")])
    return tmp_path / "whole"


@pytest.fixture
def half(tmp_path, monkeypatch) -> Path:
    """A run that ended within its second epoch."""
    save = runs.save

    def crash(folder: Path, epoch: int, *rest) -> None:
        if epoch == 2:
            raise Crash
        save(folder, epoch, *rest)

    with monkeypatch.context() as failing:
        failing.setattr(runs, "save", crash)
        with pytest.raises(Crash):
            train.main([*TINY, "--run-dir", str(tmp_path / "half")])
    return tmp_path / "half"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_goes_on_from_a_crash_at_any_write(tmp_path, monkeypatch, whole, call):
    original, flags = getattr(os, call), [*TINY, "--run-dir", str(tmp_path / "run")]
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
        go_on = (tmp_path / "run" / "hparams.json").exists()  # else nothing was begun
        train.main([*flags, *["--resume"] * go_on])
        assert_same(whole, tmp_path / "run")
        resumed += go_on
        shutil.rmtree(tmp_path / "run")
    assert crashes == {"fsync": 25, "replace": 8}[call]
    assert resumed == {"fsync": 16, "replace": 3}[call]


def test_drops_rows_of_an_unfinished_epoch_and_torn_ones(whole, half):
    for name in runs.COLUMNS:
        assert "\n2," in (half / name).read_text()
        with (half / name).open("a") as file:
            file.write("1,tra")
    train.main(["--run-dir", str(half), "--resume"])  # every flag is that of the run
    assert_same(whole, half)
    train.main(["--run-dir", str(half), "--resume"])  # nothing is left to do
    assert_same(whole, half)


@pytest.mark.parametrize(
    "flags",
    [[name, "--precision", "float32"] for name in ("MNISTNet", "CIFARNet")]
    + [pytest.param([name, "--precision", "float32"], marks=pytest.mark.slow) for name in ("ResNet", "ConvNeXt")]
    + [["MLP", "--precision", "float16"], ["MLP", "-opt", "SGD"]],
    ids=" ".join,
)
def test_more_epochs_are_those_of_a_longer_run(tmp_path, pictures, flags):
    command = ["-m", *flags, "-d", "CIFAR10", "-b", "20", "--no-dib", "--sets", "test", "--device", "cpu"]
    train.main([*command, "--epochs", "2", "--run-dir", str(tmp_path / "a")])
    train.main([*command, "--epochs", "1", "--run-dir", str(tmp_path / "b")])
    train.main([*command, "--epochs", "2", "--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same(tmp_path / "a", tmp_path / "b")
    states = [torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in "ab"]
    assert states[0]["scaler"] == states[1]["scaler"]
    assert json.loads((tmp_path / "b" / "hparams.json").read_text())["epochs"] == 2


def test_tuned_heads_are_those_of_a_run_that_did_not_end(tmp_path):
    command = [*TINY, "--heads", "tuned", "--dib-epochs", "2"]
    train.main([*command, "--run-dir", str(tmp_path / "a")])
    train.main([*command, "--epochs", "1", "--run-dir", str(tmp_path / "b")])
    train.main([*command, "--run-dir", str(tmp_path / "b"), "--resume"])
    assert_same(tmp_path / "a", tmp_path / "b")


def test_a_run_may_be_moved(half, tmp_path, whole):
    half.rename(tmp_path / "moved")
    train.main(["--run-dir", str(tmp_path / "moved"), "--resume"])
    assert_same(whole, tmp_path / "moved")


def test_a_run_that_ended_before_its_first_epoch_did_is_no_obstacle(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as broken:
        broken.setattr(train, "evaluate", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main([*TINY, "--seed", "3", "--run-dir", str(tmp_path / "run")])
    train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "1"], "--seed is 1, and the run in"),
        (["-lr", "0.1"], "--learning-rate is 0.1, and the run in"),
        (["-m", "ResNet"], "--model is ResNet, and the run in"),
        (["-w", "4"], "--widths is [4], and the run in"),
        (["--sets", "test"], "--sets is ['test'], and the run in"),
        (["--splits", "hidden2"], "--splits is ['hidden2'], and the run in"),
        (["--no-dib"], "--dib is False, and the run in"),
        (["--epochs", "1"], "--epochs may grow, and 1 is less than 2"),
    ],
)
def test_resume_refuses_other_flags_by_name(half, capsys, flags, message):
    refuses(half, capsys, message, *flags)


def refuses(folder: Path, capsys, message: str, *flags: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert message in refusal(capsys, "--run-dir", str(folder), "--resume", *flags)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_resume_takes_the_flags_of_the_run_when_they_are_given(half, whole):
    train.main([*TINY, "--sets", "test", "train", "--run-dir", str(half), "--resume"])
    assert_same(whole, half)


def edit(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def retouch(run: Path, **changes) -> None:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | changes, run / "checkpoint.pt")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoint.pt").unlink(), "checkpoint.pt is not a checkpoint to go on from: [Errno 2]"),
        (lambda run: os.truncate(run / "checkpoint.pt", 1000), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: (run / "checkpoint.pt").write_bytes(b""), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: torch.save({"epoch": 1}, run / "checkpoint.pt"), "checkpoint.pt is not a checkpoint to go on"),
        (lambda run: torch.save([1], run / "checkpoint.pt"), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: torch.save(torch.nn.ReLU(), run / "checkpoint.pt"), "checkpoint.pt is not a checkpoint to go on"),
        (lambda run: (run / "hparams.json").unlink(), "hparams.json cannot be read: No such file or directory"),
        (lambda run: edit(run / "hparams.json", ",\n", "\n"), "hparams.json cannot be read: Expecting ',' delimiter"),
        (lambda run: (run / "hparams.json").write_text("[]"), "hparams.json does not hold the flags of a run"),
        (
            lambda run: edit(run / "hparams.json", '"seed"', '"sead"'),
            "hparams.json has nothing as seed, and checkpoint.pt",
        ),
        (
            lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": 7'),
            "hparams.json has 7 as seed, and checkpoint.pt",
        ),
        (lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": 0.0'), "hparams.json has 0.0 as seed, and"),
        (lambda run: edit(run / "hparams.json", '"seed": 0', '"seed": []'), "hparams.json has [] as seed, and"),
        (lambda run: retouch(run, tables={}), "checkpoint.pt is not a checkpoint to go on from: it lacks a table"),
        (lambda run: retouch(run, epoch=99), "checkpoint.pt is not a checkpoint to go on from: it lacks a table or an"),
        (lambda run: retouch(run, epoch="x"), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: retouch(run, tables=[1]), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: retouch(run, hparams=None), "checkpoint.pt is not a checkpoint to go on from:"),
        (lambda run: retouch(run, model={}), "checkpoint.pt does not fit the model: Error(s) in loading state_dict"),
        (lambda run: edit(run / "nc1.csv", "1,train", "1,tarin"), "nc1.csv is not as epoch 1 left it"),
        (lambda run: os.truncate(run / "dib.csv", 100), "dib.csv is not as epoch 1 left it"),
        (lambda run: (run / "epochs.csv").unlink(), "epochs.csv is not as epoch 1 left it"),
    ],
)
def test_resume_names_the_file_that_is_damaged(half, capsys, damage, message):
    damage(half)
    refuses(half, capsys, message)


def test_resume_refuses_a_run_with_other_columns(half, capsys):
    """As versions that measured less wrote them, intact."""
    edit(half / "nc1.csv", ",kept,dropped", "")
    content = (half / "nc1.csv").read_bytes()
    tables = torch.load(half / "checkpoint.pt", weights_only=True)["tables"]
    retouch(half, tables=tables | {"nc1.csv": (len(content), crc32(content))})
    refuses(half, capsys, "nc1.csv has other columns than epoch,set,layer,dim,rank,nc1,kept,dropped: a run of another")


def test_resume_refuses_the_checkpoint_of_another_run(tmp_path, half, capsys):
    train.main([*TINY, "--seed", "5", "--run-dir", str(tmp_path / "other")])
    shutil.copy(tmp_path / "other" / "checkpoint.pt", half)
    refuses(half, capsys, "hparams.json has 0 as seed, and checkpoint.pt beside it 5")


def test_one_process_at_a_time(half, capsys):
    with runs.locked(half):
        refuses(half, capsys, f"another process is writing to {half}")


@pytest.mark.parametrize("name", [*runs.COLUMNS, "checkpoint.pt"])
def test_a_new_run_spares_what_is_left_of_another(half, capsys, name):
    for other in {*runs.COLUMNS, "checkpoint.pt", "hparams.json"} - {name}:
        (half / other).unlink()
    before = (half / name).read_bytes()
    assert "already holds a run: go on with --resume" in refusal(capsys, *TINY, "--run-dir", str(half))
    assert [path.name for path in half.iterdir()] == [name]
    assert (half / name).read_bytes() == before


def test_a_new_run_spares_tables_that_were_emptied(half, capsys):
    (half / "epochs.csv").write_bytes(b"")
    assert "already holds a run" in refusal(capsys, *TINY, "--run-dir", str(half))


@pytest.mark.parametrize("where", ["a" * 300, "file", "file/run", "run"])
def test_a_folder_that_cannot_be_is_refused(tmp_path, capsys, where):
    """Too long a name, a file, below a file, a folder whose CSV is a folder."""
    (tmp_path / "file").touch()
    (tmp_path / "run" / "nc1.csv").mkdir(parents=True)
    assert where in refusal(capsys, *TINY, "--run-dir", str(tmp_path / where))
    assert "train.py: error:" in refusal(capsys, *TINY, "--resume", "--run-dir", str(tmp_path / where))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "nc1.csv", "run"]


def test_nothing_to_resume(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(capsys, "--resume")
    assert "No such file or directory: 'runs/MLP-SZT-seed0'" in error
    assert not list(tmp_path.iterdir())


def limited(size: int, *flags: str) -> subprocess.CompletedProcess:
    """train.py where no file may grow beyond size bytes, as on a full disk."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size},) * 2); import train; train.main()"
    return subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True)


def test_a_full_disk_keeps_the_last_finished_epoch(whole, half):
    flags = ["--run-dir", str(half), "--resume"]
    room = (half / "dib.csv").stat().st_size  # enough for epoch 1 but for its checkpoint, which is larger
    assert room < (half / "checkpoint.pt").stat().st_size
    done = limited(room, *flags)
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    train.main(flags)
    assert_same(whole, half)


@pytest.mark.slow
def test_a_disk_that_fills_up_within_an_epoch(tmp_path, whole):
    flags = [*TINY, "--no-dib", "--epochs", "130", "--run-dir", str(tmp_path / "run")]
    room = (whole / "checkpoint.pt").stat().st_size + 2000  # the rows of some epochs, too, fit in that
    done = limited(room, *flags)
    assert done.returncode == 1
    assert (
        done.stderr == f"train.py: error: [Errno 27] File too large; finished epochs are kept in {tmp_path / 'run'}\n"
    )
    assert 2 < runs.load(tmp_path / "run")["epoch"] < 130
    train.main(["--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*flags[:-1], str(tmp_path / "other")])
    assert_same(tmp_path / "other", tmp_path / "run")


def test_a_full_disk_leaves_nothing_of_a_new_run(tmp_path):
    done = limited(4096, *TINY, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 2
    assert done.stderr == f"train.py: error: {tmp_path / 'run'} cannot be written: File too large\n"
    assert not list(tmp_path.iterdir())


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", *TINY, "--run-dir", str(folder), *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("name", "status"), [pytest.param("SIGINT", 130, marks=pytest.mark.slow), ("SIGTERM", 143)])
def test_signals_stop_the_run_and_say_how_to_go_on(tmp_path, name, status):
    flags = ["--epochs", "20"]
    process = start(tmp_path / "run", *flags)
    process.stdout.readline()  # an epoch is done
    process.send_signal(getattr(signal, name))
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    kept = f"finished epochs are kept in {tmp_path / 'run'}, and the same command with --resume goes on from them"
    assert error == f"train.py: stopped by {name}; {kept}\n"
    train.main([*TINY, *flags, "--run-dir", str(tmp_path / "whole")])
    train.main([*TINY, *flags, "--run-dir", str(tmp_path / "run"), "--resume"])
    assert_same(tmp_path / "whole", tmp_path / "run")


def killed(folder: Path, times: int, *flags: str) -> None:
    """A run that is killed so many times at random, begun or gone on with each time, and is not at its end."""
    draw, begun = random.Random(0), False
    for _ in range(times):
        process = start(folder, *flags, *["--resume"] * begun)
        if draw.random() < 0.8:
            process.stdout.readline()  # else it may be killed before it has begun
        time.sleep(draw.uniform(0, 1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        begun = (folder / "hparams.json").exists()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert 0 < state["epoch"] < state["hparams"]["epochs"]


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    flags = ["--epochs", "400", "--dib-epochs", "2"]
    train.main([*TINY, *flags, "--run-dir", str(tmp_path / "whole")])
    killed(tmp_path / "run", 20, *flags)
    train.main([*TINY, *flags, "--run-dir", str(tmp_path / "run"), "--resume"])
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(tmp_path, capsys, monkeypatch):
    cross_entropy, steps = train.F.cross_entropy, 0

    def diverging(logits: torch.Tensor, *rest, **options) -> torch.Tensor:
        nonlocal steps
        steps += logits.requires_grad
        return cross_entropy(logits, *rest, **options) * (float("nan") if steps == 7 else 1)

    monkeypatch.setattr(train.F, "cross_entropy", diverging)
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--no-dib", "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert steps == 7  # of 4 an epoch
    expected = (
        "train.py: error: the training loss is not finite in epoch 2, step 3 of 4, at learning rate 0.002; finished"
    )
    assert capsys.readouterr().err.startswith(expected)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["epoch"] == 1
    monkeypatch.setattr(train.F, "cross_entropy", cross_entropy)
    train.main([*TINY, "--no-dib", "--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*TINY, "--no-dib", "--run-dir", str(tmp_path / "whole")])
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_an_activation_that_is_not_finite_is_named(tmp_path, capsys, monkeypatch):
    measure = nc1.measure

    def broken(model: torch.nn.Module, *rest, **options) -> dict:
        if isinstance(model, torch.nn.Sequential):  # not the input alone
            model.hidden1[0].weight.data.fill_(float("inf"))
        return measure(model, *rest, **options)

    monkeypatch.setattr(nc1, "measure", broken)
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    assert "NC1: the activations of layer 'hidden1' are not finite; finished epochs are kept" in capsys.readouterr().err


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
def test_a_measure_that_runs_out_of_memory_is_taken_once_more(capsys, error):
    calls = []

    def measure(**options) -> dict:
        calls.append(options)
        if len(calls) == 1:
            raise error
        return {"tap": 1.0}

    assert train.within_memory("NC1 of the test set", measure, 400, 10**9) == {"tap": 1.0}
    assert calls == [{"batch_size": 400, "keep_bytes": 10**9}, {"batch_size": 200, "keep_bytes": 0}]
    expected = "NC1 of the test set: out of memory; once more in batches of 200, not 400, with nothing kept\n"
    assert capsys.readouterr().out == expected


def test_other_errors_are_not_taken_for_lack_of_memory():
    def measure(**options) -> dict:
        raise RuntimeError("another")

    with pytest.raises(RuntimeError, match="another"):
        train.within_memory("NC1", measure, 400, 10**9)


@pytest.mark.parametrize(("module", "name"), [(nc1, "measure"), (dib, "measure_splits")])
def test_a_run_that_is_short_of_memory_goes_on(tmp_path, monkeypatch, whole, module, name):
    measure, sizes = getattr(module, name), []

    def short(*rest, batch_size: int, keep_bytes: int, **options) -> dict:
        sizes.append((batch_size, keep_bytes))
        if batch_size == 16:
            raise torch.OutOfMemoryError
        return measure(*rest, batch_size=batch_size, keep_bytes=keep_bytes, **options)

    monkeypatch.setattr(module, name, short)
    room = 2**30  # enough for all encodings: what is computed again is rounded anew
    monkeypatch.setattr(devices, "bytes_to_keep", lambda device: room)
    train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    times = 8 if module is nc1 else 6  # NC1 of the input, too, in epoch 0
    assert sizes == [(16, room), (8, 0)] * times
    got, expected = results(tmp_path / "run"), results(whole)
    assert got["epochs.csv"] == expected["epochs.csv"]
    if module is nc1:
        assert got["dib.csv"] == expected["dib.csv"]
        tables = [pd.read_csv(folder / "nc1.csv") for folder in (tmp_path / "run", whole)]
        pd.testing.assert_frame_equal(*tables, rtol=1e-5)  # the same in smaller batches, but for float32's rounding


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_memory_that_runs_out_twice_ends_the_run_with_a_line(tmp_path, monkeypatch, capsys, kind):
    def short(*_, **__) -> dict:
        raise kind("out of memory.\nTried to allocate much")

    monkeypatch.setattr(nc1, "measure", short)
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    expected = (
        f"train.py: error: out of memory.\\nTried to allocate much; finished epochs are kept in {tmp_path / 'run'}\n"
    )
    assert capsys.readouterr().err == expected


def test_a_loss_that_is_not_finite_at_the_end_of_an_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "score", lambda *_: (float("inf"), 0.5))
    with pytest.raises(SystemExit) as end:
        train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    assert end.value.code == 1
    expected = "the training loss is not finite after the last step of epoch 0, at learning rate 0.002; finished epochs"
    assert expected in capsys.readouterr().err


def test_a_batch_may_be_larger_than_the_set(tmp_path):
    train.main([*TINY, "-b", "5000", "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    assert len((tmp_path / "run" / "epochs.csv").read_text().splitlines()) == 5


def test_deterministic_runs(tmp_path, whole):
    train.main([*TINY, "--deterministic", "--run-dir", str(tmp_path / "run")])
    assert torch.are_deterministic_algorithms_enabled()
    train.main([*TINY, "--run-dir", str(tmp_path / "again")])
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same(whole, tmp_path / "run")


def test_bfloat16_is_refused_on_a_gpu_without_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cuda = torch.device("cuda")
    assert choose_precision(cuda, None) == "float16"
    with pytest.raises(ValueError, match="--precision bfloat16 is not to be had on cuda: expected float32 or float16"):
        choose_precision(cuda, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_precision(cuda, None) == "bfloat16"
    assert choose_precision(torch.device("cpu"), "float16") == "float16"
