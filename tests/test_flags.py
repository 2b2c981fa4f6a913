"""What can be asked of a run: options of torch's, schedules, published recipes, chosen epochs."""

import argparse
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import flags
import runs
import train
from analysis import gallery, tables
from tests.test_resume import TINY, assert_same
from tests.test_train import SMALL, refusal

SHORT = [*TINY, "--no-dib", "--no-nc1"]


def hparams(folder: Path) -> dict:
    return json.loads((folder / "hparams.json").read_text())


def group_of(folder: Path) -> dict:
    """The optimizer's settings that the checkpoint holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"][0]


def test_options_of_the_optimizer_are_those_that_it_gets(tmp_path):
    options = ["-opt", "SGD", "momentum=0.9", "weight_decay=5e-4", "nesterov=True"]
    train.main([*SHORT, *options, "--run-dir", str(tmp_path / "run")])
    group = group_of(tmp_path / "run")
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)
    had = hparams(tmp_path / "run")
    assert had["optimizer"] == "SGD"
    assert had["optimizer_options"] == {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    again = ["--run-dir", str(tmp_path / "run"), "--resume"]
    train.main([*again, *options, "--epochs", "3"])
    train.main([*again, "--epochs", "4"])
    assert group_of(tmp_path / "run")["momentum"] == 0.9


def test_momentum_and_decay_do_what_torch_says(tmp_path):
    """Two steps by hand on one batch, from the weights of a run that has not begun."""
    train.main([*SHORT, "-b", "64", "-opt", "SGD", "momentum=0.5", "weight_decay=0.1", "--epochs", "2",
                "--run-dir", str(tmp_path / "run")])  # fmt: skip
    run, _ = train.prepare(flags.parse([*SHORT, "--run-dir", str(tmp_path / "other")]))
    x, y = run.sets["train"].batch(torch.arange(64))
    momenta = [torch.zeros_like(p) for p in run.model.parameters()]
    for _ in range(2):
        run.model.zero_grad()
        torch.nn.functional.cross_entropy(run.model(x), y).backward()
        with torch.no_grad():
            for i, (p, m) in enumerate(zip(run.model.parameters(), momenta, strict=True)):
                momenta[i] = 0.5 * m + p.grad + 0.1 * p
                p -= flags.LEARNING_RATE * momenta[i]
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(after[name], p.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SGD", "momentun=0.9"], "torch.optim.SGD refuses momentun=0.9: SGD.__init__() got an unexpected keyword"),
        (["SGD", "momentum=-1"], "torch.optim.SGD refuses momentum=-1: Invalid momentum value: -1"),
        (["SGD", "nesterov=True"], "torch.optim.SGD refuses nesterov=True: Nesterov momentum requires a momentum"),
        (["Adam", "betas=0.9"], "torch.optim.Adam refuses betas=0.9: "),
        (["Adam", "betas=0.9,2"], "torch.optim.Adam refuses betas=[0.9, 2]: Invalid beta parameter at index 1: 2"),
        (["SGD", "momentum"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'momentum'"),
        (["SGD", "momentum=fast"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'momentum=fast'"),
        (
            ["AdamW", "fused=False", "capturable=True"],
            "torch.optim.AdamW refuses fused=False capturable=True: If captur",
        ),
        (["SGD", "dampening='x'"], "torch.optim.SGD refuses dampening=x: "),
        (["SGD", "dampening=1j"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'dampening=1j'"),
        (["Adam", "betas={}"], "torch.optim.Adam refuses betas={}: "),
        (["SGD", "lr=0.1"], "the learning rate is --learning-rate's, got lr as an option"),
        (["Lion", "momentum=0.9"], "invalid choice: 'Lion'"),
    ],
)
def test_refuses_options_that_torch_refuses(tmp_path, capsys, options, message):
    assert message in refusal(capsys, *SMALL, "-opt", *options, "--run-dir", str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["foreach=True", "fused=False", "maximize=False"])
def test_options_of_how_torch_computes_are_taken(tmp_path, option):
    train.main([*SHORT, "-opt", "SGD", option, "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    assert bool(group_of(tmp_path / "run")["fused"]) == (option == "maximize=False")


def test_a_run_steps_its_schedule(tmp_path):
    """After every training step, as many as there are."""
    train.main([*SHORT, "--schedule", "cosine", "--epochs", "4", "--run-dir", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["schedule"]["last_epoch"] == 4 * 4  # of 64 samples in batches of 16
    assert group_of(tmp_path / "run")["lr"] == pytest.approx(0, abs=1e-12)


def rates(schedule: str, steps: int) -> list[float]:
    """The learning rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = flags.schedule_of(argparse.Namespace(schedule=schedule, learning_rate=1.0), optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return found


def test_schedules():
    assert rates("constant", 30) == [1.0] * 30
    assert rates("steps", 30) == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    cosine = rates("cosine", 30)
    assert cosine[0] == 1.0
    assert cosine[15] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.01
    cycle = rates("one-cycle", 30)
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(cycle) == pytest.approx(1.0, abs=0.01)
    assert cycle.index(max(cycle)) in (8, 9)  # after 30 %
    assert cycle[-1] < 1e-4


@pytest.mark.parametrize("schedule", flags.SCHEDULES)
def test_a_schedule_goes_on_where_it_stood(tmp_path, monkeypatch, capsys, schedule):
    command = [*SHORT, "--schedule", schedule, "--epochs", "3"]
    train.main([*command, "--run-dir", str(tmp_path / "whole")])
    save = runs.save

    def crash(folder: Path, epoch: int, *rest) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        save(folder, epoch, *rest)

    with monkeypatch.context() as failing:
        failing.setattr(runs, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, "--run-dir", str(tmp_path / "run")])
    again = ["--run-dir", str(tmp_path / "run"), "--resume"]
    train.main(again)
    assert_same(tmp_path / "whole", tmp_path / "run")
    if schedule == "constant":
        train.main([*again, "--epochs", "4"])
    else:
        error = refusal(capsys, *again, "--epochs", "4")
        assert f"--epochs cannot grow from 3 to 4, on which --schedule {schedule} depends" in error


