"""Run the tests of CUDA on a GPU, and then time each part of a run: `make check-gpu`.

Writes gpu.csv with the name of the card, and prints the same as a table at the end. If a part fails, its row has the
error in place of seconds, the other parts still run, and the exit status is 1. Needs no network and no packages but
torch, torchvision, numpy, pytest and tqdm. It should take less than ten minutes on an H100. The images are those of
CIFAR-10 if --data-dir has them, and random ones otherwise: no time depends on them. scaled: of DIB, the seconds of 30
dib epochs, in proportion to the steps. This is too much, as work that is done once is multiplied as well. Of the thesis
run, the seconds of 15 epochs that are like the second.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import ceil
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import data
import dib
import models
import nc1
import train
from layerwise import devices
from layerwise.probes import BATCH_SIZE
from training import checkpoint
from training.hardware import choose_compile
from training.optimizers import LEARNING_RATE

EPOCHS, DIB_EPOCHS = 15, 30  # of the thesis run
MEASURED = 2  # epochs of either kind that are run and timed
ADAMW = partial(torch.optim.AdamW, lr=LEARNING_RATE, fused=True)
PRECISIONS = ("float32", "TF32", "bfloat16")
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


class Row(NamedTuple):
    """A row of gpu.csv."""

    what: str
    detail: str
    seconds: float | None  # None if the part failed
    scaled: float | None = None
    peak_mib: float | None = None  # of the memory of the device


class Case(NamedTuple):
    """What is timed: an architecture on the device, and how."""

    name: str
    dataset: data.Dataset
    make_model: Callable[[], nn.Sequential]
    batch_size: int
    splits: list[str] | None
    compiled: bool  # whether torch.compile works here
    device: torch.device = torch.device("cuda")


def time_call(run: Callable[[], object], factor: float | None = None) -> tuple[float, float | None, float]:
    """Return the seconds of a call, the seconds times factor, and the peak of the device's memory in MiB."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    start = train.read_clock(device)
    run()
    seconds = train.read_clock(device) - start
    return seconds, factor and factor * seconds, torch.cuda.max_memory_allocated() / 2**20


@contextmanager
def use_precision(name: str) -> Iterator[None]:
    """Train probes in float32, in float32 with products in TF32, or in bfloat16."""
    has_bfloat16 = devices.has_bfloat16 if name == "bfloat16" else lambda _: False
    with devices.disable_tf32(), patch.object(devices, "has_bfloat16", has_bfloat16):
        if name == "TF32":
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
        yield


