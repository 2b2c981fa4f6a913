"""The flags of train.py: their defaults, and their parser."""

import argparse
import ast
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import data
import models
from layerwise import probes
from models import mlp
from training.hardware import PRECISIONS
from training.optimizers import LEARNING_RATE, OPTIMIZERS, SCHEDULES, validate_optimizer
from training.recipes import RECIPES
from training.terminal import Parser


@dataclass(frozen=True)
class Config:
    """The flags with their defaults, and what `resolve` adds. The names are those of hparams.json.

    `resolve` replaces None, unless it means that the flag is unset, as for recipe and tune.
    """

    model: str = "MLP"
    data: str = "SZT"
    widths: list[int] | None = None
    nonlinearity: str | None = None
    batch_size: int = 400
    learning_rate: float | None = None
    tune: str | None = None
    optimizer: str = "AdamW"
    schedule: str = "constant"
    recipe: str | None = None
    epochs: int = 15
    seed: int = 0
    train_size: int | None = None
    sets: list[str] = field(default_factory=lambda: ["train", "test"])
    measure: str | list[int] = "all"
    measure_dib: str | list[int] | None = None
    nc1: bool = True
    dib: bool = True
    dib_epochs: int = 30
    dib_size: int | None = None
    probes: str = "tuned"
    dib_lr: float | None = None
    splits: list[str] | None = None
    enumerations: int | str = 1
    controls: bool = True
    precision: str | None = None
    compile: bool | None = None
    device: str | None = None
    data_dir: str = "datasets"
    download: bool = False
    deterministic: bool = False
    save_weights: bool = False
    run_dir: str | None = None
    resume: bool = False
    optimizer_options: dict = field(default_factory=dict)
    chosen: list[str] | None = None  # the flags of schema.DEVICE_DEFAULTS that were not given
    num_classes: int | None = None
    dib_samples: dict[str, int] | None = None  # {set: the number of samples that DIB uses}
    linear_splits: list[str] | None = None  # the splits whose probes are linear, and solved by tuned probes