def test_a_recipe_sets_what_is_not_given(tmp_path):
    recipe = flags.RECIPES["papyan"]
    args = flags.parse(["--recipe", "papyan", "-b", "64", "--epochs", "7"])
    assert (args.batch_size, args.epochs) == (64, 7)
    assert {name: getattr(args, name) for name in recipe if name not in ("batch_size", "epochs")} == {
        name: value for name, value in recipe.items() if name not in ("batch_size", "epochs")
    }
    args = flags.parse(["--recipe", "oikarinen"])
    assert (args.model, args.optimizer, args.optimizer_options) == ("MNISTNet", "Adam", {"betas": [0.7, 0.9]})
    run = tmp_path / "run"
    train.main([*SHORT, "--recipe", "papyan", "--epochs", "1", "-b", "16", "--run-dir", str(run)])
    had = hparams(run)
    assert (had["recipe"], had["optimizer"], had["learning_rate"], had["batch_size"]) == ("papyan", "SGD", 0.0679, 16)
    assert (had["schedule"], had["measure"]) == ("steps", "log")
    train.main(["--recipe", "papyan", "--run-dir", str(run), "--resume"])  # it has what it had


def test_a_run_of_a_recipe_goes_on_by_the_same_command(tmp_path, monkeypatch, pictures):
    """In the folder that the recipe's model names."""
    monkeypatch.chdir(tmp_path)
    command = ["--recipe", "oikarinen", "-d", "CIFAR10", "--device", "cpu", "--no-dib"]
    train.main(command)
    train.main([*command, "--resume"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["MNISTNet-CIFAR10-seed0"]


def test_a_range_test_finds_the_rate_of_a_recipe():
    assert flags.parse(["--recipe", "papyan", "--tune"]).learning_rate is None
    assert flags.parse(["--recipe", "papyan"]).learning_rate == 0.0679


@pytest.mark.parametrize("name", flags.RECIPES)
def test_every_recipe_is_of_flags_that_there_are(name):
    args, plain = flags.parse(["--recipe", name]), flags.parse([])
    assert set(vars(args)) == set(vars(plain))
    flags.optimizer_of(args)([torch.nn.Parameter(torch.zeros(1))])


def test_a_recipe_for_another_model_is_refused(capsys):
    assert "--recipe oikarinen is that of MNISTNet, and the model is ResNet" in refusal(
        capsys, "--recipe", "oikarinen", "-m", "ResNet"
    )


def test_the_epochs_of_the_log_grid():
    grid = [epoch for epoch in range(1001) if flags.is_measured("log", epoch, 1000)]
    assert grid[:12] == [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32]  # 10^(1/8) is 1.33, and is 1 again
    assert grid[-3:] == [562, 750, 1000]
    shorter = [epoch for epoch in range(51) if flags.is_measured("log", epoch, 50)]
    assert set(shorter) - {50} <= set(grid)  # runs of any length share epochs
    assert 50 in shorter
    assert [e for e in range(6) if flags.is_measured([0, 5], e, 9)] == [0, 5]
    assert all(flags.is_measured("all", epoch, 9) for epoch in range(10))


def epochs_in(folder: Path, **only: str) -> dict[str, list[int]]:
    found = {}
    for name in runs.COLUMNS:
        table = pd.read_csv(folder / name)
        for column, value in only.items():
            table = table[table[column] == value] if column in table else table
        found[name.split(".")[0]] = sorted(set(table["epoch"]))
    return found


def test_only_the_chosen_epochs_are_measured(tmp_path):
    command = [*TINY, "--epochs", "5", "--run-dir", str(tmp_path / "run")]
    train.main([*command, "--measure", "3", "1", "5", "--measure-dib", "2", "3"])
    assert epochs_in(tmp_path / "run") == {"epochs": [0, 1, 2, 3, 4, 5], "nc1": [1, 3, 5], "dib": [2, 3]}
    # once, in the first that is measured
    assert epochs_in(tmp_path / "run", split="input")["dib"] == [2]
    assert epochs_in(tmp_path / "run", layer="input")["nc1"] == [1]
    whole = tmp_path / "whole"
    train.main([*TINY, "--epochs", "5", "--run-dir", str(whole)])
    for name, columns in (("nc1.csv", ["epoch", "set", "layer"]), ("dib.csv", ["epoch", "set", "split", "labeling"])):
        some, every = (pd.read_csv(folder / name).set_index(columns) for folder in (tmp_path / "run", whole))
        both = some.index.intersection(every.index)
        pd.testing.assert_frame_equal(some.loc[both], every.loc[both])  # measuring less changes nothing of the rest


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["some"], "--measure: expected all, log or numbers of epochs from 0, got some"),
        (["log", "3"], "--measure: expected all, log or numbers of epochs from 0, got log 3"),
        (["-1"], "--measure: expected all, log or numbers of epochs from 0, got -1"),
        (["0", "9"], "--measure names epoch 9, and the last is 2"),
    ],
)
def test_refuses_epochs_that_there_are_not(tmp_path, capsys, words, message):
    assert message in refusal(capsys, *SMALL, "--measure", *words, "--run-dir", str(tmp_path / "run"))


