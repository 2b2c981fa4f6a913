"""A run of train.py: its tables, its files, its messages, and the flags that it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision

import data
import dib
import models
import nc1
import train
from layerwise import schema
from relabel import relabel
from tests.toys import NO_MLP, ROOT, SMALL, check_run, refusal
from training.hardware import PRECISIONS


def train_and_read(folder: Path, *flags: str) -> dict[str, pd.DataFrame]:
    """Make a small run with these flags, and return its tables."""
    train.main([*(SMALL if "-m" not in flags or "MLP" in flags else NO_MLP), "--run-dir", str(folder), *flags])
    return {name: pd.read_csv(folder / name) for name in schema.COLUMNS}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights in the checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


def test_a_run_has_all_rows_and_files_that_are_documented(tmp_path, capsys):
    tables = train_and_read(tmp_path / "run", "--enumerations", "2", "-nl", "Tanh")
    assert [",".join(t.columns) for t in tables.values()] == list(schema.COLUMNS.values())
    collapse, probes, epochs = tables.values()
    assert epochs[["epoch", "set"]].values.tolist() == [[e, s] for e in (0, 1, 2) for s in ("train", "test")]
    assert (epochs["loss"] > 0).all()
    assert epochs["accuracy"].between(0, 1).all()
    assert (epochs["seconds"] >= 0).all()
    assert collapse[["epoch", "set", "layer", "dim", "rank"]].values.tolist() == [
        [e, s, layer, dim, 1]
        for e in (0, 1, 2)
        for s in ("train", "test")
        for layer, dim in (("input", 12), ("hidden1", 4), ("hidden2", 3))
        if e == 0 or layer != "input"  # it does not change, and is measured once
    ]
    assert (collapse["kept"] == 1).all()  # two classes have one direction
    assert (collapse["dropped"] == 0).all()

    dataset = data.load("SZT")
    D = {s: relabel(samples.labels, 2).shape[1] for s, samples in (("train", dataset.train), ("test", dataset.test))}
    expected = [
        [e, s, split, p, labeling]
        for e in (0, 1, 2)
        for s in ("train", "test")
        for split in ("input", "hidden1", "hidden2")
        if e == 0 or split != "input"  # without an encoder nothing changes: it is measured once
        for p, labeling in [
            *[(0, "y"), (0, "shuffled")],
            *[(p, str(k)) for p in (1, 2) for k in range(D[s])],
            *([(0, "held-out")] if s == "test" else []),
        ]
    ]
    assert probes[["epoch", "set", "split", "enumeration", "labeling"]].values.tolist() == expected
    assert (0 <= probes["lower"]).all()
    assert (probes["lower"] <= probes["upper"]).all()
    assert (probes["upper"] <= probes["loss"]).all()
    noise = pd.read_csv(tmp_path / "run" / "noise.csv")
    assert ",".join(noise.columns) == schema.NOISE
    is_known = (probes["epoch"] == 0) & (probes["split"] == "hidden2") & (probes["labeling"] != "held-out")
    columns = ["set", "split", "enumeration", "labeling", "entropy"]  # of the same labelings
    assert noise[columns].values.tolist() == probes.loc[is_known, columns].values.tolist()
    assert (noise["loss"] - noise["lower"] <= schema.PROVED).all()

    hparams = json.loads((tmp_path / "run" / "hparams.json").read_text())
    assert hparams["widths"] == [4, 3]
    assert hparams["splits"] == ["input", "hidden1", "hidden2"]
    assert hparams["learning_rate"] == 2e-3
    assert (hparams["device"], hparams["compile"]) == ("cpu", False)
    assert (hparams["torch"], hparams["torchvision"]) == (torch.__version__, torchvision.__version__)
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert checkpoint["optimizer"]["param_groups"][0]["fused"]
    assert set(checkpoint) == {"epoch", "hparams", "tables", "random", "model", "optimizer", "schedule", "scaler"}
    assert len(checkpoint["optimizer"]["state"]) == 6  # two moments for every weight and bias
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["epoch", f"{e}/2"] for e in (0, 1, 2)]


def test_values_of_an_epoch_are_those_of_the_weights_at_its_end(tmp_path):
    tables = train_and_read(tmp_path / "run", "--no-dib")
    dataset = data.load("SZT")
    model = models.build("MLP", (12,), 2, widths=(4, 3)).eval()
    model.load_state_dict(load_weights(tmp_path / "run"))
    tables = {name: table.query("epoch == 2").set_index("set") for name, table in tables.items()}
    for name, samples in (("train", dataset.train), ("test", dataset.test)):
        x, y = samples.batch(torch.arange(len(samples)))
        logits = model(x)
        row = tables["epochs.csv"].loc[name]
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
        assert row["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())
        values = tables["nc1.csv"].loc[name, "nc1"].tolist()
        assert values == pytest.approx([v.nc1 for v in nc1.measure(model, models.layers(model), samples, 2).values()])


@pytest.mark.parametrize(
    ("flags", "epochs"),
    [
        ([], [0, 1, 2, 3]),
        (["--measure", "1", "3", "--measure-dib", "2", "3"], [1, 2, 3]),
        (["--measure", "0", "1", "--measure-dib", "2", "--no-nc1"], [2]),
        (["--measure", "0", "1", "--measure-dib", "2", "--no-dib"], [0, 1]),
        (["--measure", "0", "--measure-dib", "1", "2", "--splits", "input"], [0, 1]),  # the input is measured once
    ],
)
def test_weights_of_the_measured_epochs_are_kept(tmp_path, flags, epochs):
    tables = train_and_read(tmp_path / "run", "--epochs", "3", "--save-weights", *flags)
    assert sorted(path.name for path in (tmp_path / "run" / "weights").iterdir()) == [f"epoch{e}.pt" for e in epochs]
    assert {epoch for name in ("nc1.csv", "dib.csv") for epoch in tables[name]["epoch"]} == set(epochs)
    assert json.loads((tmp_path / "run" / "hparams.json").read_text())["save_weights"] is True
    if epochs[-1] == 3:
        weights = torch.load(tmp_path / "run" / "weights" / "epoch3.pt", weights_only=True)
        expected = load_weights(tmp_path / "run")
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_weights_are_kept_only_if_the_flag_is_given(whole):
    assert json.loads((whole / "hparams.json").read_text())["save_weights"] is False
    assert not (whole / "weights").exists()


def test_nc1_of_the_input_is_measured_once(tmp_path):
    table = train_and_read(tmp_path / "run", "--no-dib")["nc1.csv"]
    assert table["layer"].tolist().count("input") == 2  # for each set in the first epoch
    dataset = data.load("SZT")
    for samples, row in zip((dataset.train, dataset.test), table.query("layer == 'input'").to_numpy(), strict=True):
        expected = nc1.collapse(*samples.batch(torch.arange(len(samples))), 2)
        assert row[3:].tolist() == pytest.approx(list(expected), rel=1e-9)


@pytest.mark.parametrize("size", [None, 100])
@pytest.mark.parametrize("kind", ["tuned", "thesis"])
def test_probes_are_trained_as_the_flags_say(tmp_path, monkeypatch, kind, size):
    """Tuned probes take the steps of the training set on both sets.

    Thesis probes take the batches of the network, and so many epochs of each set.
    """
    seen = []

    def watch(model, splits, samples, C, make_model, *, probes, batch_size, held_out, **rest):
        seen.append((len(samples), batch_size, probes, held_out and len(held_out)))
        assert size is None or torch.bincount(samples.labels).tolist() == [50, 50]
        values = {"y": 1.0, 0: 0.5}
        return {k: [dib.ProbeResult(0, name, 1.0, loss, 0.0, 0.5) for name, loss in values.items()] for k in splits}

    monkeypatch.setattr(dib, "measure_splits", watch)
    monkeypatch.setattr(train, "measure_noise", lambda *_: [])
    flags = ["--epochs", "1", "--probes", kind, "-b", "60", "-opt", "SGD", "-lr", "0.5", "--dib-epochs", "3"]
    flags += ["--dib-size", str(size)] if size else []
    train_and_read(tmp_path / "run", "-d", "SZT", *flags, *(["--dib-lr", "0.3"] if kind == "tuned" else []))
    sizes = [size, size] if size else [3481, 615]
    assert [N for N, *_ in seen] == 2 * sizes  # in epochs 0 and 1
    assert [N for *_, N in seen] == 2 * [sizes[1], None]  # the test set is held out from the probes of the training set
    for _, batch_size, probes, _ in seen:
        if kind == "tuned":
            assert (batch_size, probes) == (400, dib.Tuned(3 * 20, 0.3))  # at least 20 batches an epoch
        else:
            assert (batch_size, probes.epochs) == (60, 3)
            made = probes.optimizer([torch.nn.Parameter(torch.zeros(1))])
            assert (type(made), made.defaults["lr"]) == (torch.optim.SGD, 0.5)
    hparams = json.loads((tmp_path / "run" / "hparams.json").read_text())
    assert hparams["dib_samples"] == {"train": sizes[0], "test": sizes[1]}
    assert (hparams["probes"], hparams["dib_lr"]) == (kind, 0.3 if kind == "tuned" else None)


def test_a_run_may_measure_no_split_but_the_input(tmp_path):
    """The input does not change: after epoch 0 nothing is left to measure."""
    assert set(train_and_read(tmp_path / "run", "--splits", "input")["dib.csv"]["epoch"]) == {0}


def test_the_line_of_an_epoch_has_the_share_of_probes_known_suboptimal(tmp_path, monkeypatch, capsys):
    one = {"train": 0.5 + 1.1 * schema.SUBOPTIMAL, "test": 0.5 + 0.9 * schema.SUBOPTIMAL}
    results = [dib.ProbeResult(0, 0, 1.0, loss, 0.0, 0.5) for loss in (0.5, 0.5)]
    rows = [(name, "hidden1", result) for name in one for result in (*results, results[0]._replace(loss=one[name]))]
    monkeypatch.setattr(train, "measure_dib", lambda *_: rows)
    train_and_read(tmp_path / "run", "--epochs", "1")
    assert "  probes known suboptimal train 33.3%, test 0.0%  " in capsys.readouterr().out


def test_the_line_of_an_epoch_has_the_largest_gap_of_linear_probes(tmp_path, monkeypatch, capsys):
    gaps = [("hidden1", 0, 0.3), ("hidden2", 0, 5e-6), ("hidden2", 1, 2e-4), ("hidden2", "held-out", 0.4)]
    rows = [("train", split, dib.ProbeResult(0, name, 1.0, 0.5, 0.5 - gap, 0.5)) for split, name, gap in gaps]
    monkeypatch.setattr(train, "measure_dib", lambda *_: rows)
    train_and_read(tmp_path / "run", "--epochs", "1", "--sets", "train")
    assert "  linear probes within 0.0002 nats, 1 of 2 not proved  " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "has_shuffled", "has_held_out", "has_noise"),
    [
        ([], True, True, True),
        (["--no-controls"], False, False, False),
        (["--sets", "train"], True, False, True),
        (["--sets", "test"], True, False, True),
        (["--splits", "hidden1"], True, True, False),  # no linear probes
        (["--probes", "thesis"], True, True, False),  # they are not solved
    ],
)
def test_controls_are_measured_unless_the_flags_leave_them_out(tmp_path, flags, has_shuffled, has_held_out, has_noise):
    rows = train_and_read(tmp_path / "run", "--epochs", "1", "--dib-size", "50", *flags)["dib.csv"]
    assert (rows["labeling"] == "shuffled").any() == has_shuffled
    assert (rows["labeling"] == "held-out").any() == has_held_out
    assert set(rows.loc[rows["labeling"] == "held-out", "set"]) <= {"test"}
    assert (tmp_path / "run" / "noise.csv").exists() == has_noise


SLOW_IN_LOWER_PRECISION = [(p, m) for p in ("float16", "bfloat16") for m in ("CIFARNet", "ResNet")]  # on a CPU


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        pytest.param(m, p, marks=[pytest.mark.slow] * (m == "ConvNeXt" or (p, m) in SLOW_IN_LOWER_PRECISION))
        for m in models.ARCHITECTURES
        for p in PRECISIONS
    ],
)
def test_every_model_runs_in_every_precision(tmp_path, pictures, monkeypatch, model, precision):
    check_run(monkeypatch, tmp_path / "run", model, "cpu", precision, "--epochs", "1", "--no-compile")


@pytest.mark.parametrize(
    "model", [pytest.param(m, marks=[pytest.mark.slow] * (m in ("ResNet", "ConvNeXt"))) for m in models.ARCHITECTURES]
)
def test_every_model_runs_on_grey_images(tmp_path, pictures, model):
    tables = train_and_read(tmp_path / "run", "-m", model, "-d", "MNIST", "--no-dib", "--train-size", "20")
    layers = len(models.layers(models.build(model, (1, 28, 28), 10))) - 3 * (model == "MLP")  # SMALL has 2, not 5
    assert tables["nc1.csv"]["layer"].nunique() == 1 + layers


def test_measuring_does_not_change_training_and_a_run_repeats(tmp_path):
    everything = train_and_read(tmp_path / "a", "--epochs", "3")
    train_and_read(tmp_path / "b", "--epochs", "3")
    train_and_read(tmp_path / "c", "--no-nc1", "--no-dib", "--epochs", "3")
    other = train_and_read(tmp_path / "d", "--no-nc1", "--seed", "1", "--epochs", "3")
    a, c, d = (load_weights(tmp_path / name) for name in "acd")
    assert all(torch.equal(v, c[k]) for k, v in a.items())
    assert not torch.equal(a["hidden1.0.weight"], d["hidden1.0.weight"])
    for name in ("nc1.csv", "dib.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert other["nc1.csv"].empty
    first = [table.query("split == 'input'")["loss"] for table in (other["dib.csv"], everything["dib.csv"])]
    assert not first[0].equals(first[1])  # there is no encoder: only the random numbers of DIB differ


def test_dib_does_not_depend_on_what_else_is_measured(tmp_path):
    everything = train_and_read(tmp_path / "a")["dib.csv"]
    train_and_read(tmp_path / "without", "--no-nc1")
    assert (tmp_path / "a" / "dib.csv").read_bytes() == (tmp_path / "without" / "dib.csv").read_bytes()
    flags = ["--no-nc1", "--sets", "test", "--splits", "hidden2", "--enumerations", "2"]
    part = train_and_read(tmp_path / "b", *flags)["dib.csv"]
    expected = everything.query("set == 'test' and split == 'hidden2' and labeling != 'held-out'")
    got = part.query("enumeration < 2")
    # probes of another enumeration are trained together with these, which may change rounding
    pd.testing.assert_series_equal(got["loss"], expected["loss"], check_index=False, rtol=1e-5)
    assert set(part["enumeration"]) == {0, 1, 2}


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_training_gives_the_same_values(tmp_path):
    flags = ["--no-dib", "--batch-size", "3481"]  # the whole set: one shape to compile
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    uncompiled = train_and_read(tmp_path / "a", *flags)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = train_and_read(tmp_path / "b", *flags, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for name in ("epochs.csv", "nc1.csv"):
        column = "loss" if name == "epochs.csv" else "nc1"
        pd.testing.assert_series_equal(uncompiled[name][column], compiled[name][column], rtol=1e-4)


def test_a_run_is_never_overwritten(tmp_path, capsys):
    train_and_read(tmp_path / "run", "--no-dib", "--epochs", "1")
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    error = refusal(capsys, *SMALL, "--run-dir", str(tmp_path / "run"), "--epochs", "1")
    assert "already holds a run: continue it with --resume, or choose another with --run-dir" in error
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "MLPP"], "invalid choice: 'MLPP'"),
        (["--data", "CIFAR11"], "invalid choice: 'CIFAR11'"),
        (["-nl", "relu"], "invalid choice: 'relu'"),
        (["-opt", "Lion"], "invalid choice: 'Lion'"),
        (["--splits", "hidden9"], "unknown split 'hidden9': expected some of input, flatten, hidden1, hidden2"),
        (["--sets", "valid"], "invalid choice: 'valid'"),
        (["-w", "0"], "--widths: expected a number of at least 1, got 0"),
        (["-w", "4", "-3"], "--widths: expected a number of at least 1, got -3"),
        (["-b", "0"], "--batch-size: expected a number of at least 1, got 0"),
        (["-lr", "-0.1"], "--learning-rate: expected a number above 0, got -0.1"),
        (["-lr", "nan"], "--learning-rate: expected a number above 0, got nan"),
        (["-lr", "inf"], "--learning-rate: expected a number below 2^63, got inf"),
        (["--epochs", "0"], "--epochs: expected a number of at least 1, got 0"),
        (["--epochs", "2.5"], "--epochs: invalid int value: '2.5'"),
        (["--seed", "9" * 20], "--seed: expected a number below 2^63, got 999"),
        (["--dib-epochs", "0"], "--dib-epochs: expected a number of at least 1, got 0"),
        (["--enumerations", "0"], "--enumerations: expected a number of at least 1 or data, got 0"),
        (["--enumerations", "all"], "--enumerations: expected a number of at least 1 or data, got all"),
        (["--labelings", "2"], "--labelings is now --enumerations"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--device", "gpu"], "--device gpu is not available: expected one of cpu"),
        (["--data", "MNIST", "--data-dir", "nowhere"], "MNIST was not found intact in"),
        (["--train-size", "7"], "the training size of SZT must be a multiple of 2 up to 3362, got 7"),
        (["--train-size", "4000"], "the training size of SZT must be a multiple of 2 up to 3362, got 4000"),
        (["--dib-size", "7"], "--dib-size of the SZT train set must be a multiple of 2 up to 3362, got 7"),
        (["--dib-size", "600"], "--dib-size of the SZT test set must be a multiple of 2 up to 594, got 600"),
        (["--probes", "longer"], "invalid choice: 'longer'"),
        (["--probes", "thesis", "--dib-lr", "0.1"], "--dib-lr 0.1 requires --probes tuned, got thesis"),
        (["--dib-lr", "0"], "--dib-lr: expected a number above 0, got 0"),
        (["--model", "ResNet"], "--widths and --nonlinearity require --model MLP, got ResNet"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
        (["--run-dir", "/proc/nowhere"], "No such file or directory: '/proc/nowhere'"),
    ],
)
def test_bad_flags_are_refused_on_one_line_and_nothing_is_written(tmp_path, capsys, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *SMALL, *flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", [name for name in models.ARCHITECTURES if name != "MLP"])
def test_a_network_with_convolutions_is_refused_for_szt(tmp_path, capsys, model):
    error = refusal(capsys, "--model", model, "--run-dir", str(tmp_path / "run"))
    assert f"{model} requires images (channels, height, width), got inputs of shape 12: use MLP" in error
    assert not list(tmp_path.iterdir())


def test_every_epoch_is_on_disk_when_its_line_is_printed(tmp_path, monkeypatch):
    epochs, print_epoch = [], train.print_epoch

    def look(*parts) -> None:
        tables = [pd.read_csv(tmp_path / "run" / name) for name in schema.COLUMNS]
        epochs.append([table["epoch"].max() for table in tables])
        print_epoch(*parts)

    monkeypatch.setattr(train, "print_epoch", look)
    train_and_read(tmp_path / "run", "--splits", "hidden2")
    assert epochs == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_is_refused_if_there_is_none(tmp_path, capsys):
    error = refusal(capsys, "--device", "cuda", "--run-dir", str(tmp_path / "run"))
    assert "--device cuda" in error


def test_batches_of_one_sample_are_refused_with_batchnorm(tmp_path, pictures, capsys):
    error = refusal(capsys, *NO_MLP, "-m", "ResNet", "-d", "CIFAR10", "-b", "1", "--run-dir", str(tmp_path / "run"))
    assert "--batch-size 1 is too small for 1 processes: each gets batches of 1 samples, expected at least 2" in error
    flags = ["-m", "ResNet", "-d", "CIFAR10", "-b", "13", "--epochs", "1", "--no-dib"]  # 40 is 3 x 13 + 1
    train_and_read(tmp_path / "run", *flags)


def test_compile_is_refused_without_a_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    error = refusal(capsys, *SMALL, "--compile", "--run-dir", str(tmp_path / "run"))
    assert "--compile requires a C++ compiler ($CXX or g++), not found" in error


def test_every_short_flag_works_from_a_shell(tmp_path):
    flags = "-m MLP -d SZT -w 4 3 -nl Tanh -b 500 -lr 0.01 -opt SGD --no-compile --epochs 1 --dib-epochs 1 --device cpu"
    command = f"{sys.executable} {ROOT}/train.py {flags}"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""  # there is a progress bar on a terminal only
    assert done.stdout.splitlines()[-1].startswith("done: the run is in runs/MLP-SZT-seed0")
    hparams = json.loads((tmp_path / "runs/MLP-SZT-seed0/hparams.json").read_text())
    assert (hparams["optimizer"], hparams["batch_size"], hparams["learning_rate"]) == ("SGD", 500, 0.01)
