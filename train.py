"""Train a network; after every epoch measure its loss and accuracy, NC1 at every tap and DIB at every split.

    python train.py --model MLP --data SZT        (python train.py --help: every flag)

Everything measured goes into the CSVs of the run's folder, which analysis/plots.py draws.
"""

import argparse
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import ceil, isfinite
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

import data
import dib
import heads
import lr_range
import models
import nc1
import ranks
import runs
from models import cifarnet, mlp

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam, "SGD": torch.optim.SGD}
# A CPU shares the steps of a smaller model among threads at no gain, and where another program wants a core at a great
# loss (DIB of MLP on SZT, two cores: 0.6 s with one or two threads alone; beside a busy program 0.6 s and 2 to 30 s).
ONE_THREAD_BELOW = 10_000  # parameters


LEARNING_RATE = 2e-3


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line instead of argparse's usage and error."""
        self.end(2, f"error: {message}")

    def end(self, status: int, message: str) -> None:
        """Exit with the message on one line, whatever characters of an argument it repeats.

        What is refused with status 2 is refused by every process that torchrun started, and said by the first alone.
        """
        if status == 2 and os.environ.get("RANK", "0") != "0":
            sys.exit(status)
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        self.exit(status, f"{self.prog}: {line}\n")


def number(kind: type, low: float, strict: bool = False) -> Callable:
    """An argparse type: an int or float of at least low, or above it if strict, that fits 64 bits."""

    def parse(text: str):
        value = kind(text)
        if not (low < value if strict else low <= value):
            bound = "above" if strict else "of at least"
            raise argparse.ArgumentTypeError(f"expected a number {bound} {low}, got {text}")
        if value >= 2**63:
            raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def make_parser() -> Parser:
    parser = Parser(prog="train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    flag, count, both = parser.add_argument, number(int, 1), ["train", "test"]
    flag("-m", "--model", default="MLP", choices=models.ARCHITECTURES, help="architecture (%(default)s)")
    flag("-d", "--data", default="SZT", choices=data.SOURCES, help="data set (%(default)s)")
    flag("-w", "--widths", type=count, nargs="+", metavar="N", help="of the MLP (10 7 5 4 3)")
    flag("-nl", "--nonlinearity", choices=mlp.NONLINEARITIES, help="of the MLP (ReLU)")
    flag("-b", "--batch-size", type=count, default=400, metavar="N", help="in training and measuring (%(default)s)")
    flag("-lr", "--learning-rate", type=number(float, 0, strict=True), metavar="X", help=f"({LEARNING_RATE})")
    flag(
        "--tune", nargs="?", const="first", choices=["first", "only"], metavar="only",
        help="find the learning rate by a range test and train with it (only: do not train)",
    )  # fmt: skip
    flag("-opt", "--optimizer", default="AdamW", choices=OPTIMIZERS, help="with torch's defaults (%(default)s)")
    flag("--epochs", type=count, default=15, metavar="N", help="(%(default)s)")
    flag("--seed", type=number(int, 0), default=0, metavar="N", help="of all that is drawn (%(default)s)")
    flag("--train-size", type=count, metavar="N", help="samples to train on, as many of each class (all)")
    flag("--sets", nargs="+", default=both, choices=both, help="where NC1 and DIB are measured (train test)")
    flag("--no-nc1", dest="nc1", action="store_false", help="do not measure NC1")
    flag("--no-dib", dest="dib", action="store_false", help="do not measure DIB")
    flag("--dib-epochs", type=count, default=30, metavar="N", help="epochs of DIB's heads (%(default)s)")
    flag(
        "--dib-size", type=count, metavar="N", help="samples of each set that DIB measures, as many of each class (all)"
    )
    flag("--heads", choices=["tuned", "thesis"], default="tuned", help="how DIB's heads are trained (%(default)s)")
    flag("--dib-lr", type=number(float, 0, strict=True), metavar="X", help=f"relative, of tuned heads ({heads.RATE})")
    flag("--splits", nargs="+", metavar="NAME", help="last blocks of DIB's encoders (input, for none, and the stages)")
    flag("--labelings", type=count, default=1, metavar="R", help="data order and R - 1 random ones (%(default)s)")
    flag("--precision", choices=PRECISIONS, help="of training (float32; on CUDA bfloat16 or, without it, float16)")
    flag("-c", "--compile", action=argparse.BooleanOptionalAction, help="torch.compile the training (on CUDA)")
    flag("--device", metavar="NAME", help="cpu, cuda, cuda:1 ... (cuda where there is one)")
    flag("--data-dir", default="datasets", metavar="DIR", help="where image files are (%(default)s)")
    flag("--download", action="store_true", help="fetch the images into --data-dir if they are not there")
    flag("--deterministic", action="store_true", help="on CUDA only algorithms that repeat bit for bit; slower")
    flag("--run-dir", metavar="DIR", help="the run's folder (runs/<model>-<data>-seed<seed>)")
    flag("--resume", action="store_true", help="go on from the last finished epoch, with the flags of the run")
    return parser


def choose_device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    here = ["cpu"] + ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in here:
        raise ValueError(f"--device {name} is not to be had here: expected one of {', '.join(here)}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if name.startswith("cuda") and processes > 1:  # torchrun gives each process a number, and so a device
        if name != "cuda" or processes > torch.cuda.device_count():
            raise ValueError(
                f"--device {name} cannot be shared by {processes} processes: expected cuda, "
                f"and at most {torch.cuda.device_count()} processes"
            )
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # DIB keeps the random state of the current device
    return torch.device(name)


def choose_options(args: argparse.Namespace, dataset: data.Dataset) -> dict:
    """The options of the architecture, from its flags or the data; args gets their defaults."""
    if args.model == "MLP":
        args.widths, args.nonlinearity = args.widths or list(mlp.WIDTHS), args.nonlinearity or "ReLU"
        return {"widths": tuple(args.widths), "nonlinearity": args.nonlinearity}
    if args.widths or args.nonlinearity:
        raise ValueError(f"--widths and --nonlinearity are for MLP, and the model is {args.model}")
    if args.model == "CIFARNet" and len(dataset.input_shape) == 3:
        some = torch.arange(min(5000, len(dataset.train)), device=args.device)
        return {"whitening": cifarnet.filters(dataset.train.batch(some)[0]).cpu()}
    return {}


def choose_compile(device: torch.device, wanted: bool | None) -> bool:
    """By default where it pays, on CUDA, if torch.compile has there what it calls."""
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
        raise ValueError(f"--compile needs {', '.join(missing)}, which cannot be found here")
    return device.type == "cuda" and not missing if wanted is None else wanted


def choose_precision(device: torch.device, wanted: str | None) -> str:
    """By default bfloat16 where the GPU has it, float16 on another, float32 on a CPU."""
    if device.type != "cuda":
        return wanted or "float32"
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bfloat16" and not has_bfloat16:
        raise ValueError(f"--precision bfloat16 is not to be had on {device}: expected float32 or float16")
    return wanted or ("bfloat16" if has_bfloat16 else "float16")


def mixed_precision(device: torch.device, precision: str) -> tuple[Callable, torch.amp.GradScaler]:
    """The context of a forward pass and the scaler of its loss."""
    dtype = PRECISIONS[precision]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)  # float16 alone can underflow


def refuse_small_batches(model: nn.Module, sizes: list[int], batch_size: int, processes: int = 1) -> None:
    """ValueError where a process gets batches of fewer samples than a step needs; BatchNorm cannot do with one."""
    least = 1 + any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for size in sizes:
        smallest = size // ceil(size / batch_size) // processes
        if smallest < least:
            raise ValueError(
                f"--batch-size {batch_size} gives each of {processes} processes batches of {smallest}, "
                f"and this model needs at least {least} samples"
            )


def run_folder(args: argparse.Namespace) -> Path:
    alone = "-lr-range" if args.tune == "only" else ""
    return Path(args.run_dir or f"runs/{args.model}-{args.data}-seed{args.seed}{alone}")


def hparams_of(args: argparse.Namespace) -> dict:
    versions = {"torch": str(torch.__version__), "torchvision": torchvision.__version__}
    return {**vars(args), **versions, "processes": ranks.world()}


def adopt_flags(parser: Parser, arguments: list[str] | None, folder: Path, recorded: dict) -> argparse.Namespace:
    """The arguments, with the flags recorded of a run as defaults; ValueError for flags that differ from them."""
    names = set(vars(parser.parse_args([]))) - {"resume", "run_dir"}
    if recorded.get("tune") == "only":
        raise ValueError(f"--resume: {folder} holds a range test alone, which has no epochs")
    if not names <= set(recorded):
        raise ValueError(
            f"{folder} holds a run of another version: it has no {', '.join(sorted(names - set(recorded)))}"
        )
    parser.set_defaults(**{name: recorded[name] for name in names})
    args = parser.parse_args(arguments)
    for name in sorted(names.difference(runs.MAY_DIFFER)):
        given, had = getattr(args, name), recorded[name]
        same = set(given) == set(had) if name in ("sets", "splits") else given == had
        if not same:
            raise ValueError(f"--resume: --{name.replace('_', '-')} is {given}, and the run in {folder} has {had}")
    if args.epochs < recorded["epochs"]:
        raise ValueError(f"--resume: --epochs may grow, and {args.epochs} is less than {recorded['epochs']}")
    return args


@torch.no_grad()
def evaluate(model: nn.Module, split: data.Split, batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy in nats and share of samples classified right, of a model in eval mode."""
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for indices in ranks.share(torch.arange(len(split), device=split.labels.device).split(batch_size)):
        x, y = split.batch(indices)
        logits = model(x)
        loss += F.cross_entropy(logits, y, reduction="sum")
        right += (logits.argmax(1) == y).sum()
    ranks.add_up(loss, right)
    return loss.item() / len(split), right.item() / len(split)


def refuse_infinite(finite: torch.Tensor, epoch: int, learning_rate: float) -> None:
    """Raise FloatingPointError for the first step of which the loss is known not to be finite."""
    if not finite.all():
        step = 1 + int(finite.int().argmin())
        raise FloatingPointError(
            f"the training loss is not finite in epoch {epoch}, step {step} of {len(finite)}, "
            f"at learning rate {learning_rate:g}"
        )


def within_memory(what: str, measure: Callable, batch_size: int, keep_bytes: int) -> dict:
    """The measure; where memory runs out, once more with half the batch and nothing kept, and a line that says so."""
    try:
        return measure(batch_size=batch_size, keep_bytes=keep_bytes)
    except RuntimeError as error:  # torch.OutOfMemoryError on CUDA
        short = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not short or ranks.world() > 1:  # other processes wait for this one within the pass
            raise
    torch.cuda.empty_cache()  # after the clause above, as the error holds on to what the pass had
    half = max(1, batch_size // 2)
    tqdm.write(f"{what}: out of memory; once more in batches of {half}, not {batch_size}, with nothing kept")
    return measure(batch_size=half, keep_bytes=0)


def bytes_to_keep(device: torch.device) -> int:
    """Of activations, in each of the measures."""
    free = torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else nc1.KEEP_BYTES
    return min(nc1.KEEP_BYTES, free)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def prepare(args: argparse.Namespace) -> tuple[data.Dataset, Callable[[], nn.Sequential], Callable, dict, list[tuple]]:
    """Data, constructors of the model and of optimizers, the parts that a checkpoint holds, the rows of lr_range.csv.

    Nothing is written. args gets every default filled in. Raises ValueError for what is asked for and cannot be had.
    """
    device = choose_device(args.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 is to be float32
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
    torch.use_deterministic_algorithms(args.deterministic)
    args.device = device.type if ranks.world() > 1 else str(device)
    if args.download and ranks.rank() > 0:
        ranks.meet()  # the first process fetches
    try:
        dataset = data.load(args.data, args.data_dir, device, args.download, args.train_size)
    finally:
        if args.download and ranks.rank() == 0:
            ranks.meet()
    options = choose_options(args, dataset)

    def build() -> nn.Sequential:
        model = models.build(args.model, dataset.input_shape, dataset.num_classes, **options)
        # convolutions run faster with channels last, on CUDA and on a CPU (MNISTNet there: 0.14 ms a sample, not 0.22)
        return model.to(memory_format=torch.channels_last)

    torch.manual_seed(args.seed)
    model = build().to(device)
    if device.type == "cpu" and sum(p.numel() for p in model.parameters()) < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    refuse_small_batches(model, [len(dataset.train)], args.batch_size, ranks.world())
    args.sets = [name for name in ("train", "test") if name in args.sets]
    measured = dib_sets(args, dataset)
    args.num_classes = dataset.num_classes
    args.dib_samples = {"train": args.dib_size or len(dataset.train), "test": args.dib_size or len(dataset.test)}
    if args.heads == "thesis":
        if args.dib_lr:
            raise ValueError(f"--dib-lr {args.dib_lr:g} is for tuned heads, and --heads is thesis")
        refuse_small_batches(model, list(map(len, measured.values())), args.batch_size)
    else:
        args.dib_lr = args.dib_lr or heads.RATE
    args.splits = list(models.splits(model, args.splits))
    args.compile = choose_compile(device, args.compile)
    args.precision = choose_precision(device, args.precision)
    args.run_dir = str(run_folder(args))
    make_optimizer, steps = partial(OPTIMIZERS[args.optimizer], fused=True), []
    if args.tune and not args.resume:
        if args.learning_rate:
            raise ValueError(f"--learning-rate {args.learning_rate:g} is given, and --tune is to find it")
        precision = mixed_precision(device, args.precision)
        steps = lr_range.sweep(model, dataset.train, make_optimizer, args.batch_size, *precision)
        steps = ranks.told_by_first(steps)
        best = lr_range.steepest(steps)
        args.learning_rate = steps[best].learning_rate
        steps = [(i, *step, int(i == best)) for i, step in enumerate(steps)]
    args.learning_rate = args.learning_rate or LEARNING_RATE
    make_optimizer = partial(make_optimizer, lr=args.learning_rate)
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    parts = {"model": model, "optimizer": optimizer, "scaler": mixed_precision(device, args.precision)[1]}
    return dataset, build, make_optimizer, parts, steps


def run(
    args: argparse.Namespace, dataset: data.Dataset, build: Callable, make_optimizer: Callable, parts: dict, done: int
) -> None:
    """Train, evaluate, measure, log and save, epoch by epoch."""
    folder, device, C = Path(args.run_dir), torch.device(args.device), dataset.num_classes
    model, optimizer, scaler = parts["model"], parts["optimizer"], parts["scaler"]
    sets, dib_samples = {"train": dataset.train, "test": dataset.test}, dib_sets(args, dataset)
    autocast, _ = mixed_precision(device, args.precision)
    # the network shares the model's parameters; only training runs it, measuring hooks into the model itself
    network = nn.parallel.DistributedDataParallel(model) if ranks.world() > 1 else model
    network = torch.compile(network, dynamic=False) if args.compile else network
    bar = partial(tqdm, leave=False, disable=True if ranks.rank() else None)

    for epoch in bar(range(done + 1, args.epochs + 1), desc="epochs", initial=done, total=args.epochs):
        start = clock(device)
        model.train()
        order = torch.randperm(len(dataset.train)).to(device, non_blocking=True)
        ranks.from_first(order)
        if ranks.rank() > 0:  # layers that draw are to draw something else for each share of a batch
            torch.manual_seed(hash((args.seed, epoch, ranks.rank())))
        # batches as even as can be: BatchNorm cannot train on a leftover of one sample
        batches = order.tensor_split(ceil(len(order) / args.batch_size))
        finite = torch.ones(len(batches), dtype=torch.bool, pin_memory=device.type == "cuda")
        for step, indices in enumerate(bar(batches, desc="training", delay=1)):
            mine = indices.tensor_split(ranks.world())[ranks.rank()]
            x, y = dataset.train.batch(mine)
            with autocast():
                # gradients are averaged over the processes, whose shares of the batch may differ by one sample
                loss = F.cross_entropy(network(x), y) * (len(mine) * ranks.world() / len(indices))
            finite[step].copy_(loss.detach().isfinite(), non_blocking=True)  # from CUDA it arrives some steps later
            refuse_infinite(finite, epoch, args.learning_rate)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ranks.from_first(*model.buffers())  # each process has running statistics of its own samples
        seconds = {"train": clock(device) - start}
        refuse_infinite(finite, epoch, args.learning_rate)

        model.eval()
        scores = {}
        for name, split in sets.items():
            start = clock(device)
            scores[name] = evaluate(model, split, args.batch_size)
            seconds.setdefault(name, clock(device) - start)
        if not isfinite(scores["train"][0]):
            raise FloatingPointError(
                f"the training loss is not finite after the last step of epoch {epoch}, "
                f"at learning rate {args.learning_rate:g}"
            )
        rows = {name: [] for name in runs.COLUMNS}
        rows["epochs.csv"] = [(epoch, name, *scores[name], round(seconds[name], 4)) for name in sets]

        start = clock(device)
        collapse = measure_nc1(args, sets, C, model, epoch) if args.nc1 else {}
        rows["nc1.csv"] = [(epoch, name, layer, *its) for name in collapse for layer, its in collapse[name].items()]
        seconds["NC1"] = clock(device) - start

        start = clock(device)
        found = measure_dib(args, dib_samples, C, model, build, make_optimizer, epoch) if args.dib else []
        rows["dib.csv"] = [(epoch, name, split, *head) for name, split, head in found]
        beaten = {name: dib.beaten(head for of, _, head in found if of == name) for name in args.sets if found}
        seconds["DIB"] = clock(device) - start

        # an epoch counts once its checkpoint stands: rows beyond it are dropped by --resume
        if ranks.rank() == 0:
            runs.append(folder, rows)
            runs.save(folder, epoch, hparams_of(args), device, parts)
            tqdm.write(summary(f"{epoch}/{args.epochs}", scores, collapse, beaten, seconds))
            sys.stdout.flush()


def measure_nc1(
    args: argparse.Namespace, sets: dict[str, data.Split], num_classes: int, model: nn.Sequential, epoch: int
) -> dict[str, dict[str, nc1.Collapse]]:
    """{set: {layer: NC1}}, layers in order of depth.

    The input does not change, and is measured in the first epoch alone.
    """
    inputs = nn.Identity()
    networks = [(inputs, {"input": inputs})] * (epoch == 1) + [(model, models.taps(model))]
    found = {name: {} for name in args.sets}
    for name in args.sets:
        for network, taps in networks:
            measure = partial(nc1.measure, network, taps, sets[name], num_classes)
            keep_bytes = bytes_to_keep(torch.device(args.device))
            found[name] |= within_memory(f"NC1 of the {name} set", measure, args.batch_size, keep_bytes)
    return found


def dib_sets(args: argparse.Namespace, dataset: data.Dataset) -> dict[str, data.Split]:
    """The samples of each set that DIB measures: all, or --dib-size of them."""
    sets = {"train": dataset.train, "test": dataset.test}
    sets = {name: sets[name] for name in args.sets if args.dib}
    if args.dib_size is None:
        return sets
    what = f"--dib-size of the {args.data} {{}} set"
    return {name: split.some(args.dib_size, dataset.num_classes, what.format(name)) for name, split in sets.items()}


def dib_steps(args: argparse.Namespace, name: str) -> int:
    """The steps of DIB's heads on a set: sets compare only after the same number, and tuned heads take it on both."""
    if args.heads == "thesis":
        return args.dib_epochs * ceil(args.dib_samples[name] / args.batch_size)
    return heads.steps(args.dib_epochs, args.dib_samples["train"])


def measure_dib(
    args: argparse.Namespace,
    sets: dict[str, data.Split],
    num_classes: int,
    model: nn.Sequential,
    build: Callable,
    make_optimizer: Callable,
    epoch: int,
    factor: int = 1,
) -> list[tuple[str, str, dib.Head]]:
    """(set, split, head) of all heads of an epoch, trained for so many times the steps that the flags give.

    The split without encoder does not change, and is measured in the first epoch alone.
    """
    if args.heads == "thesis":
        recipe, batch_size = heads.Thesis(make_optimizer, factor * args.dib_epochs), args.batch_size
    else:
        recipe, batch_size = heads.Tuned(factor * dib_steps(args, "train"), args.dib_lr), heads.BATCH
    names = {k: name for name, k in models.splits(model, args.splits).items() if epoch == 1 or k > 0}
    options = {"labelings": args.labelings, "seed": args.seed, "model_epoch": epoch}
    rows = []
    for name in args.sets:
        measure = partial(dib.measure_splits, model, names, sets[name], num_classes, build, recipe, **options)
        keep_bytes = bytes_to_keep(torch.device(args.device))
        found = within_memory(f"DIB of the {name} set", measure, batch_size, keep_bytes)
        rows += [(name, names[k], head) for k, of_split in found.items() for head in of_split]
    return rows


def summary(epoch: str, scores: dict, collapse: dict, beaten: dict, seconds: dict[str, float]) -> str:
    """The line of an epoch: train (test) figures, NC1 at the deepest tap, the share of heads that are known not to have
    been found, and where the time went."""
    (train_loss, train_accuracy), (test_loss, test_accuracy) = scores["train"], scores["test"]
    parts = [f"loss {train_loss:.4f} ({test_loss:.4f})  accuracy {train_accuracy:.2%} ({test_accuracy:.2%})"]
    for name, values in collapse.items():
        layer, deepest = list(values.items())[-1]
        parts.append(f"NC1 {name} {layer} {deepest.nc1:.4g} (rank {deepest.rank})")
    if beaten:
        parts.append("heads beaten " + ", ".join(f"{name} {share:.1%}" for name, share in beaten.items()))
    parts.append(", ".join(f"{part} {seconds[part]:.1f} s" for part in ("train", "NC1", "DIB")))
    return f"epoch {epoch}  " + "  ".join(parts)


class Stop(BaseException):
    """SIGINT or SIGTERM: raised at once, as what is in flight is done again from its start anyway."""


def stop(number: int, frame: object) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # a second one ends the program where it stands
    raise Stop(number)


def catch_signals() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)


@dataclass
class Progress:
    """What a program says when it ends early: what is kept, once it is running, and how it goes on."""

    kept: str
    go_on: str
    running: bool = False


@contextmanager
def one_line(parser: Parser, progress: Progress) -> Iterator[None]:
    """Whatever ends the program is said in one line: 2 for what is refused, 1 for what fails, 128 + n for a signal."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if not progress.running:
            ranks.leave()  # all refuse together, and a process that only ended would be aborted
            parser.end(2, f"error: {error}")
        parser.end(1, f"error: {error}; {progress.kept}")
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            raise
        kept = f"; {progress.kept}" if progress.running else ""
        parser.end(1, f"error: process {ranks.rank()} has lost another one{kept}")
    except Stop as stopped:
        number = stopped.args[0]
        rest = f"; {progress.kept}, {progress.go_on}" if progress.running else " before the run began"
        parser.end(128 + number, f"stopped by {signal.Signals(number).name}{rest}")


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    folder, done = run_folder(args), 0
    progress = Progress(f"finished epochs are kept in {folder}", "and the same command with --resume goes on from them")
    with one_line(parser, progress), ExitStack() as stack:
        ranks.join()
        first, refusal = ranks.rank() == 0, None  # the first process is the only one that writes
        try:
            if args.resume:
                if first:
                    stack.enter_context(runs.locked(folder))
                state = runs.load(folder)
                args, done = adopt_flags(parser, arguments, folder, state["hparams"]), state["epoch"]
            elif first:
                runs.refuse_existing(folder)
            dataset, build, make_optimizer, parts, steps = prepare(args)
            device, hparams = torch.device(args.device), hparams_of(args)
            if args.resume:
                runs.restore(folder, state, device, parts)
        except (ValueError, OSError) as error:
            refusal = str(error)
        ranks.agree(refusal)
        if args.resume and first:
            runs.resume(folder, state, hparams, device, parts)
        elif first:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(runs.locked(folder))
            runs.start(folder, hparams, device, parts, steps)
        if steps and first:
            tqdm.write(f"learning rate {args.learning_rate:.3g}, by the range test: {folder / 'lr_range.csv'}")
        progress.running = True
        if args.tune != "only":
            run(args, dataset, build, make_optimizer, parts, done)
        if first:
            print(f"done: the run is in {folder}; make plots RUN={folder} draws it")
        ranks.leave()


if __name__ == "__main__":
    catch_signals()
    main()
