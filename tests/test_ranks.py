"""Two processes over gloo give what one gives. torchrun runs this file, too: python -m tests.test_ranks FILE."""

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
import heads
import models
import nc1
import ranks
import runs
import train
from tests.test_dib import drawing
from tests.test_resume import TINY, assert_same
from tests.test_train import ROOT, refusal
from tests.toys import Toy, clusters, random_images

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


def double(split: Toy) -> Toy:
    return Toy(split.x.double(), split.labels)


def measures() -> dict:
    """Both measures on fixed weights, with shares that are even, uneven and, with one batch for two, empty."""
    found = {}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 4))
    taps = {"norm": model[1], "tanh": model[2], "last": model[3]}
    for N, batch_size in ((90, 15), (90, 20), (91, 45), (90, 100)):
        for keep_bytes in (0, 90 * 9 * 4, nc1.KEEP_BYTES):
            values = nc1.measure(model, taps, clusters(N, 6, 3), 3, batch_size, keep_bytes)
            found[f"NC1 {N} {batch_size} {keep_bytes}"] = values

    mlp = partial(models.build, "MLP", (6,), 3, widths=(5, 4), nonlinearity="Tanh")
    recipes = heads.Thesis(partial(torch.optim.SGD, lr=0.1), 12), heads.Tuned(20)
    for name, build, splits, N in (
        ("plain, the last split linear", mlp, [0, 2, 3], 90),
        ("few heads", mlp, [2], 3),
        ("drawing", drawing, [0, 1], 90),
    ):
        model, split = build().double(), double(clusters(N, 6, 3))
        for recipe in recipes:
            found[f"DIB {name}, {type(recipe).__name__}"] = dib.measure_splits(
                model, splits, split, 3, lambda build=build: build().double(), recipe, labelings=2, batch_size=40
            )
    return found