def make_number_type(kind: type, low: float, strict: bool = False) -> Callable:
    """Return an argparse type for numbers of type `kind` in [low, 2^63), or in (low, 2^63) if strict."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if strict else low <= value):
            relation = "above" if strict else "of at least"
            raise argparse.ArgumentTypeError(f"expected a number {relation} {low}, got {text}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse prints it for a text that is not a number
    return parse


COUNT = make_number_type(int, 1)
RATE = make_number_type(float, 0, strict=True)


def parse_enumerations(text: str) -> int | str:
    """Return the value of --enumerations: a number of at least 1, or "data"."""
    if text == "data":
        return text
    try:
        return COUNT(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"expected a number of at least 1 or data, got {text}") from None


class Optimizer(argparse.Action):
    """Parse NAME [option=value ...] into the name and a dict of torch's options."""

    def __call__(self, parser, args, words, flag=None) -> None:
        name, *pairs = words
        if name not in OPTIMIZERS:
            raise argparse.ArgumentError(
                self, f"invalid choice: {name!r} (choose from {', '.join(map(repr, OPTIMIZERS))})"
            )
        options = {}
        for pair in pairs:
            key, _, text = pair.partition("=")
            options[key] = self.parse_value(pair, text)
        if "lr" in options:
            raise argparse.ArgumentError(self, "lr is not an option here: use --learning-rate")
        try:
            validate_optimizer(name, options, torch.device("cpu"), steps=0)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        args.optimizer, args.optimizer_options = name, options

    def parse_value(self, pair: str, text: str) -> object:
        """Return the value of an option, with a list in place of a tuple, as JSON has no tuples."""
        try:
            value = ast.literal_eval(text)
            json.dumps(value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise argparse.ArgumentError(
                self, f"expected options like momentum=0.9 or betas=0.9,0.99, got {pair!r}"
            ) from None
        return list(value) if isinstance(value, tuple) else value


class Epochs(argparse.Action):
    """Parse `all`, `log` or a list of epochs."""

    def __call__(self, parser, args, words, flag=None) -> None:
        if words in (["all"], ["log"]):
            setattr(args, self.dest, words[0])
        elif all(word.isascii() and word.isdigit() and len(word) < 19 for word in words):
            setattr(args, self.dest, sorted(set(map(int, words))))
        else:
            raise argparse.ArgumentError(self, f"expected all, log or epochs >= 0, got {' '.join(words)}")


def make_parser() -> Parser:
    """Return the parser. Flags that are not given are not in its result."""
    about = "Train a network and measure it."
    parser = Parser(prog="train.py", description=about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    add_network_flags(parser.add_argument_group("data and network").add_argument)
    add_training_flags(parser.add_argument_group("training").add_argument)
    add_measure_flags(parser.add_argument_group("NC1 and DIB").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    return parser


def add_network_flags(flag: Callable) -> None:
    """Add the flags of the data and the network. flag: add_argument of a group."""
    flag("-m", "--model", choices=models.ARCHITECTURES, help=f"architecture (default: {Config.model})")
    flag("-w", "--widths", type=COUNT, nargs="+", metavar="N", help="hidden layers of MLP (default: 10 7 5 4 3)")
    flag("-nl", "--nonlinearity", choices=mlp.NONLINEARITIES, help="activation function of MLP (default: ReLU)")
    flag("-d", "--data", choices=data.SOURCES, help=f"data set (default: {Config.data})")
    size_help = "number of training samples, the same number from each class (default: all)"
    flag("--train-size", type=COUNT, metavar="N", help=size_help)
    flag("--data-dir", metavar="DIR", help=f"folder of image files (default: {Config.data_dir})")
    flag("--download", action="store_true", help="download the images into --data-dir if they are missing")


def add_training_flags(flag: Callable) -> None:
    """Add the flags of the network's training. flag: add_argument of a group."""
    flag("--recipe", choices=RECIPES, help="published settings, for the flags that are not given")
    flag("--epochs", type=COUNT, metavar="N", help=f"number of epochs (default: {Config.epochs})")
    flag(
        "-b", "--batch-size", type=COUNT, metavar="N",
        help=f"batch size of training, evaluation, NC1 and thesis probes (default: {Config.batch_size})",
    )  # fmt: skip
    flag(
        "-opt", "--optimizer", nargs="+", action=Optimizer, metavar=("NAME", "OPTION=VALUE"),
        help=f"{', '.join(OPTIMIZERS)}, with options such as momentum=0.9 (default: {Config.optimizer})",
    )  # fmt: skip
    flag("-lr", "--learning-rate", type=RATE, metavar="X", help=f"learning rate (default: {LEARNING_RATE})")
    flag(
        "--tune", nargs="?", const="first", choices=["first", "only"], metavar="only",
        help="find the learning rate by a range test and train with it (only: do not train)",
    )  # fmt: skip
    flag("--schedule", choices=SCHEDULES, help=f"learning-rate schedule (default: {Config.schedule})")
    flag(
        "--precision", choices=PRECISIONS,
        help="precision of training (default: float32 on a CPU; on CUDA bfloat16 if supported, else float16)",
    )  # fmt: skip
    compile_help = "compile the training step with torch.compile (default: on CUDA, if possible)"
    flag("-c", "--compile", action=argparse.BooleanOptionalAction, help=compile_help)


def add_measure_flags(flag: Callable) -> None:
    """Add the flags of what is measured. flag: add_argument of a group."""
    sets, epochs = Config().sets, ("all | log | N", "N")
    flag("--sets", nargs="+", choices=sets, help=f"sets for NC1 and DIB (default: {' '.join(sets)})")
    flag(
        "--measure", nargs="+", action=Epochs, metavar=epochs,
        help="epochs after which NC1 and DIB are measured: all, log (about 8 in a decade) or a list, in which 0 is "
        f"before training (default: {Config.measure})",
    )  # fmt: skip
    flag("--measure-dib", nargs="+", action=Epochs, metavar=epochs, help="the same for DIB (default: as --measure)")
    flag("--no-nc1", dest="nc1", action="store_false", help="do not measure NC1")
    flag("--no-dib", dest="dib", action="store_false", help="do not measure DIB")
    flag(
        "--splits", nargs="+", metavar="NAME",
        help="DIB splits, named by the last block of the encoder; `input` has no encoder (default: input and the end "
        "of each stage)",
    )  # fmt: skip
    size_help = "number of samples of each set for DIB, the same number from each class (default: all)"
    flag("--dib-size", type=COUNT, metavar="N", help=size_help)
    flag("--dib-epochs", type=COUNT, metavar="N", help=f"number of epochs of each probe (default: {Config.dib_epochs})")
    flag("--probes", choices=["tuned", "thesis"], help=f"how probes are trained (default: {Config.probes})")
    rate_help = f"learning rate of tuned probes, relative to each module's initial RMS (default: {probes.RATE})"
    flag("--dib-lr", type=RATE, metavar="X", help=rate_help)
    flag(
        "--enumerations", type=parse_enumerations, metavar="N | data",
        help="number of random enumerations of the samples of each class, or data: one enumeration in data order "
        f"(default: {Config.enumerations})",
    )  # fmt: skip
    controls_help = "do not measure the controls: shuffled labels, held-out samples and noise"
    flag("--no-controls", dest="controls", action="store_false", help=controls_help)


def add_run_flags(flag: Callable) -> None:
    """Add the flags of where and how a run is made. flag: add_argument of a group."""
    flag("--run-dir", metavar="DIR", help="the run's folder (default: runs/<model>-<data>-seed<seed>)")
    flag("--resume", action="store_true", help="continue from the last finished epoch, with the flags of the run")
    weights_help = "keep the weights of the epochs in which NC1 or DIB is measured: weights/epoch<number>.pt"
    flag("--save-weights", action="store_true", help=weights_help)
    flag("--seed", type=make_number_type(int, 0), metavar="N", help=f"random seed (default: {Config.seed})")
    flag("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: cuda if available)")
    flag("--deterministic", action="store_true", help="use deterministic algorithms only; slower on CUDA")
