"""The flags of train.py: parsed, checked, and completed; and what a resumed run may change.

`parse` returns the flags of a command line as an argparse.Namespace, `args`. `adopt` returns those of a run that is
resumed. `fill_in` gives every flag that was left open the value that this run uses, once data and model are there.
hparams.json holds the result.
"""

import argparse
import ast
import json
import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import torch
import torchvision
from torch import nn

import data
import models
from layerwise import devices, probes, processes, schema
from models import cifarnet, mlp
from training.terminal import Parser

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
SCHEDULES = ("constant", "steps", "cosine", "one-cycle")
LEARNING_RATE = 2e-3

# Published settings, as far as flags can express them. `model` is the architecture for which they were published.
RECIPES = {
    # Papyan, Han & Donoho (PNAS 2020): their best rate of 25 for cross-entropy
    "papyan": {
        "optimizer": "SGD",
        "optimizer_options": {"momentum": 0.9, "weight_decay": 5e-4},
        "learning_rate": 0.0679,
        "batch_size": 128,
        "schedule": "steps",
        "epochs": 350,
        "measure": "log",
    },
    # Oikarinen (github tuomaso/train_mnist_fast), for MNISTNet
    "oikarinen": {
        "model": "MNISTNet",
        "optimizer": "Adam",
        "optimizer_options": {"betas": [0.7, 0.9]},
        "learning_rate": 0.01,
        "batch_size": 256,
        "schedule": "one-cycle",
        "epochs": 1,
    },
    # Shwartz-Ziv & Tishby (github ravidziv/IDNNs), with other initial weights than theirs
    "shwartz-ziv": {
        "model": "MLP",
        "nonlinearity": "Tanh",
        "optimizer": "Adam",
        "learning_rate": 4e-4,
        "batch_size": 512,
        "epochs": 8000,
        "measure": "log",
    },
}


