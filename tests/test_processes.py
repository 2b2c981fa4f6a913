"""Two processes, connected by gloo, measure and train as one does.

torchrun runs this file as well: python -m tests.test_processes measure FILE, record FOLDER or train FLAGS.
"""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn

import data
import dib
import models
import nc1
import train
from layerwise import devices, processes, schema
from layerwise.samples import Samples
from tests.toys import (
    QUICK,
    ROOT,
    TORCHRUN,
    assert_same_run,
    make_clusters,
    make_image_source,
    make_mlp,
    make_random_net,
    make_toy_samples,
    refusal,
    run_torchrun,
)
from training import checkpoint


def measure_all() -> dict:
    """Return both measures of networks with fixed weights.

    The processes get the same numbers of batches, different ones, or, of a single batch, one and none.
    """
    found = {}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 4))
    layers = {"norm": model[1], "tanh": model[2], "last": model[3]}
    for N, batch_size in ((90, 15), (90, 20), (91, 45), (90, 100)):
        for cache_bytes in (0, 90 * 9 * 4, devices.CACHE_BYTES):
            values = nc1.measure(model, layers, make_clusters(N, 6, 3), 3, batch_size, cache_bytes)
            found[f"NC1 {N} {batch_size} {cache_bytes}"] = values

    for name, make_model, splits, N in (
        ("MLP, the last split linear", make_mlp, [0, 2, 3], 90),
        ("few probes", make_mlp, [2], 3),
        ("random layers", make_random_net, [0, 1], 90),
    ):
        model, samples = make_model(), make_toy_samples(N)
        for probes in (dib.Thesis(partial(torch.optim.SGD, lr=0.1), 12), dib.Tuned(20)):
            options = {"probes": probes, "enumerations": 2, "held_out": make_toy_samples(50), "batch_size": 40}
            results = dib.measure_splits(model, splits, samples, 3, make_model, **options)
            found[f"DIB {name}, {type(probes).__name__}"] = results
    return found


def test_measures_are_those_of_one_process(tmp_path):
    run_torchrun("-m", "tests.test_processes", "measure", str(tmp_path / "found"))
    expected = json.loads(json.dumps(measure_all()))
    for rank in range(2):
        got = json.loads((tmp_path / f"found{rank}").read_text())
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].keys() == expected[name].keys()
            for layer in expected[name]:
                if name.startswith("NC1"):
                    assert got[name][layer] == pytest.approx(expected[name][layer], rel=1e-9)
                else:
                    for result, other in zip(got[name][layer], expected[name][layer], strict=True):
                        assert result[:2] == other[:2]
                        assert result[2:] == pytest.approx(other[2:], rel=1e-9)


def test_every_batch_is_in_the_share_of_one_process(monkeypatch):
    monkeypatch.setattr(processes, "get_world_size", lambda: 3)
    for n in range(8):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(processes, "get_rank", lambda rank=rank: rank)
            shares.append(processes.take_share(list(range(n))))
        assert sorted(i for share in shares for i in share) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


MEASURED = ("loss", "accuracy", "seconds", "rank", "nc1", "kept", "dropped", "lower", "upper")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*QUICK, "-nl", "Tanh", "--train-size", "1280", "-b", "129", "--tune"],
        # the shares of a batch have 3 and 2 samples
        [*QUICK, "-nl", "Tanh", "--train-size", "600", "-b", "5", "-opt", "SGD", "-lr", "0.1"],
        ["-m", "CIFARNet", "-d", "CIFAR10", "-b", "13", "--splits", "group3", "--dib-epochs", "1", "--device", "cpu"],
    ],
    ids=["tuned", "uneven", "CIFARNet"],
)
def test_a_run_of_two_processes_has_the_rows_of_one(tmp_path, pictures, flags):
    """With BatchNorm, which normalises each share of a batch alone, the values differ, but the rows are the same."""
    flags = [*flags, "--epochs", "2", "--sets", "test"]
    train.main([*flags, "--run-dir", str(tmp_path / "one")])
    run_torchrun("-m", "tests.test_processes", "train", *flags, "--run-dir", str(tmp_path / "two"))
    for name, columns in schema.COLUMNS.items():
        one, two = (pd.read_csv(tmp_path / run / name, dtype={"labeling": str}) for run in ("one", "two"))
        keys = [c for c in columns.split(",") if c not in MEASURED]
        pd.testing.assert_frame_equal(one[keys], two[keys])
        if "CIFARNet" not in flags:
            one, two = (table.drop(columns="seconds", errors="ignore") for table in (one, two))
            pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-4)
    assert checkpoint.load(tmp_path / "two")["hparams"]["processes"] == 2
    train.main(["--run-dir", str(tmp_path / "two"), "--resume", "--epochs", "3"])  # by one process
    assert checkpoint.load(tmp_path / "two")["epoch"] == 3