def torchrun(*arguments: str) -> None:
    done = subprocess.run([*TORCHRUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_measures_are_those_of_one_process(tmp_path):
    torchrun("-m", "tests.test_ranks", str(tmp_path / "found"))
    expected = json.loads(json.dumps(measures()))
    for rank in range(2):
        got = json.loads((tmp_path / f"found{rank}").read_text())
        assert got.keys() == expected.keys()
        for name in expected:
            assert got[name].keys() == expected[name].keys()
            for tap in expected[name]:
                if name.startswith("NC1"):
                    assert got[name][tap] == pytest.approx(expected[name][tap], rel=1e-9)
                else:
                    for head, other in zip(got[name][tap], expected[name][tap], strict=True):
                        assert head[:2] == other[:2]
                        assert head[2:] == pytest.approx(other[2:], rel=1e-9)


def test_every_batch_falls_to_one_process(monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 3)
    for n in range(8):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            shares.append(ranks.share(list(range(n))))
        assert sorted(i for share in shares for i in share) == list(range(n))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_costs_by_hand():
    """A linear layer of 6 x 5 reads 6, writes 5 and multiplies 30 times; a convolution does so at every pixel."""
    mlp = models.build("MLP", (6,), 3, widths=(5,))
    assert heads.costs(mlp, [0, 1, 2], torch.zeros(1, 6)) == pytest.approx(
        {0: 12 + (11 + 30 / 40) + 10 + (8 + 15 / 40), 1: (11 + 30 / 40) + 10 + (8 + 15 / 40), 2: 8 + 15 / 40}
    )
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    assert heads.costs(convolution, [1, 0], torch.zeros(1, 2, 4, 4)) == pytest.approx(
        {1: 32 + 19 + 48 / 40, 0: (32 + 16 + 4 * 72 / 40) + 32 + 19 + 48 / 40}
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("J", [1, 4, 13])
def test_every_head_is_dealt_once_and_evenly(world, J):
    costs = {0: 100.0, 1: 70.0, 3: 45.0, 4: 20.0, 6: 1.0}
    hands = ranks.deal(costs, J, world)
    assert sorted(head for hand in hands for head in hand) == [(k, j) for k in costs for j in range(J)]
    loads = [sum(costs[k] for k, _ in hand) for hand in hands]
    fair = J * sum(costs.values()) / world
    assert max(loads) <= max(1.1 * fair, fair + max(costs.values()))


MEASURED = ("loss", "accuracy", "seconds", "rank", "nc1", "kept", "dropped", "bound")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [*TINY, "-nl", "Tanh", "--train-size", "1280", "-b", "129", "--tune"],
        # 3 and 2 samples: their means weigh differently
        [*TINY, "-nl", "Tanh", "--train-size", "600", "-b", "5", "-opt", "SGD", "-lr", "0.1"],
        ["-m", "CIFARNet", "-d", "CIFAR10", "-b", "13", "--splits", "group3", "--dib-epochs", "1", "--device", "cpu"],
    ],
    ids=["tuned", "uneven", "CIFARNet"],
)
def test_a_run_of_two_processes_has_the_rows_of_one(tmp_path, pictures, flags):
    """With BatchNorm, which sees half the batch, the network trains otherwise, but the rows are the same."""
    flags = [*flags, "--epochs", "2", "--sets", "test"]
    train.main([*flags, "--run-dir", str(tmp_path / "one")])
    torchrun("-m", "tests.test_ranks", "train", *flags, "--run-dir", str(tmp_path / "two"))
    for name, columns in runs.COLUMNS.items():
        one, two = (pd.read_csv(tmp_path / run / name, dtype={"labeling": str}) for run in ("one", "two"))
        keys = [c for c in columns.split(",") if c not in MEASURED]
        pd.testing.assert_frame_equal(one[keys], two[keys])
        if "CIFARNet" not in flags:
            one, two = (table.drop(columns="seconds", errors="ignore") for table in (one, two))
            pd.testing.assert_frame_equal(one, two, rtol=1e-3, atol=1e-4)
    assert runs.load(tmp_path / "two")["hparams"]["processes"] == 2
    train.main(["--run-dir", str(tmp_path / "two"), "--resume", "--epochs", "3"])  # by one process
    assert runs.load(tmp_path / "two")["epoch"] == 3


def watched(folder: str) -> None:
    """Three epochs of a network that draws and normalises; what this process trained on, and measured with."""
    trained, buffers, batch, score = [], [], data.Split.batch, train.score

    def build(input_shape: tuple[int, ...], num_classes: int) -> nn.Sequential:
        model = nn.Sequential()
        model.add_module(
            "hidden1", nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
        )
        model.add_module("classifier", nn.Linear(64, num_classes))
        model.tap_names = model.split_names = ("hidden1",)
        return model

    def watch_batch(split: data.Split, indices: torch.Tensor) -> tuple:
        if torch.is_grad_enabled():  # training alone
            trained.append(indices.tolist())
        return batch(split, indices)

    def watch_score(model: nn.Module, *rest) -> tuple:
        buffers.append([buffer.double().sum().item() for buffer in model.buffers()])
        return score(model, *rest)

    models.ARCHITECTURES["MNISTNet"] = build
    data.SOURCES["CIFAR10"] = random_images(3, 32, 32)
    data.Split.batch, train.score = watch_batch, watch_score
    flags = ["-m", "MNISTNet", "-d", "CIFAR10", "-b", "14", "--no-dib", "--no-nc1", "--epochs", "3", "--device", "cpu"]
    rank = os.environ["RANK"]
    train.main([*flags, "--run-dir", f"{folder}/run"])
    Path(f"{folder}/{rank}").write_text(json.dumps([trained, buffers]))


def test_no_sample_is_trained_on_twice_and_all_measure_one_network(tmp_path):
    torchrun("-m", "tests.test_ranks", "watched", str(tmp_path))
    (trained, buffers), (other_trained, other_buffers) = (json.loads((tmp_path / str(r)).read_text()) for r in range(2))
    assert {len(indices) for indices in trained + other_trained} == {6, 7}  # batches of 14, 13 and 13
    for epoch in range(3):
        steps = slice(3 * epoch, 3 * epoch + 3)
        seen = [i for indices in trained[steps] + other_trained[steps] for i in indices]
        assert sorted(seen) == list(range(40))
    assert buffers == other_buffers


@pytest.mark.slow
def test_two_processes_go_on_as_two(tmp_path):
    flags = [*TINY, "-nl", "Tanh", "--sets", "test"]
    torchrun("-m", "tests.test_ranks", "train", *flags, "--epochs", "3", "--run-dir", str(tmp_path / "whole"))
    torchrun("-m", "tests.test_ranks", "train", *flags, "--epochs", "1", "--run-dir", str(tmp_path / "parts"))
    torchrun("-m", "tests.test_ranks", "train", "--resume", "--epochs", "3", "--run-dir", str(tmp_path / "parts"))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_what_one_process_refuses_all_refuse(tmp_path):
    """The first finds a run in the folder, which the others do not look for; it alone says so."""
    train.main([*TINY, "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    command = [*TORCHRUN, "train.py", *TINY, "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1
    assert "already holds a run" in lines[0]
    assert "terminate called" not in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_process_that_dies_ends_the_others(tmp_path):
    command = [*TORCHRUN, "train.py", *TINY, "--no-dib", "--epochs", "100000", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch"):  # gloo may print first
        pass
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(victim), signal.SIGKILL)
    start = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert f"finished epochs are kept in {tmp_path / 'run'}" in error
    assert runs.load(tmp_path / "run")["epoch"] > runs.BEGUN


def test_refuses_batches_too_small_to_share(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 5)
    error = refusal(capsys, *TINY, "-b", "4", "--run-dir", str(tmp_path / "run"))
    assert "--batch-size 4 gives each of 5 processes batches of 0, and this model needs at least 1 samples" in error


if __name__ == "__main__":
    if sys.argv[1] == "train":
        data.SOURCES["CIFAR10"] = random_images(3, 32, 32)
        train.main(sys.argv[2:])
    elif sys.argv[1] == "watched":
        watched(sys.argv[2])
    else:
        ranks.join()
        Path(f"{sys.argv[1]}{ranks.rank()}").write_text(json.dumps(measures()))
        ranks.leave()
