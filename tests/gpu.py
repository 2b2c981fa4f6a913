"""What a GPU shows: the tests of CUDA, then how long each part of a run takes there: `make check-gpu`.

Writes gpu.csv, with the card's name, and ends with the same as a table. A part that fails has a row without seconds
that says why, the others go on, and the exit status is 1. It needs no network, nothing but torch,
torchvision, numpy, pytest and tqdm, and by estimate under ten minutes on an H100. Images are CIFAR-10's where
--data-dir has them, else random: no time depends on them. scaled: the seconds of 30 dib epochs, in proportion to the
steps (rather too many, as what is done once is multiplied, too), or of the thesis run, of 15 epochs like the second.
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
import devices
import dib
import flags
import heads
import models
import nc1
import runs
import train

EPOCHS, DIB_EPOCHS = 15, 30  # of the thesis run
MEASURED = 2  # epochs of either kind that stand for them
ADAMW = partial(torch.optim.AdamW, lr=flags.LEARNING_RATE, fused=True)
PRECISIONS = ("float32", "TF32", "bfloat16")
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


class Row(NamedTuple):
    what: str
    detail: str
    seconds: float | None  # none of what failed
    scaled: float | None = None
    peak_mib: float | None = None  # of the device's memory


class Bench(NamedTuple):
    """What is timed: an architecture on the device, and how."""

    name: str
    dataset: data.Dataset
    build: Callable[[], nn.Sequential]
    batch_size: int
    splits: list[str] | None
    compiled: bool  # whether torch.compile is to be had
    device: torch.device = torch.device("cuda")


def timed(run: Callable[[], object], factor: float | None = None) -> tuple[float, float | None, float]:
    """Seconds, factor times as many, and the peak of the device's memory in MiB."""
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    start = train.clock(device)
    run()
    seconds = train.clock(device) - start
    return seconds, factor and factor * seconds, torch.cuda.max_memory_allocated() / 2**20


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Products of float32 in TF32 or not, heads in bfloat16 or not."""
    lower = name == "bfloat16"
    with (
        devices.exact_float32(),
        patch.object(devices, "has_bfloat16", devices.has_bfloat16 if lower else lambda _: False),
    ):
        if name == "TF32":
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "tf32"
        yield


def tests() -> Iterator[Row]:
    """Those of test_cuda.py, in a process of their own: its last line."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "", "tests/test_cuda.py"]
    start, last = time.perf_counter(), ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip(" =\n") or last
    yield Row("tests", last, time.perf_counter() - start)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, "pytest")


def trained(bench: Bench, folder: str, *flags: str) -> None:
    options = ["-m", bench.name, "-d", "gpu", "-b", str(bench.batch_size), "--device", "cuda", *flags]
    train.main([*options, "--run-dir", folder])


def training(bench: Bench) -> Iterator[Row]:
    """The third epoch of train.py, beside as many steps on one batch that does not change."""
    steps = ceil(len(bench.dataset.train) / bench.batch_size)
    for lower, compiled in ((False, False), (True, False), (True, True))[: 3 if bench.compiled else 2]:
        name, word = ("bfloat16" if lower else "float32"), ("compiled" if compiled else "not compiled")
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--precision", name, "--compile" if compiled else "--no-compile", "--epochs", "3"]
            run = partial(trained, bench, f"{folder}/run", *flags, "--no-nc1", "--no-dib")
            *_, peak = timed(run)
            with open(f"{folder}/run/epochs.csv") as file:
                seconds = float([row for row in csv.DictReader(file) if row["set"] == "train"][-1]["seconds"])
        yield Row(f"training epoch, {name}, {word}", f"{steps} steps of {bench.batch_size}", seconds, None, peak)
        for layout in list(LAYOUTS)[: 1 if lower else 2]:
            what = f"bare steps, {name}, {word}, {layout}"
            yield Row(what, f"{steps} steps", *bare(bench, layout, lower, compiled, steps))