def run_tests() -> Iterator[Row]:
    """Run the tests of test_cuda.py in a process of their own. The detail of the row is the last line of pytest."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "", "tests/test_cuda.py"]
    start, last = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip(" =\n") or last
    yield Row("tests", last, time.perf_counter() - start)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, "pytest")


def run_train(case: Case, folder: str, *flags: str) -> None:
    """Run train.py on the case."""
    options = ["-m", case.name, "-d", "gpu", "-b", str(case.batch_size), "--device", "cuda", *flags]
    train.main([*options, "--run-dir", folder])


def time_training(case: Case) -> Iterator[Row]:
    """Time the third epoch of train.py, and the same number of steps on one batch that does not change."""
    steps = ceil(len(case.dataset.train) / case.batch_size)
    for lower, compiled in ((False, False), (True, False), (True, True))[: 3 if case.compiled else 2]:
        name, word = ("bfloat16" if lower else "float32"), ("compiled" if compiled else "not compiled")
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--precision", name, "--compile" if compiled else "--no-compile", "--epochs", "3"]
            run = partial(run_train, case, f"{folder}/run", *flags, "--no-nc1", "--no-dib")
            *_, peak = time_call(run)
            with open(f"{folder}/run/epochs.csv") as file:
                seconds = float([row for row in csv.DictReader(file) if row["set"] == "train"][-1]["seconds"])
        yield Row(f"training epoch, {name}, {word}", f"{steps} steps of {case.batch_size}", seconds, None, peak)
        for layout in list(LAYOUTS)[: 1 if lower else 2]:
            what = f"bare steps, {name}, {word}, {layout}"
            yield Row(what, f"{steps} steps", *time_bare_steps(case, layout, lower, compiled, steps))


@devices.disable_tf32()
def time_bare_steps(case: Case, layout: str, lower: bool, compiled: bool, steps: int) -> tuple:
    """Time training steps on one batch. lower: whether they use bfloat16."""
    model = case.make_model().to(case.device).to(memory_format=LAYOUTS[layout])
    x, y = case.dataset.train.batch(torch.arange(min(case.batch_size, len(case.dataset.train)), device=case.device))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    network = torch.compile(model, dynamic=False) if compiled else model

    def take_steps(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16) if lower else nullcontext():
                loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    take_steps(3)  # compiles, and chooses algorithms
    return time_call(partial(take_steps, steps))


def time_nc1(case: Case) -> Iterator[Row]:
    """Time NC1 of both sets, as an epoch of train.py measures it."""
    model = case.make_model().to(case.device)
    sets, C = (case.dataset.train, case.dataset.test), case.dataset.num_classes

    def measure() -> None:
        for samples in sets:
            cache_bytes = devices.choose_cache_bytes(case.device)
            nc1.measure(model, models.layers(model), samples, C, case.batch_size, cache_bytes)

    measure()  # chooses algorithms
    yield Row("NC1", f"{' + '.join(str(len(samples)) for samples in sets)} images", *time_call(measure))


def time_probes(case: Case) -> Iterator[Row]:
    """Time the probes of each split on its own, on the training set."""
    model, samples, C = case.make_model().to(case.device), case.dataset.train, case.dataset.num_classes
    make_kind = {"tuned": dib.Tuned, "thesis": partial(dib.Thesis, ADAMW, bfloat16=True)}  # if the device has it
    for name, k in models.splits(model, case.splits).items():
        for kind in ("tuned", "thesis"):
            for precision in PRECISIONS:
                batch_size = BATCH_SIZE if kind == "tuned" else case.batch_size
                steps = MEASURED * ceil(len(samples) / batch_size)

                def measure(amount: int, kind=kind, k=k, batch_size=batch_size) -> None:
                    options = {"probes": make_kind[kind](amount), "batch_size": batch_size}
                    options["cache_bytes"] = devices.choose_cache_bytes(case.device)
                    measure_splits = dib.measure_splits.__wrapped__  # without the context that disables TF32
                    measure_splits(model, [k], samples, C, case.make_model, **options)

                amount = steps if kind == "tuned" else MEASURED
                with use_precision(precision):
                    if kind == "tuned":
                        measure(1)  # chooses algorithms
                    times = time_call(partial(measure, amount), DIB_EPOCHS / MEASURED)
                yield Row(f"DIB {name}, {kind}, {precision}", f"{steps} steps", *times)


def time_thesis_run(case: Case, dib_epochs: int) -> Iterator[Row]:
    """Time two epochs of train.py with thesis probes.

    Epoch 0 comes before them and measures the split without encoder. Epoch 1 includes the time of the compiler.
    """
    ends, save = [], checkpoint.save

    def save_and_note(*args: object) -> None:
        save(*args)
        ends.append(train.read_clock(case.device))

    flags = ["--probes", "thesis", "--epochs", "2", "--dib-epochs", str(dib_epochs)]
    flags += ["--splits", *case.splits] if case.splits else []
    with tempfile.TemporaryDirectory() as folder, patch.object(checkpoint, "save", save_and_note):
        seconds, _, peak = time_call(partial(run_train, case, f"{folder}/run", *flags))
    first, second = ends[-2] - ends[-3], ends[-1] - ends[-2]
    detail = f"epochs of {first:.3f} and {second:.3f} s, {dib_epochs} dib epochs"
    yield Row(f"thesis run, {case.name}", detail, seconds, seconds + (EPOCHS - MEASURED) * second, peak)


def add_failure(name: str, part: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of a part. If it fails, yield a last row with the error."""
    try:
        yield from part
        return
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        row = Row(name, f"failed: {describe_error(error)}", None)
    yield row  # after the clause above: the error holds references to the memory of the part