def make_number_type(kind: type, low: float, strict: bool = False) -> Callable:
    """Return an argparse type: an int or float of at least low, or above it if strict, that fits 64 bits."""

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
            try:
                value = ast.literal_eval(text)
                json.dumps(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                raise argparse.ArgumentError(
                    self, f"expected options like momentum=0.9 or betas=0.9,0.99, got {pair!r}"
                ) from None
            options[key] = list(value) if isinstance(value, tuple) else value  # JSON has no tuples
        if "lr" in options:
            raise argparse.ArgumentError(self, "--learning-rate sets the learning rate, got lr as an option")
        args.optimizer, args.optimizer_options = name, options
        try:
            try_optimizer(args, torch.device("cpu"), steps=0)
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from None


class Epochs(argparse.Action):
    """Parse `all`, `log` or numbers of epochs."""

    def __call__(self, parser, args, words, flag=None) -> None:
        if words in (["all"], ["log"]):
            setattr(args, self.dest, words[0])
        elif all(word.isascii() and word.isdigit() and len(word) < 19 for word in words):
            setattr(args, self.dest, sorted(set(map(int, words))))
        else:
            raise argparse.ArgumentError(self, f"expected all, log or numbers of epochs from 0, got {' '.join(words)}")


def make_parser() -> Parser:
    """Return the parser of train.py's flags."""
    parser = Parser(prog="train.py", description="Train a network and measure it.", allow_abbrev=False)
    flag, count, both = parser.add_argument, make_number_type(int, 1), ["train", "test"]
    flag("-m", "--model", default="MLP", choices=models.ARCHITECTURES, help="architecture (%(default)s)")
    flag("-d", "--data", default="SZT", choices=data.SOURCES, help="data set (%(default)s)")
    flag("-w", "--widths", type=count, nargs="+", metavar="N", help="of the MLP (10 7 5 4 3)")
    flag("-nl", "--nonlinearity", choices=mlp.NONLINEARITIES, help="of the MLP (ReLU)")
    flag("-b", "--batch-size", type=count, default=400, metavar="N", help="in training and measuring (%(default)s)")
    flag("-lr", "--learning-rate", type=make_number_type(float, 0, strict=True), metavar="X", help=f"({LEARNING_RATE})")
    flag(
        "--tune", nargs="?", const="first", choices=["first", "only"], metavar="only",
        help="find the learning rate by a range test and train with it (only: do not train)",
    )  # fmt: skip
    flag(
        "-opt", "--optimizer", nargs="+", action=Optimizer, default="AdamW", metavar=("NAME", "OPTION=VALUE"),
        help=f"{', '.join(OPTIMIZERS)}, with torch's options, as momentum=0.9 (AdamW)",
    )  # fmt: skip
    parser.set_defaults(optimizer_options={})
    flag("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate (%(default)s)")
    flag("--recipe", choices=RECIPES, help="published settings, for the flags that are not given")
    flag("--epochs", type=count, default=15, metavar="N", help="(%(default)s)")
    flag("--seed", type=make_number_type(int, 0), default=0, metavar="N", help="of all random numbers (%(default)s)")
    flag("--train-size", type=count, metavar="N", help="samples to train on, as many of each class (all)")
    flag("--sets", nargs="+", default=both, choices=both, help="where NC1 and DIB are measured (train test)")
    flag(
        "--measure", nargs="+", action=Epochs, default="all", metavar=("all | log | N", "N"),
        help="epochs after which NC1 and DIB are measured; 0 is before training (%(default)s)",
    )  # fmt: skip
    flag(
        "--measure-dib", nargs="+", action=Epochs, metavar=("all | log | N", "N"),
        help="epochs after which DIB is measured (as --measure)",
    )  # fmt: skip
    flag("--no-nc1", dest="nc1", action="store_false", help="do not measure NC1")
    flag("--no-dib", dest="dib", action="store_false", help="do not measure DIB")
    flag("--dib-epochs", type=count, default=30, metavar="N", help="epochs for which probes are trained (%(default)s)")
    flag("--dib-size", type=count, metavar="N", help="samples of each set for DIB, as many of each class (all)")
    flag("--probes", choices=["tuned", "thesis"], default="tuned", help="how probes are trained (%(default)s)")
    rate = make_number_type(float, 0, strict=True)
    flag("--dib-lr", type=rate, metavar="X", help=f"relative rate of tuned probes ({probes.RATE})")
    flag("--splits", nargs="+", metavar="NAME", help="of DIB, by the encoder's last block (input, for none; stages)")
    flag("--labelings", type=count, default=1, metavar="R", help="data order, R - 1 random orders (%(default)s)")
    flag("--precision", choices=PRECISIONS, help="of training (float32; on CUDA bfloat16 or, without it, float16)")
    flag("-c", "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the training (on CUDA)")
    flag("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    flag("--data-dir", default="datasets", metavar="DIR", help="where image files are (%(default)s)")
    flag("--download", action="store_true", help="download the images into --data-dir if they are missing")
    flag("--deterministic", action="store_true", help="on CUDA only algorithms that repeat bit for bit; slower")
    flag("--run-dir", metavar="DIR", help="the run's folder (runs/<model>-<data>-seed<seed>)")
    flag("--resume", action="store_true", help="continue from the last finished epoch, with the flags of the run")
    return parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the flags: as given, else those of the recipe, else the defaults. Bad flags end the program."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.recipe:
        recipe = dict(RECIPES[args.recipe])
        if args.tune:  # the range test finds the rate
            recipe.pop("learning_rate")
        parser.set_defaults(**recipe)
        args = parser.parse_args(arguments)
        published = recipe.get("model", args.model)
        if args.model != published:
            parser.error(f"--recipe {args.recipe} is for {published}, and the model is {args.model}")
    return args


def adopt(arguments: list[str] | None, folder: Path, recorded: dict) -> argparse.Namespace:
    """Return the flags of a resumed run: those recorded, and those that may change as given.

    Raises ValueError for a flag that differs and may not change.
    """
    parser = make_parser()
    names = set(vars(parser.parse_args([]))) - {"resume", "run_dir"}
    if recorded.get("tune") == "only":
        raise ValueError(f"--resume: {folder} holds a range test alone, which has no epochs")
    lacking = sorted(names.union(["chosen"]) - set(recorded))
    if lacking:
        raise ValueError(f"{folder} holds a run of another version: it has no {', '.join(lacking)}")
    before = {name: recorded[name] for name in names}
    anew = dict.fromkeys(recorded["chosen"])  # these were left to the device, and are chosen again
    parser.set_defaults(**before | anew)
    args = parser.parse_args(arguments)
    for name in sorted(names.difference(schema.ELSEWHERE)):
        given = getattr(args, name)
        old = before[name]
        same = set(given) == set(old) if name in ("sets", "splits") else given == old
        if not same and not (name in anew and (given is None or name == "compile")):
            raise ValueError(f"--resume: --{name.replace('_', '-')} is {given}, and the run in {folder} has {old}")
    if args.epochs < before["epochs"]:
        raise ValueError(f"--resume: --epochs may grow, and {args.epochs} is less than {before['epochs']}")
    if args.epochs > before["epochs"] and args.schedule != "constant":
        raise ValueError(
            f"--resume: --epochs cannot grow from {before['epochs']} to {args.epochs}, on which --schedule "
            f"{args.schedule} depends"
        )
    return args


def choose_run_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the run."""
    alone = "-lr-range" if args.tune == "only" else ""
    return Path(args.run_dir or f"runs/{args.model}-{args.data}-seed{args.seed}{alone}")


def is_measured(when: str | list[int], epoch: int, last: int) -> bool:
    """Return whether `when`, the value of --measure, includes an epoch. last: the last epoch of the run.

    log: 0, the rounded 10^(i/8), which runs of all lengths share, and the last epoch.
    """
    if when == "log":
        return epoch in (0, last) or epoch in {round(10 ** (i / 8)) for i in range(160)}
    return when == "all" or epoch in when


def get_first_measured(when: str | list[int]) -> int:
    """Return the first measured epoch, in which the input is measured."""
    return 0 if when in ("all", "log") else when[0]


def choose_device(name: str | None) -> torch.device:
    """Return the device of this process. Raises ValueError for a device that does not exist here."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in here:
        raise ValueError(f"--device {name} does not exist here: expected one of {', '.join(here)}")
    world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name.startswith("cuda") and world_size > 1:  # each process of torchrun gets a device of its own
        if name != "cuda" or world_size > torch.cuda.device_count():
            raise ValueError(
                f"--device {name} cannot be shared by {world_size} processes: expected cuda, "
                f"and at most {torch.cuda.device_count()} processes"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # DIB restores the random state of the current device
    return torch.device(name)


def choose_model_options(args: argparse.Namespace, dataset: data.Dataset) -> dict:
    """Return the options of the architecture, from its flags or the data. args gets their defaults."""
    if args.model == "MLP":
        args.widths, args.nonlinearity = args.widths or list(mlp.WIDTHS), args.nonlinearity or "ReLU"
        return {"widths": tuple(args.widths), "nonlinearity": args.nonlinearity}
    if args.widths or args.nonlinearity:
        raise ValueError(f"--widths and --nonlinearity are for MLP, and the model is {args.model}")
    if args.model == "CIFARNet" and len(dataset.input_shape) == 3:
        some = torch.arange(min(5000, len(dataset.train)), device=dataset.train.labels.device)
        return {"whitening": cifarnet.compute_whitening(dataset.train.batch(some)[0]).cpu()}
    return {}


def fill_in(args: argparse.Namespace, device: torch.device, dataset: data.Dataset, model: nn.Sequential) -> None:
    """Give every flag in args the value that this run uses.

    Raises ValueError for flags that the data or the model do not allow.
    """
    args.chosen = [name for name in ("compile", "device", "precision") if getattr(args, name) is None]
    args.device = device.type if processes.get_world_size() > 1 else str(device)
    args.run_dir = str(choose_run_folder(args))
    if not args.tune:  # the range test finds it
        args.learning_rate = args.learning_rate or LEARNING_RATE
    try_optimizer(args, device, steps=2)
    args.compile = choose_compile(device, args.compile)
    args.precision = choose_precision(device, args.precision)
    refuse_small_batches(model, [len(dataset.train)], args.batch_size, processes.get_world_size())
    args.sets = [name for name in ("train", "test") if name in args.sets]
    args.splits = list(models.splits(model, args.splits))
    args.measure_dib = args.measure if args.measure_dib is None else args.measure_dib
    for name in ("measure", "measure_dib"):
        when = getattr(args, name)
        if isinstance(when, list) and when[-1] > args.epochs:
            raise ValueError(f"--{name.replace('_', '-')} names epoch {when[-1]}, and the last is {args.epochs}")
    args.num_classes = dataset.num_classes
    args.dib_samples = {"train": args.dib_size or len(dataset.train), "test": args.dib_size or len(dataset.test)}
    if args.probes == "tuned":
        args.dib_lr = args.dib_lr or probes.RATE
        return
    if args.dib_lr:
        raise ValueError(f"--dib-lr {args.dib_lr:g} is for tuned probes, and --probes is thesis")
    measured = [args.dib_samples[name] for name in args.sets if args.dib]
    refuse_small_batches(model, measured, args.batch_size)


def refuse_small_batches(model: nn.Module, sizes: list[int], batch_size: int, world_size: int = 1) -> None:
    """Raise ValueError if a process gets batches of fewer samples than a step needs: 2 for BatchNorm, else 1."""
    least = 1 + any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for size in sizes:
        smallest = size // ceil(size / batch_size) // world_size
        if smallest < least:
            raise ValueError(
                f"--batch-size {batch_size} gives each of {world_size} processes batches of {smallest}, "
                f"and this model needs at least {least} samples"
            )


def choose_compile(device: torch.device, wanted: bool | None) -> bool:
    """Return whether to compile: by default on CUDA, if the programs that torch.compile calls are there.

    Raises ValueError if it is wanted and one of them is missing.
    """
    if device.type == "cpu":
        needs = {"a C++ compiler ($CXX or g++)": shutil.which(os.environ.get("CXX", "g++"))}
    else:
        needs = {
            "a C compiler ($CC, gcc or clang)": any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))),
            "the package triton": find_spec("triton"),
            "Python's C headers": Path(sysconfig.get_path("include"), "Python.h").exists(),
            "a GPU of compute capability 7.0": torch.cuda.get_device_capability(device) >= (7, 0),
        }
    missing = [name for name, found in needs.items() if not found]
    if wanted and missing:
        raise ValueError(f"--compile needs {', '.join(missing)}, which is not found here")
    return device.type == "cuda" and not missing if wanted is None else wanted