def test_a_run_with_gaps_is_drawn_resumed_and_tabulated(tmp_path):
    """Also seeds of other lengths, which share the log grid and not their last epochs."""
    folders = [tmp_path / f"s{seed}" for seed in range(2)]
    for seed, epochs in enumerate((5, 8)):
        train.main([*TINY, "--seed", str(seed), "--epochs", str(epochs), "--measure", "log", "--measure-dib", "0", "4",
                    "--run-dir", str(folders[seed])])  # fmt: skip
    (group,) = tables.groups(folders)
    assert group.last == 5
    assert (group.epochs("epochs"), group.epochs("nc1"), group.epochs("dib")) == ([*range(6)], [0, 1, 2, 3, 4], [0, 4])
    assert group.uneven is False
    (alone,) = tables.groups(folders[1:])
    assert (alone.epochs("nc1"), alone.uneven) == ([0, 1, 2, 3, 4, 6, 7, 8], True)
    for found in ([group], [alone]):
        for name in gallery.names(found):
            gallery.picture(name, found, ("png",))
    train.main(["--run-dir", str(folders[0]), "--resume", "--epochs", "8"])
    assert epochs_in(folders[0])["nc1"] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_stopped_before_epoch_0_is_begun_again(tmp_path, monkeypatch):
    with monkeypatch.context() as failing:
        failing.setattr(train, "measure_nc1", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.main([*TINY, "--run-dir", str(tmp_path / "run")])
    state = runs.load(tmp_path / "run")
    assert state["epoch"] == runs.BEGUN
    train.main(["--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*TINY, "--run-dir", str(tmp_path / "whole")])
    assert_same(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(tmp_path, monkeypatch, capsys):
    """As during a download or a range test, while nothing is locked."""
    prepare, command = train.prepare, [*TINY, "--run-dir", str(tmp_path / "run")]

    def slow(args: argparse.Namespace) -> tuple:
        monkeypatch.setattr(train, "prepare", prepare)
        train.main(command)
        return prepare(args)

    monkeypatch.setattr(train, "prepare", slow)
    assert "already holds a run: go on with --resume" in refusal(capsys, *command, "--seed", "1")
    assert hparams(tmp_path / "run")["seed"] == 0
    assert runs.load(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("more", [[], ["--no-compile"]])
def test_what_was_left_to_the_device_is_chosen_anew_on_another(tmp_path, monkeypatch, capsys, more):
    """A run that began elsewhere, as by what its files say."""
    run = tmp_path / "run"
    train.main([*TINY[2:], "--run-dir", str(run)])
    assert hparams(run)["chosen"] == ["compile", "device", "precision"]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["hparams"] |= {"device": "cuda:3", "precision": "bfloat16", "compile": True}
    torch.save(state, run / "checkpoint.pt")
    (run / "hparams.json").write_text(json.dumps(state["hparams"]))
    again = ["--run-dir", str(run), "--resume", "--epochs", "3"]
    assert "--precision is float16, and the run in" in refusal(capsys, *again, "--precision", "float16")
    capsys.readouterr()
    train.main([*again, *more])
    assert "goes on with cpu, after cuda:3: numbers differ in their last bits\n" in capsys.readouterr().out
    had = hparams(run)
    assert (had["device"], had["precision"], had["compile"], had["epochs"]) == ("cpu", "float32", False, 3)
    with pytest.raises(SystemExit):  # asked for by name it is had, or refused
        train.main([*again, "--device", "cuda:9"])
