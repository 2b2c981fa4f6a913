import csv
import json
from functools import partial
from itertools import pairwise
from math import log

import pytest
import torch
from torch import nn

import lr_range
import train
from lr_range import Step
from tests.test_resume import TINY, results
from tests.test_train import refusal
from tests.toys import clusters

PLAIN = (partial(torch.autocast, "cpu", enabled=False), torch.amp.GradScaler("cpu", enabled=False))


TUNED = [*TINY, "--train-size", "1280", "-b", "128", "--widths", "10", "7", "-nl", "Tanh"]


def steps_of(loss, n: int = 100) -> list[Step]:
    """Steps whose loss is a function of the logarithm of the rate to base 10, without noise."""
    rates = [10 ** (-6 + 6 * i / (n - 1)) for i in range(n)]
    return [Step(rate, loss(log(rate, 10)), loss(log(rate, 10))) for rate in rates]


def test_the_steepest_descent_of_a_known_curve():
    """A fall of logistic shape around 1e-3 is steepest there."""
    best = lr_range.steepest(steps_of(lambda x: 2 / (1 + 10 ** (x + 3))))
    assert log(steps_of(lambda x: 0)[best].learning_rate, 10) == pytest.approx(-3, abs=0.04)  # steps are 0.06 apart


def test_jumps_and_what_comes_after_the_lowest_point_do_not_count():
    def loss(x: float) -> float:
        if x > -1.5:
            return 5 - 2 * (x + 1.5)  # above all before, and falling more steeply
        return 2 / (1 + 10 ** (x + 3)) + (0.9 * (int(1000 * x) % 2) if x > -2 else 0)

    rate = steps_of(lambda x: 0)[lr_range.steepest(steps_of(loss))].learning_rate
    assert log(rate, 10) == pytest.approx(-3, abs=0.04)


@pytest.mark.parametrize("loss", [lambda x: 1.0, lambda x: x, lambda x: float(int(1000 * x) % 2)])
def test_a_loss_that_does_not_fall_is_refused(loss):
    for steps in (steps_of(loss), steps_of(loss, 3), []):
        with pytest.raises(ValueError, match="the loss falls steadily at no rate from 1e-06 to 1"):
            lr_range.steepest(steps)


def test_the_sweep():
    split, model = (
        clusters(90, 6, 3),
        nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.1), nn.Linear(5, 3)),
    )
    model.eval()
    before, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    adam = partial(torch.optim.Adam, fused=True)
    steps = lr_range.sweep(model, split, adam, 40, *PLAIN)
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
    assert steps == lr_range.sweep(model, split, adam, 40, *PLAIN)


def test_the_sweep_ends_where_the_loss_diverges():
    split, model = clusters(300, 6, 3), nn.Sequential(nn.Linear(6, 3))
    split.x *= 1e3
    steps = lr_range.sweep(model, split, torch.optim.SGD, 3, *PLAIN)
    assert 0 < len(steps) < 100
    assert all(b.smoothed <= 4 * min(a.smoothed for a in steps[: i + 1]) for i, b in enumerate(steps[1:]))


def test_a_tuned_run_trains_as_one_with_that_rate(tmp_path, capsys):
    train.main([*TUNED, "--tune", "--run-dir", str(tmp_path / "tuned")])
    rate = json.loads((tmp_path / "tuned" / "hparams.json").read_text())["learning_rate"]
    assert (
        f"learning rate {rate:.3g}, by the range test: {tmp_path / 'tuned' / 'lr_range.csv'}" in capsys.readouterr().out
    )
    with (tmp_path / "tuned" / "lr_range.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100  # 10 passes of 10 batches
    assert [float(row["learning_rate"]) for row in rows if row["chosen"] == "1"] == [rate]
    train.main([*TUNED, "-lr", str(rate), "--run-dir", str(tmp_path / "plain")])
    assert results(tmp_path / "tuned") == results(tmp_path / "plain")


def test_a_tuned_run_goes_on_with_its_rate(tmp_path):
    flags = [*TUNED, "--tune", "--run-dir", str(tmp_path / "run")]
    train.main([*flags, "--epochs", "1"])
    before = (tmp_path / "run" / "lr_range.csv").read_bytes()
    train.main([*flags, "--resume"])
    train.main([*flags[:-1], str(tmp_path / "whole")])
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    assert (tmp_path / "run" / "lr_range.csv").read_bytes() == before


def test_the_range_test_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # it may be done again
        train.main([*TUNED, "--tune", "only"])
    folder = tmp_path / "runs" / "MLP-SZT-seed0-lr-range"
    assert (folder / "epochs.csv").read_text() == "epoch,set,loss,accuracy,seconds\n"
    assert len((folder / "lr_range.csv").read_text().splitlines()) == 101


def test_no_rate_is_found_for_a_loss_that_does_not_fall(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lr_range, "HIGHEST", 2e-6)
    error = refusal(capsys, *TUNED, "--tune", "--run-dir", str(tmp_path / "run"))
    assert "--tune: the loss falls steadily at no rate from 1e-06 to 2e-06" in error
    assert not list(tmp_path.iterdir())


def test_refuses_a_rate_beside_the_test_and_epochs_after_the_test_alone(tmp_path, capsys):
    error = refusal(capsys, *TUNED, "--tune", "-lr", "0.5", "--run-dir", str(tmp_path / "run"))
    assert "--learning-rate 0.5 is given, and --tune is to find it" in error
    assert not list(tmp_path.iterdir())
    train.main([*TUNED, "--tune", "only", "--run-dir", str(tmp_path / "run")])
    error = refusal(capsys, "--resume", "--run-dir", str(tmp_path / "run"))
    assert "holds a range test alone, which has no epochs" in error