def choose_precision(device: torch.device, wanted: str | None) -> str:
    """Return the precision of training: by default bfloat16 if the GPU has it, else float16; float32 on a CPU."""
    if device.type != "cuda":
        return wanted or "float32"
    has_bfloat16 = devices.has_bfloat16(device)
    if wanted == "bfloat16" and not has_bfloat16:
        raise ValueError(f"--precision bfloat16 does not exist on {device}: expected float32 or float16")
    return wanted or ("bfloat16" if has_bfloat16 else "float16")


def make_optimizer(args: argparse.Namespace) -> Callable[..., torch.optim.Optimizer]:
    """Return a function that makes the optimizer of parameters; and of lr, if the flags have no learning rate yet."""
    options = dict(args.optimizer_options)
    if not (options.get("foreach") or options.get("differentiable")):  # these exclude fused
        options.setdefault("fused", True)
    return partial(OPTIMIZERS[args.optimizer], **options, **({"lr": args.learning_rate} if args.learning_rate else {}))


def try_optimizer(args: argparse.Namespace, device: torch.device, steps: int) -> None:
    """Raise ValueError for options that torch refuses, when the optimizer is made or in its steps on the device."""
    p = nn.Parameter(torch.zeros(1, device=device))
    p.grad = torch.zeros_like(p)
    try:
        optimizer = make_optimizer(args)([p], **({} if args.learning_rate else {"lr": LEARNING_RATE}))
        for _ in range(steps):
            optimizer.step()
    except Exception as error:  # torch raises many types
        options = " ".join(f"{name}={value}" for name, value in args.optimizer_options.items())
        reason = " ".join(str(error).split())
        raise ValueError(f"torch.optim.{args.optimizer} refuses {options or 'a step'}: {reason}") from None


def make_schedule(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of the learning rate over the steps of the run, to be stepped after each of them."""
    schedulers = torch.optim.lr_scheduler
    # torch's one cycle would change the momentum as well, whatever the flags say
    one_cycle = {"max_lr": args.learning_rate, "total_steps": steps, "cycle_momentum": False}
    return {
        "constant": partial(schedulers.ConstantLR, factor=1.0),
        "steps": partial(schedulers.MultiStepLR, milestones=[round(steps / 3), round(2 * steps / 3)], gamma=0.1),
        "cosine": partial(schedulers.CosineAnnealingLR, T_max=steps),
        "one-cycle": partial(schedulers.OneCycleLR, **one_cycle),
    }[args.schedule](optimizer)


def collect_hparams(args: argparse.Namespace) -> dict:
    """Return what hparams.json holds."""
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    return {**vars(args), **versions, "processes": processes.get_world_size()}