@devices.exact_float32()
def bare(bench: Bench, layout: str, lower: bool, compiled: bool, steps: int) -> tuple:
    """So many training steps on one batch, timed."""
    model = bench.build().to(bench.device).to(memory_format=LAYOUTS[layout])
    x, y = bench.dataset.train.batch(torch.arange(min(bench.batch_size, len(bench.dataset.train)), device=bench.device))
    x = x.contiguous(memory_format=LAYOUTS[layout])
    optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
    network = torch.compile(model, dynamic=False) if compiled else model

    def take(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cuda", torch.bfloat16) if lower else nullcontext():
                loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    take(3)  # compiles, and chooses algorithms
    return timed(partial(take, steps))


def collapse(bench: Bench) -> Iterator[Row]:
    """NC1 of both sets, as an epoch of train.py measures it."""
    model = bench.build().to(bench.device)
    sets, C = (bench.dataset.train, bench.dataset.test), bench.dataset.num_classes

    def measure() -> None:
        for split in sets:
            keep_bytes = devices.bytes_to_keep(bench.device)
            nc1.measure(model, models.taps(model), split, C, bench.batch_size, keep_bytes)

    measure()  # chooses algorithms
    yield Row("NC1", f"{' + '.join(str(len(split)) for split in sets)} images", *timed(measure))


def decoders(bench: Bench) -> Iterator[Row]:
    """The heads of each split alone, on the training set."""
    model, split, C = bench.build().to(bench.device), bench.dataset.train, bench.dataset.num_classes
    for name, k in models.splits(model, bench.splits).items():
        for kind in ("tuned", "thesis"):
            for of_steps in PRECISIONS:
                B = heads.BATCH if kind == "tuned" else bench.batch_size
                steps = MEASURED * ceil(len(split) / B)
                make = {"tuned": heads.Tuned, "thesis": partial(heads.Thesis, ADAMW, bfloat16=True)}  # where it is on

                def measure(amount: int, make=make[kind], k=k, B=B) -> None:
                    # without the context that forbids TF32
                    of = dib.measure_splits.__wrapped__
                    of(model, [k], split, C, bench.build, make(amount), 1, 0, 0, B, devices.bytes_to_keep(bench.device))

                amount = steps if kind == "tuned" else MEASURED
                with precision(of_steps):
                    if kind == "tuned":
                        measure(1)  # chooses algorithms
                    times = timed(partial(measure, amount), DIB_EPOCHS / MEASURED)
                yield Row(f"DIB {name}, {kind}, {of_steps}", f"{steps} steps", *times)


def thesis_run(bench: Bench, dib_epochs: int) -> Iterator[Row]:
    """Two epochs of train.py with thesis heads, after epoch 0, which measures the split without encoder; the first one
    compiles."""
    ends, save = [], runs.save

    def noted(*those: object) -> None:
        save(*those)
        ends.append(train.clock(bench.device))

    flags = ["--heads", "thesis", "--epochs", "2", "--dib-epochs", str(dib_epochs)]
    flags += ["--splits", *bench.splits] if bench.splits else []
    with tempfile.TemporaryDirectory() as folder, patch.object(runs, "save", noted):
        seconds, _, peak = timed(partial(trained, bench, f"{folder}/run", *flags))
    first, second = ends[-2] - ends[-3], ends[-1] - ends[-2]
    detail = f"epochs of {first:.3f} and {second:.3f} s, {dib_epochs} dib epochs"
    yield Row(f"thesis run, {bench.name}", detail, seconds, seconds + (EPOCHS - MEASURED) * second, peak)


def rows_of(name: str, part: Iterator[Row]) -> Iterator[Row]:
    """Those of a part; where it fails, the last one says so."""
    try:
        yield from part
        return
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        row = Row(name, f"failed: {reason(error)}", None)
    yield row  # after the clause above, as the error holds on to the memory that the part had


def reason(error: BaseException) -> str:
    """What an error says, on one line; where train.py has said it and exits, the error before."""
    if isinstance(error, SystemExit) and error.__context__:
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())


def images(args: argparse.Namespace) -> tuple[str, tuple]:
    """What they are called, and a source of them: the first of CIFAR-10's, or random ones."""
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
    flag("--splits", nargs="+", metavar="NAME", help="DIB's (those of the architecture)")
    flag("--train-size", type=int, default=50_000, metavar="N", help="(%(default)s)")
    flag("--test-size", type=int, default=10_000, metavar="N", help="(%(default)s)")
    flag("--batch-size", type=int, default=400, metavar="N", help="(%(default)s)")
    flag("--dib-epochs", type=int, default=DIB_EPOCHS, metavar="N", help="of the thesis run (%(default)s)")
    flag("--data-dir", default="datasets", metavar="DIR", help="where CIFAR-10 may be (%(default)s)")
    flag("--no-tests", dest="tests", action="store_false", help="only time")
    flag("--out", default="gpu.csv", metavar="FILE", help="(%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no CUDA device is to be had here")
    called, source = images(args)
    data.SOURCES["gpu"] = lambda *_: source
    dataset = data.load("gpu", device="cuda")

    def build() -> nn.Sequential:
        return models.build(args.model, dataset.input_shape, 10).to(memory_format=torch.channels_last)

    compiled = flags.choose_compile(torch.device("cuda"), None)
    bench = Bench(args.model, dataset, build, args.batch_size, args.splits, compiled)
    card, rows = torch.cuda.get_device_name(), []
    print(f"{card}, torch {torch.__version__}; {args.model} on {called}")
    with open(args.out, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["card", "torch", *Row._fields])

        def note(row: Row) -> None:
            rows.append(row)
            print(f"{row.what}: {row.detail if row.seconds is None else f'{row.seconds:.3g} s'}", flush=True)
            writer.writerow([card, torch.__version__, *row])
            file.flush()

        parts = {"tests": tests()} if args.tests else {}
        parts |= {"training": training(bench), "NC1": collapse(bench), "DIB": decoders(bench)}
        parts["thesis run"] = thesis_run(bench, args.dib_epochs)
        try:
            for name, part in parts.items():
                for row in rows_of(name, part):
                    note(row)
        finally:
            print(table(card, rows))
    sys.exit(int(any(row.seconds is None for row in rows)))


def table(card: str, rows: list[Row]) -> str:
    """In Markdown."""
    lines = [f"| {card}, torch {torch.__version__} | | seconds | scaled | peak MiB |", "|---|---|---|---|---|"]
    for row in rows:
        figures = ["" if value is None else f"{value:.4g}" for value in row[2:]]
        lines.append(f"| {row.what} | {row.detail} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