def record_training(folder: str) -> None:
    """Train a network with dropout and BatchNorm for three epochs as one of two processes.

    Write the indices of the batches that this process trained on, and the sums of the parameters and buffers of the
    networks that it measured.
    """
    trained, sums, batch, compute_score = [], [], Samples.batch, train.compute_score

    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        model = nn.Sequential()
        hidden = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()
        model.add_module("hidden1", nn.Sequential(*hidden))
        model.add_module("classifier", nn.Linear(64, num_classes))
        model.layer_names = model.split_names = ("hidden1",)
        return model

    def watch_batch(samples: Samples, indices: torch.Tensor) -> tuple:
        if torch.is_grad_enabled():  # in training only
            trained.append(indices.tolist())
        return batch(samples, indices)

    def watch_score(model: nn.Module, *rest) -> tuple:
        sums.append([tensor.double().sum().item() for tensor in model.state_dict().values()])
        return compute_score(model, *rest)

    models.ARCHITECTURES["MNISTNet"] = build
    data.SOURCES["CIFAR10"] = make_image_source(3, 32, 32)
    Samples.batch, train.compute_score = watch_batch, watch_score
    flags = ["-m", "MNISTNet", "-d", "CIFAR10", "-b", "14", "--no-dib", "--no-nc1", "--epochs", "3", "--device", "cpu"]
    rank = os.environ["RANK"]
    train.main([*flags, "--run-dir", f"{folder}/run"])
    Path(f"{folder}/{rank}").write_text(json.dumps([trained, sums]))


def test_processes_train_on_different_samples_and_measure_the_same_network(tmp_path):
    run_torchrun("-m", "tests.test_processes", "record", str(tmp_path))
    (trained, sums), (other_trained, other_sums) = (json.loads((tmp_path / str(r)).read_text()) for r in range(2))
    assert {len(indices) for indices in trained + other_trained} == {6, 7}  # batches of 14, 13 and 13
    for epoch in range(3):
        steps = slice(3 * epoch, 3 * epoch + 3)
        seen = [i for indices in trained[steps] + other_trained[steps] for i in indices]
        assert sorted(seen) == list(range(40))
    assert sums == other_sums


@pytest.mark.slow
def test_a_run_of_two_processes_is_resumed_by_two(tmp_path):
    flags = [*QUICK, "-nl", "Tanh", "--sets", "test"]
    start = ["-m", "tests.test_processes", "train"]
    run_torchrun(*start, *flags, "--epochs", "3", "--run-dir", str(tmp_path / "whole"))
    run_torchrun(*start, *flags, "--epochs", "1", "--run-dir", str(tmp_path / "parts"))
    run_torchrun(*start, "--resume", "--epochs", "3", "--run-dir", str(tmp_path / "parts"))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_error_of_one_process_ends_all_with_one_line(tmp_path):
    """Only the first process looks for a run in the folder."""
    train.main([*QUICK, "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    command = [*TORCHRUN, "train.py", *QUICK, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    assert str(tmp_path / "run") in lines[0]
    assert "terminate called" not in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_process_that_dies_ends_the_others(tmp_path):
    command = [*TORCHRUN, "train.py", *QUICK, "--no-dib", "--epochs", "100000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch"):  # gloo may print lines before
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert f"finished epochs are saved in {tmp_path / 'run'}" in error
    assert checkpoint.load(tmp_path / "run")["epoch"] > checkpoint.BEGUN


def test_batches_that_are_too_small_to_share_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(processes, "get_world_size", lambda: 5)
    error = refusal(capsys, *QUICK, "-b", "4", "--run-dir", str(tmp_path / "run"))
    assert "--batch-size 4 is too small for 5 processes: each gets batches of 0" in error


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "train":
        data.SOURCES["CIFAR10"] = make_image_source(3, 32, 32)
        train.main(words)
    elif task == "record":
        record_training(*words)
    else:
        processes.join_group()
        Path(f"{words[0]}{processes.get_rank()}").write_text(json.dumps(measure_all()))
        processes.leave_group()