def describe_error(error: BaseException) -> str:
    """Return type and message of an error on one line. For an exit of train.py, those of the error that caused it."""
    if isinstance(error, SystemExit) and error.__context__:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())


def load_images(args: argparse.Namespace) -> tuple[str, tuple]:
    """Return a name for the images and a data source: the first images of CIFAR-10, or random ones."""
    sizes = (args.train_size, args.test_size)
    try:
        *parts, C = data.images.load("CIFAR10", args.data_dir, False)
        return "CIFAR-10", (*(part[: sizes[i // 2]] for i, part in enumerate(parts)), C)
    except ValueError:
        g = torch.Generator().manual_seed(0)
        x = [torch.randint(0, 256, (N, 3, 32, 32), generator=g, dtype=torch.uint8) for N in sizes]
        return "random images", (x[0], torch.arange(sizes[0]) % 10, x[1], torch.arange(sizes[1]) % 10, 10)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--model", default="CIFARNet", choices=[*models.ARCHITECTURES], help="(%(default)s)")
    flag("--splits", nargs="+", metavar="NAME", help="of DIB (those of the architecture)")
    flag("--train-size", type=int, default=50_000, metavar="N", help="(%(default)s)")
    flag("--test-size", type=int, default=10_000, metavar="N", help="(%(default)s)")
    flag("--batch-size", type=int, default=400, metavar="N", help="(%(default)s)")
    flag("--dib-epochs", type=int, default=DIB_EPOCHS, metavar="N", help="of the thesis run (%(default)s)")
    flag("--data-dir", default="datasets", metavar="DIR", help="where CIFAR-10 may be (%(default)s)")
    flag("--no-tests", dest="tests", action="store_false", help="do not run the tests")
    flag("--out", default="gpu.csv", metavar="FILE", help="(%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, found none")
    name_of_images, source = load_images(args)
    data.SOURCES["gpu"] = lambda *_: source
    dataset = data.load("gpu", device="cuda")

    def make_model() -> nn.Sequential:
        return models.build(args.model, dataset.input_shape, 10).to(memory_format=torch.channels_last)

    compiled = choose_compile(torch.device("cuda"), None)
    case = Case(args.model, dataset, make_model, args.batch_size, args.splits, compiled)
    card, rows = torch.cuda.get_device_name(), []
    print(f"{card}, torch {torch.__version__}; {args.model} on {name_of_images}")
    with open(args.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["card", "torch", *Row._fields])

        def write(row: Row) -> None:
            rows.append(row)
            print(f"{row.what}: {row.detail if row.seconds is None else f'{row.seconds:.3g} s'}", flush=True)
            writer.writerow([card, torch.__version__, *row])
            file.flush()

        parts = {"tests": run_tests()} if args.tests else {}
        parts |= {"training": time_training(case), "NC1": time_nc1(case), "DIB": time_probes(case)}
        parts["thesis run"] = time_thesis_run(case, args.dib_epochs)
        try:
            for name, part in parts.items():
                for row in add_failure(name, part):
                    write(row)
        finally:
            print(format_table(card, rows))
    sys.exit(int(any(row.seconds is None for row in rows)))


def format_table(card: str, rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [f"| {card}, torch {torch.__version__} | | seconds | scaled | peak MiB |", "|---|---|---|---|---|"]
    for row in rows:
        numbers = ["" if value is None else f"{value:.4g}" for value in row[2:]]
        lines.append(f"| {row.what} | {row.detail} | {' | '.join(numbers)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
