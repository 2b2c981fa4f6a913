"""The flags of train.py: options of torch's optimizers, schedules, recipes, measured epochs, and a resumed run."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import train
from analysis import gallery, tables
from layerwise import schema
from tests.toys import QUICK, SMALL, assert_same_run, refusal
from tools import sweep
from training import checkpoint, configuration, optimizers, setup
from training.flags import Config, make_parser
from training.recipes import RECIPES

SHORT = [*QUICK, "--no-dib", "--no-nc1"]


def read_hparams(folder: Path) -> dict:
    """Return what hparams.json holds."""
    return json.loads((folder / "hparams.json").read_text())


def load_param_group(folder: Path) -> dict:
    """Return the settings of the optimizer in the checkpoint."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)["optimizer"]["param_groups"][0]


def test_the_optimizer_gets_its_options(tmp_path):
    options = ["-opt", "SGD", "momentum=0.9", "weight_decay=5e-4", "nesterov=True"]
    train.main([*SHORT, *options, "--run-dir", str(tmp_path / "run")])
    group = load_param_group(tmp_path / "run")
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 5e-4, True)
    recorded = read_hparams(tmp_path / "run")
    assert recorded["optimizer"] == "SGD"
    assert recorded["optimizer_options"] == {"momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    again = ["--run-dir", str(tmp_path / "run"), "--resume"]
    train.main([*again, *options, "--epochs", "3"])
    train.main([*again, "--epochs", "4"])
    assert load_param_group(tmp_path / "run")["momentum"] == 0.9


def test_momentum_and_weight_decay_are_those_of_torch(tmp_path):
    """Compare with two steps computed here, on one batch, from the initial weights of a run."""
    train.main([*SHORT, "-b", "64", "-opt", "SGD", "momentum=0.5", "weight_decay=0.1", "--epochs", "2",
                "--run-dir", str(tmp_path / "run")])  # fmt: skip
    run, _ = setup.prepare_run(configuration.parse([*SHORT, "--run-dir", str(tmp_path / "other")]))
    x, y = run.sets["train"].batch(torch.arange(64))
    momenta = [torch.zeros_like(p) for p in run.model.parameters()]
    for _ in range(2):
        run.model.zero_grad()
        torch.nn.functional.cross_entropy(run.model(x), y).backward()
        with torch.no_grad():
            for i, (p, m) in enumerate(zip(run.model.parameters(), momenta, strict=True)):
                momenta[i] = 0.5 * m + p.grad + 0.1 * p
                p -= optimizers.LEARNING_RATE * momenta[i]
    after = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["model"]
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(after[name], p.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SGD", "momentun=0.9"], "torch.optim.SGD does not accept momentun=0.9: SGD.__init__() got an unexpected"),
        (["SGD", "momentum=-1"], "torch.optim.SGD does not accept momentum=-1: Invalid momentum value: -1"),
        (["SGD", "nesterov=True"], "torch.optim.SGD does not accept nesterov=True: Nesterov momentum requires"),
        (["Adam", "betas=0.9"], "torch.optim.Adam does not accept betas=0.9: "),
        (["Adam", "betas=0.9,2"], "torch.optim.Adam does not accept betas=[0.9, 2]: Invalid beta parameter at index 1"),
        (["SGD", "momentum"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'momentum'"),
        (["SGD", "momentum=fast"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'momentum=fast'"),
        (
            ["AdamW", "fused=False", "capturable=True"],
            "torch.optim.AdamW does not accept fused=False capturable=True: If captur",
        ),
        (["SGD", "dampening='x'"], "torch.optim.SGD does not accept dampening=x: "),
        (["SGD", "dampening=1j"], "expected options like momentum=0.9 or betas=0.9,0.99, got 'dampening=1j'"),
        (["Adam", "betas={}"], "torch.optim.Adam does not accept betas={}: "),
        (["SGD", "lr=0.1"], "lr is not an option here: use --learning-rate"),
        (["Lion", "momentum=0.9"], "invalid choice: 'Lion'"),
    ],
)
def test_options_that_torch_refuses_are_refused(tmp_path, capsys, options, message):
    assert message in refusal(capsys, *SMALL, "-opt", *options, "--run-dir", str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["foreach=True", "fused=False", "maximize=False"])
def test_options_of_how_torch_computes_are_accepted(tmp_path, option):
    train.main([*SHORT, "-opt", "SGD", option, "--epochs", "1", "--run-dir", str(tmp_path / "run")])
    assert bool(load_param_group(tmp_path / "run")["fused"]) == (option == "maximize=False")


def test_the_schedule_is_stepped_after_each_training_step(tmp_path):
    train.main([*SHORT, "--schedule", "cosine", "--epochs", "4", "--run-dir", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["schedule"]["last_epoch"] == 4 * 4  # 4 epochs, in each of them 64 samples in batches of 16
    assert load_param_group(tmp_path / "run")["lr"] == pytest.approx(0, abs=1e-12)


def list_rates(schedule: str, steps: int) -> list[float]:
    """Return the learning rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    scheduler = optimizers.make_schedule(schedule, optimizer, 1.0, steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return rates


def test_schedules_have_their_known_rates():
    assert list_rates("constant", 30) == [1.0] * 30
    assert list_rates("steps", 30) == pytest.approx([1.0] * 10 + [0.1] * 10 + [0.01] * 10)
    cosine = list_rates("cosine", 30)
    assert cosine[0] == 1.0
    assert cosine[15] == pytest.approx(0.5)
    assert 0 < cosine[-1] < 0.01
    cycle = list_rates("one-cycle", 30)
    assert cycle[0] == pytest.approx(1 / 25)
    assert max(cycle) == pytest.approx(1.0, abs=0.01)
    assert cycle.index(max(cycle)) in (8, 9)  # at 30 % of the steps
    assert cycle[-1] < 1e-4


@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
def test_a_resumed_run_continues_its_schedule(tmp_path, monkeypatch, capsys, schedule):
    command = [*SHORT, "--schedule", schedule, "--epochs", "3"]
    train.main([*command, "--run-dir", str(tmp_path / "whole")])
    save = checkpoint.save

    def crash(folder: Path, epoch: int, *rest) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        save(folder, epoch, *rest)

    with monkeypatch.context() as failing:
        failing.setattr(checkpoint, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            train.main([*command, "--run-dir", str(tmp_path / "run")])
    again = ["--run-dir", str(tmp_path / "run"), "--resume"]
    train.main(again)
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    if schedule == "constant":
        train.main([*again, "--epochs", "4"])
    else:
        error = refusal(capsys, *again, "--epochs", "4")
        assert f"--epochs cannot change from 3 to 4, because --schedule {schedule} depends on it" in error


def test_a_recipe_sets_the_flags_that_are_not_given(tmp_path):
    recipe = RECIPES["papyan"]
    config = configuration.parse(["--recipe", "papyan", "-b", "64", "--epochs", "7"])
    assert (config.batch_size, config.epochs) == (64, 7)
    assert {name: getattr(config, name) for name in recipe if name not in ("batch_size", "epochs")} == {
        name: value for name, value in recipe.items() if name not in ("batch_size", "epochs")
    }
    config = configuration.parse(["--recipe", "oikarinen"])
    assert (config.model, config.optimizer, config.optimizer_options) == ("MNISTNet", "Adam", {"betas": [0.7, 0.9]})
    run = tmp_path / "run"
    train.main([*SHORT, "--recipe", "papyan", "--epochs", "1", "-b", "16", "--run-dir", str(run)])
    flags = read_hparams(run)
    assert (flags["recipe"], flags["optimizer"], flags["learning_rate"]) == ("papyan", "SGD", 0.0679)
    assert (flags["batch_size"], flags["schedule"], flags["measure"]) == (16, "steps", "log")
    train.main(["--recipe", "papyan", "--run-dir", str(run), "--resume"])  # the flags of the run are kept


def test_a_run_of_a_recipe_is_resumed_by_the_same_command(tmp_path, monkeypatch, pictures):
    """The folder is named after the model of the recipe."""
    monkeypatch.chdir(tmp_path)
    command = ["--recipe", "oikarinen", "-d", "CIFAR10", "--device", "cpu", "--no-dib"]
    train.main(command)
    train.main([*command, "--resume"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["MNISTNet-CIFAR10-seed0"]


def test_a_range_test_replaces_the_rate_of_a_recipe():
    assert configuration.parse(["--recipe", "papyan", "--tune"]).learning_rate is None
    assert configuration.parse(["--recipe", "papyan"]).learning_rate == 0.0679


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_sets_flags_that_exist(name):
    config = configuration.parse(["--recipe", name])
    assert set(RECIPES[name]) <= set(vars(Config()))
    make = optimizers.make_optimizer(config.optimizer, config.optimizer_options, config.learning_rate)
    make([torch.nn.Parameter(torch.zeros(1))])


def test_a_recipe_for_another_model_is_refused(capsys):
    error = refusal(capsys, "--recipe", "oikarinen", "-m", "ResNet")
    assert "--recipe oikarinen requires --model MNISTNet, got ResNet" in error


def test_measure_log_includes_the_same_epochs_in_runs_of_any_length():
    grid = [epoch for epoch in range(1001) if configuration.is_measured("log", epoch, 1000)]
    assert grid[:12] == [0, 1, 2, 3, 4, 6, 7, 10, 13, 18, 24, 32]  # 10^(1/8) is 1.33, which is rounded to 1, as is 10^0
    assert grid[-3:] == [562, 750, 1000]
    shorter = [epoch for epoch in range(51) if configuration.is_measured("log", epoch, 50)]
    assert set(shorter) - {50} <= set(grid)
    assert 50 in shorter
    assert [e for e in range(6) if configuration.is_measured([0, 5], e, 9)] == [0, 5]
    assert all(configuration.is_measured("all", epoch, 9) for epoch in range(10))


def read_epochs(folder: Path, **only: str) -> dict[str, list[int]]:
    """Return {table: the epochs in it}, of rows with these values in columns that the table has."""
    found = {}
    for name in schema.COLUMNS:
        table = pd.read_csv(folder / name)
        for column, value in only.items():
            table = table[table[column] == value] if column in table else table
        found[name.split(".")[0]] = sorted(set(table["epoch"]))
    return found


def test_only_the_chosen_epochs_are_measured(tmp_path):
    command = [*QUICK, "--epochs", "5", "--run-dir", str(tmp_path / "run")]
    train.main([*command, "--measure", "3", "1", "5", "--measure-dib", "2", "3"])
    assert read_epochs(tmp_path / "run") == {"epochs": [0, 1, 2, 3, 4, 5], "nc1": [1, 3, 5], "dib": [2, 3]}
    # the input is measured once, in the first measured epoch
    assert read_epochs(tmp_path / "run", split="input")["dib"] == [2]
    assert read_epochs(tmp_path / "run", layer="input")["nc1"] == [1]
    whole = tmp_path / "whole"
    train.main([*QUICK, "--epochs", "5", "--run-dir", str(whole)])
    for name, columns in (("nc1.csv", ["epoch", "set", "layer"]), ("dib.csv", ["epoch", "set", "split", "labeling"])):
        some, every = (pd.read_csv(folder / name).set_index(columns) for folder in (tmp_path / "run", whole))
        both = some.index.intersection(every.index)
        pd.testing.assert_frame_equal(some.loc[both], every.loc[both])  # measuring fewer epochs changes no value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["some"], "--measure: expected all, log or epochs >= 0, got some"),
        (["log", "3"], "--measure: expected all, log or epochs >= 0, got log 3"),
        (["-1"], "--measure: expected all, log or epochs >= 0, got -1"),
        (["0", "9"], "--measure contains epoch 9, but --epochs is 2"),
    ],
)
def test_epochs_that_do_not_exist_are_refused(tmp_path, capsys, words, message):
    assert message in refusal(capsys, *SMALL, "--measure", *words, "--run-dir", str(tmp_path / "run"))


def test_a_run_measured_in_some_epochs_is_drawn_and_resumed(tmp_path):
    """The seeds have runs of other lengths. They share the epochs of --measure log, but not the last epoch."""
    folders = [tmp_path / f"s{seed}" for seed in range(2)]
    for seed, epochs in enumerate((5, 8)):
        train.main([*QUICK, "--seed", str(seed), "--epochs", str(epochs), "--measure", "log", "--measure-dib", "0", "4",
                    "--run-dir", str(folders[seed])])  # fmt: skip
    (group,) = tables.read_groups(folders)
    assert group.last == 5
    assert group.list_epochs("epochs") == [0, 1, 2, 3, 4, 5]
    assert (group.list_epochs("nc1"), group.list_epochs("dib")) == ([0, 1, 2, 3, 4], [0, 4])
    assert group.has_uneven_epochs is False
    (alone,) = tables.read_groups(folders[1:])
    assert (alone.list_epochs("nc1"), alone.has_uneven_epochs) == ([0, 1, 2, 3, 4, 6, 7, 8], True)
    for found in ([group], [alone]):
        for name in gallery.list_figures(found):
            gallery.render_figure(name, found, ("png",))
    train.main(["--run-dir", str(folders[0]), "--resume", "--epochs", "8"])
    assert read_epochs(folders[0])["nc1"] == [0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_ended_before_epoch_0_is_resumed_from_its_start(tmp_path, monkeypatch):
    with monkeypatch.context() as failing:
        failing.setattr(train, "measure_nc1", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train.main([*QUICK, "--run-dir", str(tmp_path / "run")])
    state = checkpoint.load(tmp_path / "run")
    assert state["epoch"] == checkpoint.BEGUN
    train.main(["--run-dir", str(tmp_path / "run"), "--resume"])
    train.main([*QUICK, "--run-dir", str(tmp_path / "whole")])
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_run_that_another_process_made_in_the_meantime_is_not_replaced(tmp_path, monkeypatch, capsys):
    """The folder is not locked during a download or a range test."""
    prepare_run, command = setup.prepare_run, [*QUICK, "--run-dir", str(tmp_path / "run")]

    def prepare_slowly(config: Config) -> tuple:
        monkeypatch.setattr(setup, "prepare_run", prepare_run)
        train.main(command)
        return prepare_run(config)

    monkeypatch.setattr(setup, "prepare_run", prepare_slowly)
    assert str(tmp_path / "run") in refusal(capsys, *command, "--seed", "1")
    assert read_hparams(tmp_path / "run")["seed"] == 0
    assert checkpoint.load(tmp_path / "run")["epoch"] == 2


@pytest.mark.parametrize("more", [[], ["--no-compile"]])
def test_flags_that_the_device_decides_are_chosen_again_on_another(tmp_path, monkeypatch, capsys, more):
    """The files are changed to those of a run that began on CUDA."""
    run = tmp_path / "run"
    train.main([*QUICK[2:], "--run-dir", str(run)])
    assert read_hparams(run)["chosen"] == ["compile", "device", "precision"]
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["hparams"] |= {"device": "cuda:3", "precision": "bfloat16", "compile": True}
    torch.save(state, run / "checkpoint.pt")
    (run / "hparams.json").write_text(json.dumps(state["hparams"]))
    again = ["--run-dir", str(run), "--resume", "--epochs", "3"]
    assert "--precision is float16, but was bfloat16 in" in refusal(capsys, *again, "--precision", "float16")
    capsys.readouterr()
    train.main([*again, *more])
    notice = "the run continues on cpu instead of cuda:3: the last digits of results may differ\n"
    assert notice in capsys.readouterr().out
    flags = read_hparams(run)
    assert (flags["device"], flags["precision"], flags["compile"], flags["epochs"]) == ("cpu", "float32", False, 3)
    with pytest.raises(SystemExit):  # a device that is named and does not exist is refused
        train.main([*again, "--device", "cuda:9"])


@pytest.mark.parametrize(("main", "words"), [(train.main, []), (sweep.main, ["3"])], ids=["train.py", "sweep"])
@pytest.mark.parametrize(("old", "new"), schema.RENAMED_FLAGS.items())
@pytest.mark.parametrize("separator", [" ", "="])
def test_the_old_name_of_a_flag_is_refused_with_the_new_one(capsys, main, words, old, new, separator):
    with pytest.raises(SystemExit) as end:
        main([*words, *f"{old}{separator}tuned".split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{old} is now {new}" in line


def test_every_flag_is_a_field_of_config():
    flags = {action.dest for action in make_parser()._actions} - {"help"}
    assert flags <= {field.name for field in dataclasses.fields(Config)}
