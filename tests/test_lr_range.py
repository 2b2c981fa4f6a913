"""The learning-rate range test: its steps, the rate that it chooses, and runs that train with that rate."""

import csv
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import log

import pytest
import torch
from torch import nn

import train
from tests.toys import TUNED, make_clusters, read_results, refusal
from training import lr_range
from training.lr_range import Step


def make_steps(loss: Callable[[float], float], n: int = 100) -> list[Step]:
    """Return steps whose loss is a function of the logarithm of the rate to base 10, without noise."""
    rates = [10 ** (-6 + 6 * i / (n - 1)) for i in range(n)]
    return [Step(rate, loss(log(rate, 10)), loss(log(rate, 10))) for rate in rates]


def test_the_steepest_step_of_a_known_curve_is_found():
    """The loss is a logistic function of the logarithm of the rate, which is steepest at 1e-3."""
    best = lr_range.find_steepest(make_steps(lambda x: 2 / (1 + 10 ** (x + 3))))
    assert log(make_steps(lambda x: 0)[best].learning_rate, 10) == pytest.approx(-3, abs=0.04)  # steps are 0.06 apart


def test_jumps_and_steps_after_the_lowest_point_are_not_chosen():
    def loss(x: float) -> float:
        if x > -1.5:
            return 5 - 2 * (x + 1.5)  # above all losses before, and steeper
        return 2 / (1 + 10 ** (x + 3)) + (0.9 * (int(1000 * x) % 2) if x > -2 else 0)

    rate = make_steps(lambda x: 0)[lr_range.find_steepest(make_steps(loss))].learning_rate
    assert log(rate, 10) == pytest.approx(-3, abs=0.04)


@pytest.mark.parametrize("loss", [lambda x: 1.0, lambda x: x, lambda x: float(int(1000 * x) % 2)])
def test_a_loss_that_does_not_fall_is_refused(loss):
    for steps in (make_steps(loss), make_steps(loss, 3), []):
        with pytest.raises(ValueError, match="found no learning rate from 1e-06 to 1 at which"):
            lr_range.find_steepest(steps)


def test_the_rate_grows_exponentially_and_nothing_else_changes():
    samples = make_clusters(90, 6, 3)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 3)).eval()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    adam = partial(torch.optim.Adam, fused=True)
    steps = lr_range.run_test(model, samples, adam, 40, "float32")
    assert len(steps) == 102  # 34 passes of 3 batches
    assert steps[0].learning_rate == pytest.approx(1e-6)
    assert steps[-1].learning_rate == pytest.approx(1)
    ratios = [b.learning_rate / a.learning_rate for a, b in pairwise(steps)]
    assert ratios == pytest.approx([ratios[0]] * 101)
    assert steps[0].smoothed == pytest.approx(steps[0].loss)
    assert steps[1].smoothed == pytest.approx((0.16 * steps[0].loss + 0.2 * steps[1].loss) / 0.36)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert torch.equal(random, torch.get_rng_state())
    assert steps == lr_range.run_test(model, samples, adam, 40, "float32")


def test_the_range_test_ends_when_the_loss_diverges():
    samples, model = make_clusters(300, 6, 3), nn.Sequential(nn.Linear(6, 3))
    samples.inputs *= 1e3
    steps = lr_range.run_test(model, samples, torch.optim.SGD, 3, "float32")
    assert 0 < len(steps) < 100
    assert all(b.smoothed <= 4 * min(a.smoothed for a in steps[: i + 1]) for i, b in enumerate(steps[1:]))


def test_a_tuned_run_is_that_of_a_run_with_its_rate(tmp_path, capsys):
    train.main([*TUNED, "--tune", "--run-dir", str(tmp_path / "tuned")])
    rate, table = json.loads((tmp_path / "tuned" / "hparams.json").read_text())["learning_rate"], "tuned/lr_range.csv"
    assert f"learning rate {rate:.3g}, by the range test: {tmp_path / table}" in capsys.readouterr().out
    with (tmp_path / table).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100  # 10 passes of 10 batches
    assert [float(row["learning_rate"]) for row in rows if row["chosen"] == "1"] == [rate]
    train.main([*TUNED, "-lr", str(rate), "--run-dir", str(tmp_path / "given")])
    assert read_results(tmp_path / "tuned") == read_results(tmp_path / "given")


def test_a_resumed_run_keeps_the_rate_of_its_range_test(tmp_path):
    flags = [*TUNED, "--tune", "--run-dir", str(tmp_path / "run")]
    train.main([*flags, "--epochs", "1"])
    before = (tmp_path / "run" / "lr_range.csv").read_bytes()
    train.main([*flags, "--resume"])
    train.main([*flags[:-1], str(tmp_path / "whole")])
    assert read_results(tmp_path / "run") == read_results(tmp_path / "whole")
    assert (tmp_path / "run" / "lr_range.csv").read_bytes() == before


def test_the_range_test_may_run_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # it may be repeated
        train.main([*TUNED, "--tune", "only"])
    folder = tmp_path / "runs" / "MLP-SZT-seed0-lr-range"
    assert (folder / "epochs.csv").read_text() == "epoch,set,loss,accuracy,seconds\n"
    assert len((folder / "lr_range.csv").read_text().splitlines()) == 101


def test_a_run_is_refused_if_the_range_test_finds_no_rate(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lr_range, "HIGHEST", 2e-6)
    error = refusal(capsys, *TUNED, "--tune", "--run-dir", str(tmp_path / "run"))
    assert "2e-06" in error
    assert not list(tmp_path.iterdir())


def test_a_rate_together_with_tune_and_epochs_after_tune_only_are_refused(tmp_path, capsys):
    error = refusal(capsys, *TUNED, "--tune", "-lr", "0.5", "--run-dir", str(tmp_path / "run"))
    assert "--learning-rate 0.5 cannot be combined with --tune, which determines it" in error
    assert not list(tmp_path.iterdir())
    train.main([*TUNED, "--tune", "only", "--run-dir", str(tmp_path / "run")])
    error = refusal(capsys, "--resume", "--run-dir", str(tmp_path / "run"))
    assert "is a learning-rate range test, which cannot be continued" in error
