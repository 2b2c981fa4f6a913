"""Parse, check and complete the flags of train.py, and compare those of a resumed run with the recorded ones.

`parse` returns the Config of a command line, and `adopt_recorded` that of a run that is resumed. `resolve` returns one
with every value that the run uses. It needs the data and the model. hparams.json holds the result.
"""

from dataclasses import fields, replace
from math import ceil
from pathlib import Path

import torch
import torchvision
from torch import nn

import data
import models
from layerwise import probes, processes, schema
from models import cifarnet, mlp
from training.flags import Config, make_parser
from training.hardware import choose_compile, choose_precision
from training.optimizers import LEARNING_RATE, validate_optimizer
from training.recipes import RECIPES


def parse(arguments: list[str] | None = None) -> Config:
    """Parse the flags. Flags that are not given are taken from the recipe, or else from the defaults.

    Exits with status 2 if they are not valid.
    """
    parser = make_parser()
    given = vars(parser.parse_args(arguments))
    recipe = dict(RECIPES[given["recipe"]]) if "recipe" in given else {}
    if "tune" in given:
        recipe.pop("learning_rate", None)  # the range test finds it
    config = Config(**recipe | given)
    if config.model != recipe.get("model", config.model):
        parser.error(f"--recipe {config.recipe} requires --model {recipe['model']}, got {config.model}")
    return config


def adopt_recorded(arguments: list[str] | None, folder: Path, recorded: dict) -> Config:
    """Return the flags of a resumed run: the given ones, else the recorded ones, but None for `chosen` ones.

    Raises ValueError for a flag that differs and may not change.
    """
    if recorded.get("tune") == "only":
        raise ValueError(f"--resume: the run in {folder} is a learning-rate range test, which cannot be continued")
    names = {each.name for each in fields(Config)}
    missing = sorted(names - set(recorded))
    if missing:
        raise ValueError(f"{folder} was written by a different version: hparams.json lacks {', '.join(missing)}")
    given = vars(make_parser().parse_args(arguments))
    for name, value in given.items():
        if not may_change(name, recorded) and not is_same(name, value, recorded[name]):
            raise ValueError(
                f"--resume: {format_flag(name)} is {value}, but was {recorded[name]} in {folder}: it cannot change"
            )
    validate_more_epochs(recorded, given.get("epochs", recorded["epochs"]))
    before = {name: recorded[name] for name in names}
    chosen_again = dict.fromkeys(recorded["chosen"])  # {name: None}
    return Config(**before | chosen_again | given | {"run_dir": str(folder), "resume": True})


def may_change(name: str, recorded: dict) -> bool:
    """Return whether a flag may have another value when the run is resumed."""
    return name in schema.MAY_CHANGE or (name == "compile" and name in recorded["chosen"])


def is_same(name: str, value: object, recorded: object) -> bool:
    """Return whether a flag has the recorded value. The order of sets and splits does not matter."""
    return set(value) == set(recorded) if name in ("sets", "splits") else value == recorded


def validate_more_epochs(recorded: dict, epochs: int) -> None:
    """Raise ValueError unless a resumed run may have this number of epochs."""
    if epochs < recorded["epochs"]:
        raise ValueError(f"--resume: --epochs must be at least {recorded['epochs']}, got {epochs}")
    if epochs > recorded["epochs"] and recorded["schedule"] != "constant":
        raise ValueError(
            f"--resume: --epochs cannot change from {recorded['epochs']} to {epochs}, because --schedule "
            f"{recorded['schedule']} depends on it"
        )


def format_flag(name: str) -> str:
    """Return the flag of a field of Config."""
    return f"--{name.replace('_', '-')}"


def choose_run_folder(config: Config) -> Path:
    """Return the folder of the run."""
    suffix = "-lr-range" if config.tune == "only" else ""
    return Path(config.run_dir or f"runs/{config.model}-{config.data}-seed{config.seed}{suffix}")


def is_measured(when: str | list[int], epoch: int, last: int) -> bool:
    """Return whether `when`, the value of --measure, includes an epoch. last: the last epoch of the run.

    log: epoch 0, the epochs round(10^(i/8)), and the last epoch. Except for the last one, they are the same in runs of
    all lengths.
    """
    if when == "log":
        return epoch in (0, last) or epoch in {round(10 ** (i / 8)) for i in range(160)}
    return when == "all" or epoch in when


def get_first_measured(when: str | list[int]) -> int:
    """Return the first epoch in `when`. The results for `input` are computed in it only."""
    return 0 if when in ("all", "log") else when[0]


def choose_mlp_options(config: Config) -> dict:
    """Return the values of --widths and --nonlinearity. Raises ValueError if they are given for another model."""
    if config.model == "MLP":
        return {"widths": config.widths or list(mlp.WIDTHS), "nonlinearity": config.nonlinearity or "ReLU"}
    if config.widths or config.nonlinearity:
        raise ValueError(f"--widths and --nonlinearity require --model MLP, got {config.model}")
    return {}


def choose_model_options(config: Config, dataset: data.Dataset) -> dict:
    """Return the keyword arguments of models.build."""
    if config.model == "CIFARNet" and len(dataset.input_shape) == 3:
        some = torch.arange(min(5000, len(dataset.train)), device=dataset.train.labels.device)
        whitening = cifarnet.compute_whitening(dataset.train.batch(some)[0]).cpu()
        return {**choose_mlp_options(config), "whitening": whitening}
    return choose_mlp_options(config)


def resolve(config: Config, device: torch.device, dataset: data.Dataset, model: nn.Sequential) -> Config:
    """Return the configuration with every value that this run uses.

    Raises ValueError for flags that the device, the data or the model do not allow.
    """
    validate_optimizer(config.optimizer, config.optimizer_options, device, steps=2)
    validate_measured_epochs(config)
    validate_batches(config, dataset, model)
    if config.dib_lr and config.probes == "thesis":
        raise ValueError(f"--dib-lr {config.dib_lr:g} requires --probes tuned, got thesis")
    return replace(
        config,
        **choose_mlp_options(config),
        learning_rate=config.learning_rate or (None if config.tune else LEARNING_RATE),
        sets=[name for name in ("train", "test") if name in config.sets],
        measure_dib=config.measure if config.measure_dib is None else config.measure_dib,
        dib_lr=config.dib_lr or (probes.RATE if config.probes == "tuned" else None),
        splits=list(models.splits(model, config.splits)),
        precision=choose_precision(device, config.precision),
        compile=choose_compile(device, config.compile),
        device=device.type if processes.get_world_size() > 1 else str(device),
        run_dir=str(choose_run_folder(config)),
        chosen=[name for name in schema.DEVICE_DEFAULTS if getattr(config, name) is None],
        num_classes=dataset.num_classes,
        dib_samples=count_dib_samples(config, dataset),
        linear_splits=list_linear_splits(config, dataset, model),
    )


def validate_measured_epochs(config: Config) -> None:
    """Raise ValueError for a measured epoch after the last epoch."""
    for name in ("measure", "measure_dib"):
        when = getattr(config, name)
        if isinstance(when, list) and when[-1] > config.epochs:
            raise ValueError(f"{format_flag(name)} contains epoch {when[-1]}, but --epochs is {config.epochs}")


def count_dib_samples(config: Config, dataset: data.Dataset) -> dict[str, int]:
    """Return the number of samples of each set that DIB uses."""
    return {"train": config.dib_size or len(dataset.train), "test": config.dib_size or len(dataset.test)}


def list_linear_splits(config: Config, dataset: data.Dataset, model: nn.Sequential) -> list[str]:
    """Return the names of the splits whose probes are linear, and whose optimum is computed."""
    if not config.dib or config.probes == "thesis":
        return []
    N = max(count_dib_samples(config, dataset).values())
    splits = models.splits(model, config.splits)
    return [name for name, k in splits.items() if probes.can_fit_linear(model[k:], N)]


def validate_batches(config: Config, dataset: data.Dataset, model: nn.Module) -> None:
    """Raise ValueError if a batch of the network or of thesis probes is too small for a step."""
    validate_batch_size(model, len(dataset.train), config.batch_size, processes.get_world_size())
    if config.dib and config.probes == "thesis":
        for name, size in count_dib_samples(config, dataset).items():
            if name in config.sets:
                validate_batch_size(model, size, config.batch_size)


def validate_batch_size(model: nn.Module, size: int, batch_size: int, world_size: int = 1) -> None:
    """Raise ValueError if the smallest batch of a process has fewer than 2 samples (BatchNorm) or 1 (other models)."""
    least = 2 if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()) else 1
    smallest = size // ceil(size / batch_size) // world_size
    if smallest < least:
        raise ValueError(
            f"--batch-size {batch_size} is too small for {world_size} processes: each gets batches of {smallest} "
            f"samples, expected at least {least}"
        )


def collect_hparams(config: Config) -> dict:
    """Return what hparams.json holds."""
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    return {**vars(config), **versions, "processes": processes.get_world_size()}
