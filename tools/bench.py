"""Compare the speed of the measures and of training with straightforward code, and DIB's probes with their optimum.

`make bench` prints a table and writes bench.csv. ours and reference: the seconds (or bytes) of our code and of the code
it is compared with, measured in alternation. ratio: ours / reference. goal: what should hold. The rows of the part
`probes` differ, and bench_probes describes them. BENCH_ARGS="dib nc1" selects parts.
"""

import argparse
import csv
import io
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import data
import dib
import models
import nc1
import train
from layerwise import devices, processes, schema
from layerwise.probes import BATCH_SIZE, Thesis, Tuned, count_steps, fit
from layerwise.probes.separate import compute_logits_one_by_one
from layerwise.samples import Samples, choose_per_class
from layerwise.streams import Streams
from tools.references import (
    SingleProbe,
    compute_dense_nc1,
    compute_newton_optimum,
    measure_seconds_to_reach,
    train_probe_alone,
)
from training import setup
from training.configuration import parse

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"MNISTNet": (1, 28, 28), "CIFARNet": (3, 32, 32), "ResNet": (3, 32, 32), "ConvNeXt": (3, 32, 32)}
ADAMW = partial(torch.optim.AdamW, lr=2e-3, fused=True)
UNMEASURED = ("--no-nc1", "--no-dib")  # flags of train.py
THREADS = torch.get_num_threads()
BIT = math.log(2)  # nats
PLAIN = {"enumerations": "data", "controls": False}  # of DIB: no more probes than the algorithm as it was first written
T = TypeVar("T")


class Row(NamedTuple):
    """A row of the table and of bench.csv."""

    what: str
    size: str
    ours: float
    reference: float | None
    unit: str
    ratio: float | None
    goal: str | None = None  # "ratio <= 2": of ours, of the ratio, or of the difference, |ours - reference|
    at_least: bool = False  # whether the ratio is only known to be at least this large

    def judge(self) -> str:
        """Return whether the goal is reached, or nothing if there is none."""
        if self.goal is None:
            return ""
        quantity, relation, limit = self.goal.split()
        value = abs(self.ours - self.reference) if quantity == "difference" else getattr(self, quantity)
        reached = value >= float(limit) if relation == ">=" else value <= float(limit)
        return "reached" if reached else "MISSED"

    def format_fields(self, digits: int) -> list[str]:
        """Return the fields of bench.csv, numbers with so many digits."""
        numbers = ["" if x is None else f"{x:.{digits}g}" for x in (self.ours, self.reference, self.ratio)]
        numbers.insert(2, self.unit)
        return [self.what, self.size, *numbers[:3], ">= " * self.at_least + numbers[3], self.goal or "", self.judge()]

    def format_line(self) -> str:
        """Return the row as it is printed."""
        return "{:36} {:58} {:>9} {:>9} {:5} {:>9}  {} {}".format(*self.format_fields(digits=4)).rstrip()


def call_and_time(run: Callable[[], T]) -> tuple[T, float]:
    """Return what the function returns, and the seconds it took."""
    start = train.read_clock(DEVICE)
    result = run()
    return result, train.read_clock(DEVICE) - start


def measure_seconds(run: Callable[[], object]) -> float:
    """Return the seconds that the function takes."""
    return call_and_time(run)[1]


def compare(what: str, size: str, ours: Callable, reference: Callable, goal: float | None) -> Row:
    """Return the row of the medians of three runs of each. They alternate, so that the load on the machine is the same.

    A pair of runs before them does not count, as the first run of a function costs more. If it takes over 20 seconds,
    it is the only one, and counts.
    """
    pairs = [(measure_seconds(ours), measure_seconds(reference))]
    if sum(pairs[0]) < 20:
        pairs = [(measure_seconds(ours), measure_seconds(reference)) for _ in range(3)]
    return make_row_of_medians(what, size, pairs, goal)


def make_row_of_medians(what: str, size: str, pairs: list[tuple[float, float]], goal: float | None) -> Row:
    """Return the row of pairs of seconds, (ours, reference)."""
    a, b = (median(times) for times in zip(*pairs, strict=True))
    return Row(what, size, a, b, "s", a / b, goal and f"ratio <= {goal:.3g}")


def make_problem(name: str, N: int) -> tuple[Callable[[], nn.Sequential], Samples]:
    """Return a function that builds the network, and N samples: of SZT's training set for MLP, else random images."""
    if name == "MLP":
        samples = data.load("SZT", device=DEVICE).train
        last = torch.arange(len(samples) - N, len(samples), device=DEVICE)
        return lambda: models.build("MLP", (12,), 2), Samples(*samples.batch(last))
    shape = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (N, *shape), generator=g, dtype=torch.uint8), torch.arange(N) % 10
    samples = Samples(*(t.to(DEVICE) for t in (x, y, torch.tensor(127.5), torch.tensor(74.0))))
    return lambda: models.build(name, shape, 10).to(memory_format=torch.channels_last), samples


def bench_dib() -> Iterator[Row]:
    """Compare DIB with thesis probes with the same probes, trained one after another as the algorithm is written."""
    cases = [
        ("MLP", 3481, ["hidden1", "hidden2", "hidden3", "hidden4", "hidden5"], 30, 1 / 20),
        ("MNISTNet", 10_000, ["conv2", "hidden1"], 1, 1 / 4),
        ("ResNet", 2000, None, 1, 1 / 1.5),
        ("CIFARNet", 2000, None, 1, 1 / 1.5),
    ]
    for name, N, names, epochs, goal in cases:
        make_model, samples = make_problem(name, N)
        model, C = make_model().to(DEVICE), 2 if name == "MLP" else 10
        splits = list(models.splits(model, names).values())
        x, _ = samples.batch(torch.arange(N, device=DEVICE))
        _, labelings = dib.make_labelings(samples.labels, C, "data", False, 0)

        def measure(model=model, splits=splits, samples=samples, C=C, make_model=make_model, epochs=epochs) -> None:
            dib.measure_splits(model, splits, samples, C, make_model, probes=Thesis(ADAMW, epochs), **PLAIN)

        def train_alone(
            model=model, splits=splits, x=x, labelings=labelings, make_model=make_model, epochs=epochs
        ) -> None:
            for k in splits:
                for labels in labelings:
                    probe, generator = make_model()[k:].to(DEVICE), torch.Generator().manual_seed(0)
                    train_probe_alone(model[:k], probe, x, labels, ADAMW, epochs, 400, generator)

        size = f"N {N}, splits {len(splits)}, probes {len(labelings)}, epochs {epochs}"
        yield compare(f"DIB {name}", size, measure, train_alone, goal)


def bench_nc1() -> Iterator[Row]:
    """Compare NC1 with a forward pass."""
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000), ("CIFARNet", 800), ("ResNet", 2000), ("ConvNeXt", 800)):
        make_model, samples = make_problem(name, N)
        model = make_model().to(DEVICE).eval()

        @torch.no_grad()
        def forward(model=model, samples=samples) -> None:
            for indices in torch.arange(len(samples), device=DEVICE).split(400):
                model(samples.batch(indices)[0])

        for words, cache_bytes, goal in (("cached", devices.CACHE_BYTES, 1.25), ("recomputed", 0, 2.3)):
            C = 2 if name == "MLP" else 10
            ours = partial(nc1.measure, model, models.layers(model), samples, C, 400, cache_bytes)
            yield compare(f"NC1 {name}, {words}", f"N {N}, layers {len(models.layers(model))}", ours, forward, goal)


def has_fashion_mnist(data_dir: str) -> bool:
    """Return whether Fashion-MNIST is in the folder. If not, print a line."""
    try:
        data.load("FashionMNIST", data_dir)
    except ValueError as error:
        print(f"skipped: {error}")
        return False
    return True


def bench_rank(args: argparse.Namespace) -> Iterator[Row]:
    """Compare NC1 of deep saturated networks, as a run writes it, with the dense formula of float64 activations.

    ours: the largest relative difference over layers and sets, or infinity if a rank differs. Singular values of M up
    to 1e-10 of the largest count as 0.
    """
    for nonlinearity in ("Tanh", "ReLU", "Sigmoid") if has_fashion_mnist(args.data_dir) else ():
        flags = ("-d", "FashionMNIST", "--data-dir", args.data_dir, "--train-size", "5000", "--epochs", "8", "--no-dib")
        run, tables = train_network(*flags, "-w", *["10"] * 8, "-nl", nonlinearity)
        model, worst = run.model.double(), 0.0
        for name, samples in run.sets.items():
            found = {row["layer"]: row for row in tables["nc1.csv"] if (row["epoch"], row["set"]) == ("8", name)}
            x, y = samples.batch(torch.arange(len(samples), device=DEVICE))
            h = x.double()
            for layer, block in list(model.named_children())[:-1]:
                h = block(h).detach()
                if layer in found:
                    M = torch.stack([h[y == c].mean(0) for c in range(10)]) - h.mean(0)
                    difference = abs(float(found[layer]["nc1"]) / compute_dense_nc1(h, y, 10, rtol=1e-10) - 1)
                    has_same_rank = int(found[layer]["rank"]) == torch.linalg.matrix_rank(M, rtol=1e-10)
                    worst = max(worst, difference if has_same_rank else math.inf)
        yield Row(f"NC1 {nonlinearity}", "N 5000 and 10000, layers 8, epoch 8", worst, None, "", None, "ours <= 0.001")


def call_in_process(call: str, launch: Iterable[str] = (), **environment: str) -> float:
    """Return the number that a function of this file prints last, in a process of its own.

    call: the function with its arguments, as code. launch: words before the command, which start it.
    """
    command = [*launch, sys.executable, "-c", f"from tools import bench; bench.{call}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return float(done.stdout.splitlines()[-1])


class Wide(nn.Module):
    """A layer with d outputs that needs almost no memory besides them."""

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("weight", torch.rand(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight  # (B, 1) * (d,)


def read_peak_resident_bytes() -> int:
    """Return the peak memory of this program alone. getrusage would include that of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def print_peak_of_nc1(d: int, C: int, N: int) -> None:
    """Print the bytes by which NC1 raises the peak memory of this process (on CUDA, of the device)."""
    samples = Samples(torch.rand(N, 1, device=DEVICE), torch.arange(N, device=DEVICE) % C)
    model = nn.Sequential(Wide(d)).to(DEVICE)
    first = Samples(samples.inputs[:C], samples.labels[:C])
    nc1.measure(model, {"wide": model[0]}, first, C, 1, cache_bytes=0)  # loads libraries
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        nc1.measure(model, {"wide": model[0]}, samples, C, 400, cache_bytes=0)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = read_peak_resident_bytes()
        nc1.measure(model, {"wide": model[0]}, samples, C, 400, cache_bytes=0)
        print(read_peak_resident_bytes() - before)


def bench_memory() -> Iterator[Row]:
    """Compare the peak memory of NC1 with that of a batch of activations and of 2 C d numbers in float64."""
    d, C, N = 100_000, 10, 10_000
    peak = call_in_process(f"print_peak_of_nc1({d}, {C}, {N})")
    floor = 400 * d * 4 + 2 * C * d * 8
    size = f"d {d}, C {C}, N {N}, batch 400"
    yield Row("NC1 peak memory", size, peak / 2**20, floor / 2**20, "MiB", peak / floor, "ratio <= 2")


def print_epoch_seconds(name: str, N: int, *flags: str) -> None:
    """Print the seconds of the training steps in the third epoch of train.py, from its epochs.csv."""
    _, samples = make_problem(name, N)
    images = (samples.inputs.cpu(), samples.labels.cpu()) if name != "MLP" else ()
    data.SOURCES["bench"] = lambda *_: (*images, *images, 10)
    options = ["-m", name, "-d", "bench" if images else "SZT", "--epochs", "3", *UNMEASURED, *flags]
    with tempfile.TemporaryDirectory() as folder:
        train.main([*options, "--run-dir", f"{folder}/run"])
        with (Path(folder) / "run" / "epochs.csv").open() as file:
            print([row for row in csv.DictReader(file) if row["set"] == "train"][-1]["seconds"])


def compare_epoch(what: str, name: str, N: int, B: int, flags: list[str], reference: Callable, goal: float) -> Row:
    """Return the row of an epoch of train.py and of the reference.

    Each epoch of train.py has a process of its own, as train.py chooses the number of its threads.
    """
    pairs = []
    for _ in range(3):
        ours = call_in_process(f"print_epoch_seconds({name!r}, {N}, '-b', '{B}', *{flags})")
        pairs.append((ours, measure_seconds(reference)))
    return make_row_of_medians(what, f"N {N}, batch {B}", pairs, goal)


def bench_step() -> Iterator[Row]:
    """Compare an epoch of train.py with the same steps on a DataLoader. On a GPU also with the steps on one batch."""
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000)):
        make_model, samples = make_problem(name, N)
        x, y = (t.cpu() for t in samples.batch(torch.arange(N, device=DEVICE)))
        model = make_model().to(DEVICE)
        optimizer = ADAMW(model.parameters())
        loader = DataLoader(TensorDataset(x, y), 400, shuffle=True)

        def train_with_loader(model=model, optimizer=optimizer, loader=loader) -> None:
            for inputs, labels in loader:
                loss = F.cross_entropy(model(inputs.to(DEVICE)), labels.to(DEVICE))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        flags = ["--precision", "float32", "--no-compile"]
        yield compare_epoch(f"training epoch {name}", name, N, 400, flags, train_with_loader, 1 / 3)

    if DEVICE.type == "cuda":
        N, B = 20_000, 2000
        make_model, samples = make_problem("CIFARNet", N)
        model = make_model().to(DEVICE)
        optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
        network = torch.compile(model, dynamic=False)
        x, y = samples.batch(torch.arange(B, device=DEVICE))

        def train_on_one_batch() -> None:
            for _ in range(N // B):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        train_on_one_batch()  # compiles
        flags = ["--precision", "bfloat16", "--compile"]
        yield compare_epoch("training epoch CIFARNet", "CIFARNet", N, B, flags, train_on_one_batch, 1.1)


def bench_layout() -> Iterator[Row]:
    """Compare a training step of probes that are not MLPs, run one by one with channels last, with two other ways.

    These are the same with channels first, and one network of grouped convolutions, which vmap makes of the probes.
    """
    J, B = 4, 100
    for name in ("ResNet", "CIFARNet"):
        make_model, samples = make_problem(name, B)
        x, y = samples.batch(torch.arange(B, device=DEVICE))
        y = y.expand(J, -1)  # (J, B)

        def make_step(forward: Callable, params: list[torch.Tensor], y=y) -> Callable:
            optimizer = ADAMW([p for p in params if p.requires_grad])

            def step() -> None:
                loss = F.cross_entropy(forward(), y, reduction="none").mean(1)
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()

            return step

        def run_one_by_one(layout: torch.memory_format, make_model=make_model, x=x, make_step=make_step) -> Callable:
            nets = [make_model().to(DEVICE).to(memory_format=layout) for _ in range(J)]
            z = x.contiguous(memory_format=layout)
            params = [p for net in nets for p in net.parameters()]
            return make_step(lambda: compute_logits_one_by_one(nets, z), params)

        def run_grouped(make_model=make_model, x=x, make_step=make_step) -> Callable:
            nets = [make_model().to(DEVICE) for _ in range(J)]
            params, buffers = torch.func.stack_module_state(nets)
            params = {n: p.detach().requires_grad_(nets[0].get_parameter(n).requires_grad) for n, p in params.items()}
            forward = torch.func.vmap(partial(torch.func.functional_call, nets[0]), in_dims=((0, 0), None))
            return make_step(lambda: forward((params, buffers), (x.clone(),)).transpose(1, 2), list(params.values()))

        ours, size = run_one_by_one(torch.channels_last), f"probes {J}, batch {B}"
        channels_first = run_one_by_one(torch.contiguous_format)
        yield compare(f"step {name}, vs first", size, ours, channels_first, None)
        yield compare(f"step {name}, vs grouped", size, ours, run_grouped(), None)


def bench_growth() -> Iterator[Row]:
    """Compare the seconds at N and at 4 N. ratio: the exponent e of time ~ N^e."""

    def fit_exponent(what: str, sizes: list[int], prepare: Callable[[int], Callable]) -> Row:
        runs = [prepare(N) for N in sizes]
        for run in runs:
            run()
        times = [
            median(column) for column in zip(*([measure_seconds(run) for run in runs] for _ in range(3)), strict=True)
        ]
        logs = [math.log(sizes[-1] / sizes[0]), math.log(times[-1] / times[0])]
        size = "N " + " ".join(map(str, sizes))
        return Row(f"growth of {what}", size, times[-1], times[0], "s", logs[1] / logs[0], "ratio <= 1.1")

    def prepare_nc1(N: int) -> Callable:
        make_model, samples = make_problem("MNISTNet", N)
        model = make_model().to(DEVICE)
        return partial(nc1.measure, model, models.layers(model), samples, 10)

    def prepare_dib(N: int) -> Callable:
        make_model, samples = make_problem("MNISTNet", N)
        return partial(dib.measure, make_model().to(DEVICE), 2, samples, 10, make_model, probes=Thesis(ADAMW, 1))

    yield fit_exponent("NC1 MNISTNet", [1000, 2000, 4000], prepare_nc1)
    yield fit_exponent("DIB MNISTNet", [1000, 2000, 4000], prepare_dib)


def print_dib_seconds() -> None:
    """Print the seconds of DIB of MLP on SZT. The processes of torchrun share it, on one CPU thread each."""
    torch.set_num_threads(1)
    processes.join_group()
    make_model, samples = make_problem("MLP", 3481)
    torch.manual_seed(0)
    model = make_model()
    splits = list(models.splits(model).values())[1:]
    measure = partial(dib.measure_splits, model, splits, samples, 2, make_model, probes=Thesis(ADAMW))
    times = [measure_seconds(measure) for _ in range(4)]
    if processes.get_rank() == 0:
        print(median(times[1:]))
    processes.leave_group()


def bench_processes() -> Iterator[Row]:
    """Compare DIB in two processes, which share the probes, with DIB in one."""

    def run(count: int) -> float:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--no-python"]
        return call_in_process("print_dib_seconds()", launch, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

    pairs = [(run(2), run(1)) for _ in range(3)]
    size = "N 3481, splits 5, probes 12, epochs 30"
    yield make_row_of_medians("DIB MLP, two processes", size, pairs, 1 / 1.7)


def train_network(*options: str) -> tuple[setup.Run, dict[str, list[dict]]]:
    """Run train.py, and return the run with its trained network, in eval mode, and the rows of its tables."""
    torch.set_num_threads(THREADS)  # train.py uses one thread for a small model, and the measures then do so too
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        options, tables = [*options, "--run-dir", f"{folder}/run"], {}
        train.main(options)
        run, _ = setup.prepare_run(parse(options))
        state = torch.load(f"{folder}/run/checkpoint.pt", map_location=DEVICE, weights_only=True)
        for name in schema.COLUMNS:
            with open(f"{folder}/run/{name}") as file:
                tables[name] = list(csv.DictReader(file))
    run.model.load_state_dict(state["model"])
    run.model.eval()
    return run, tables


def find_reference(find: Callable[[Tuned, int], torch.Tensor], steps: int, slow: bool) -> torch.Tensor:
    """Return the smallest values that more steps and, if slow, more seeds find.

    find(kind, seed): returns the losses or the values of `upper` of probes.
    """
    if not slow:
        return find(Tuned(4 * steps), 0)
    return torch.stack([find(Tuned(16 * steps), seed) for seed in range(4)]).amin(0)


def describe_reference(slow: bool) -> str:
    """Return how find_reference trains its probes, in words."""
    return "16 x the steps, 4 x the starts" if slow else "4 x the steps"


def collect_uppers(measured: dict[int, list[dib.ProbeResult]]) -> torch.Tensor:
    """Return `upper` of all probes, (splits, J), in nats."""
    return torch.tensor([[probe.upper for probe in of_split] for of_split in measured.values()], dtype=torch.float64)


def compute_optima(model: nn.Sequential, k: int, samples: Samples, labelings: torch.Tensor) -> list[float]:
    """Return H_V of the split at k, whose decoder is linear, for each of the labelings (J, N), in nats."""
    with torch.no_grad():
        z = model[:k](samples.batch(torch.arange(len(samples), device=DEVICE))[0])
    return [compute_newton_optimum(z, labels) for labels in labelings]


def compare_information(
    what: str, size: str, of_split: list[dib.ProbeResult], known: Iterable[float], goal: str
) -> Iterator[Row]:
    """Yield rows of the mean information of probes: by `upper`, as figures show it, and by their own losses.

    known: H_V of each labeling, or the smallest value that it is known not to exceed, in nats.
    """
    reference = mean(probe.entropy - float(value) for probe, value in zip(of_split, known, strict=True)) / BIT
    by_upper, by_loss = (mean(p.entropy - getattr(p, by) for p in of_split) / BIT for by in ("upper", "loss"))
    yield Row(what, size, by_upper, reference, "bits", by_upper / reference, goal)
    yield Row(f"{what}, by loss", size, by_loss, reference, "bits", by_loss / reference)


def compare_time(
    what: str,
    run: setup.Run,
    members: list[tuple[int, torch.Tensor]],
    mean_loss: float,
    ours: float,
    goal: str,
) -> Row:
    """Return the row of the seconds until probes reach a mean loss: ours, and those of the algorithm as written.

    members: the split k and the labels of each probe. The algorithm is stopped at 20 times our seconds. The ratio,
    reference / ours, is then 20 at least.
    """
    samples = run.sets["train"]
    x, _ = samples.batch(torch.arange(len(samples), device=DEVICE))
    torch.manual_seed(0)
    singles = [
        SingleProbe(
            run.model[:k], run.make_model()[k:].to(DEVICE), x, labels, ADAMW, 400, torch.Generator().manual_seed(0)
        )
        for k, labels in members
    ]
    read_clock = partial(train.read_clock, DEVICE)
    theirs, loss, epochs = measure_seconds_to_reach(mean_loss, 20 * ours, singles, read_clock)
    stopped = not loss <= mean_loss  # also if the loss is NaN
    size = f"probes {len(members)}, mean loss {mean_loss:.4f} nats, theirs {loss:.4f}, epochs {epochs}"
    return Row(f"{what}, time", size, ours, theirs, "s", 20 if stopped else theirs / ours, goal, stopped)


def bench_probes_of_mlp(slow: bool) -> Iterator[Row]:
    """Compare the probes of MLP on SZT."""
    run, _ = train_network(*UNMEASURED)
    model, samples = run.model, run.sets["train"]
    splits = models.splits(model)
    keys, labelings = dib.make_labelings(samples.labels, 2, "data", False, 0)
    steps = count_steps(30, len(samples))

    def measure(
        kind: Tuned, seed: int = 0, splits: Iterable[int] = splits.values()
    ) -> dict[int, list[dib.ProbeResult]]:
        return dib.measure_splits(model, splits, samples, 2, run.make_model, probes=kind, seed=seed, epoch=15, **PLAIN)

    measured = measure(Tuned(steps))
    least = find_reference(lambda *of_run: collect_uppers(measure(*of_run)), steps, slow)
    known = dict(zip(splits, least, strict=True))
    size = f"N {len(samples)}, steps {steps}, beside {describe_reference(slow)}"
    of_split = measured[splits["hidden1"]]
    what = "SZT sufficiency hidden1"
    yield from compare_information(what, size, of_split[:1], known["hidden1"][:1], "ours >= 0.70")
    for name in ("input", "hidden1", "hidden2"):
        of_split = measured[splits[name]]
        yield from compare_information(f"SZT minimality {name}", size, of_split[1:], known[name][1:], "ratio >= 0.70")

    k = splits["hidden5"]
    optima = compute_optima(model, k, samples, labelings)
    loss, optimum = max(
        ((probe.loss, optimum) for probe, optimum in zip(measured[k], optima, strict=True)),
        key=lambda pair: pair[0] - pair[1],
    )
    size = f"N {len(samples)}, the worst of {len(keys)}, beside the exact optimum"
    yield Row("SZT loss hidden5", size, loss / BIT, optimum / BIT, "bits", loss / optimum, "difference <= 0.001")

    hidden = [k for k in splits.values() if k > 0]
    measured, ours = call_and_time(lambda: measure(Tuned(steps), splits=hidden))
    mean_loss = mean(probe.loss for of_split in measured.values() for probe in of_split)
    members = [(k, labels) for k in hidden for labels in labelings]
    yield compare_time("SZT", run, members, mean_loss, ours, "ratio >= 20")


def bench_suboptimal_probes() -> Iterator[Row]:
    """Yield the shares of probes of a run with default flags whose losses are more than schema.SUBOPTIMAL above others.

    These are the losses of the network, of the probes of deeper splits, and of constants.
    """
    _, tables = train_network()
    for name in ("train", "test"):
        own = {row["epoch"]: float(row["loss"]) for row in tables["epochs.csv"] if row["set"] == name}
        found: dict[str, list[tuple[float, float]]] = {"the network": [], "a deeper split": [], "a constant": []}
        deeper: dict[tuple[str, str], float] = {}  # the smallest loss so far, by epoch and labeling
        for row in reversed(tables["dib.csv"]):  # splits are in order of depth
            if row["set"] != name or row["labeling"] == schema.HELD_OUT:
                continue
            key, loss = (row["epoch"], row["labeling"]), float(row["loss"])
            found["a constant"].append((loss, float(row["entropy"])))
            if row["labeling"] == "y":
                found["the network"].append((loss, own[row["epoch"]]))
            if key in deeper:
                found["a deeper split"].append((loss, deeper[key]))
            deeper[key] = min(loss, deeper.get(key, math.inf))
        for what, pairs in found.items():
            share = mean(not loss - known <= schema.SUBOPTIMAL for loss, known in pairs)  # counts a loss that is NaN
            size = f"{name} set, probes {len(pairs)}"
            yield Row(f"SZT suboptimal by {what}", size, share, None, "share", None, "ours <= 0.05")


def bench_probes_of_mnistnet(data_dir: str, slow: bool) -> Iterator[Row]:
    """Compare the probes of MNISTNet on 5,000 images of Fashion-MNIST."""
    if not has_fashion_mnist(data_dir):
        return
    flags = ("-d", "FashionMNIST", "--data-dir", data_dir, "--train-size", "5000")
    run, _ = train_network("-m", "MNISTNet", *flags, "--epochs", "4", *UNMEASURED)
    model, samples = run.model, run.sets["train"]
    splits = models.splits(model, ["conv2", "hidden1"])
    _, labelings = dib.make_labelings(samples.labels, 10, "data", False, 0)
    steps = count_steps(30, len(samples))

    def measure(
        kind: Tuned, seed: int = 0, splits: Iterable[int] = splits.values()
    ) -> dict[int, list[dib.ProbeResult]]:
        return dib.measure_splits(model, splits, samples, 10, run.make_model, probes=kind, seed=seed, epoch=4, **PLAIN)

    measured, ours = call_and_time(lambda: measure(Tuned(steps)))
    k = splits["conv2"]
    (known,) = find_reference(lambda *of_run: collect_uppers(measure(*of_run, splits=[k])), steps, slow)
    size = f"N {len(samples)}, steps {steps}, beside {describe_reference(slow)}"
    yield from compare_information("MNISTNet minimality conv2", size, measured[k][1:], known[1:], "ours >= 1.5")
    k = splits["hidden1"]
    size, what = f"N {len(samples)}, beside the exact optimum", "MNISTNet minimality hidden1"
    optima = compute_optima(model, k, samples, labelings[1:])
    yield from compare_information(what, size, measured[k][1:], optima, "difference <= 0.005")
    mean_loss = mean(probe.loss for of_split in measured.values() for probe in of_split)
    members = [(k, labels) for k in splits.values() for labels in labelings]
    yield compare_time("MNISTNet", run, members, mean_loss, ours, "ratio >= 20")


def load_cifar_images(args: argparse.Namespace) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Return a name for the images, 1,000 training images of CIFAR-10, 100 of each class, and their labels."""
    if args.cifar_npz:
        arrays = np.load(args.cifar_npz)
        files, ends, y = arrays["train_jpeg"], arrays["train_offsets"], torch.from_numpy(arrays["train_labels"]).long()
        chosen = choose_per_class(y, [100] * 10).nonzero().flatten()
        images = [Image.open(io.BytesIO(files[ends[i] : ends[i + 1]].tobytes())) for i in chosen.tolist()]
        x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
        return "CIFAR-10 (JPEG)", x, y[chosen]
    x, y, *_ = data.images.load("CIFAR10", args.data_dir, False)
    chosen = choose_per_class(y, [100] * 10)
    return "CIFAR-10", x[chosen], y[chosen]


def fit_probes(run: setup.Run, k: int, labelings: torch.Tensor, kind: Tuned | Thesis, seed: int = 0) -> torch.Tensor:
    """Return the losses (J,) of the probes of one split for these labelings (J, N) only, in nats.

    labelings: the original labels first. dib.measure_splits would fit the probes of all labelings.
    """
    streams, samples = Streams(seed, 0, DEVICE), run.sets["train"]
    task = dib.make_task(run.model, [k], samples, run.config.num_classes, labelings, run.make_model, streams)
    return fit(task, kind, batch_size=BATCH_SIZE, cache_bytes=devices.CACHE_BYTES).losses[0]


def bench_convolutional_probes(args: argparse.Namespace) -> Iterator[Row]:
    """Compare the probes of CIFARNet and ResNet on 1,000 images of CIFAR-10."""
    try:
        name_of_images, x, y = load_cifar_images(args)
    except (ValueError, OSError) as error:
        print(f"skipped: {error}")
        return
    data.SOURCES["bench"] = lambda *_: (x, y, x, y, 10)
    cases = [
        ("CIFARNet", "group2", (0.12, 0.40), "ratio >= 20"),
        ("ResNet", "block6", (0.005, 0.01), "ratio >= 5"),
    ]
    for name, split, goals, goal in cases:
        run, _ = train_network("-m", name, "-d", "bench", *UNMEASURED)
        k, samples = models.splits(run.model, [split])[split], run.sets["train"]
        keys, labelings = dib.make_labelings(samples.labels, 10, "data", False, 0)
        labelings = labelings[[keys.index((0, labeling)) for labeling in ("y", 1)]]
        fit_kind = partial(fit_probes, run, k, labelings)
        found, ours = call_and_time(partial(fit_kind, Tuned(30)))
        thesis = fit_kind(Thesis(ADAMW, 10))  # 30 steps as well
        known = find_reference(fit_kind, 30, args.slow)
        size = f"{name_of_images} {len(samples)}, steps 30, beside {describe_reference(args.slow)}"
        for j, labeling in enumerate(("y", "digit 1")):
            for kind, losses, most in (("", found, f"ours <= {goals[j]}"), (", thesis", thesis, None)):
                loss, least = losses[j].item(), known[j].item()
                ratio = loss / least if least else None  # float32 losses can be exactly 0
                yield Row(f"{name} loss {split}, {labeling}{kind}", size, loss, least, "nats", ratio, most)
        members = [(k, labels) for labels in labelings]
        yield compare_time(f"{name} {split}", run, members, found.mean().item(), ours, goal)


class AdamProbes(Tuned):
    """Tuned probes whose parameters all take steps of Adam. MLPs of any width have several starts."""

    WIDE = math.inf


class AdamProbesOfOneStart(AdamProbes):
    """The same, from one start."""

    STARTS = ((1, 1.0),)


def compare_at_equal_seconds(
    what: str, size: str, fit_kind: Callable[[Tuned], torch.Tensor], before: Tuned, goal: str
) -> Row:
    """Return the row of the mean loss of tuned probes, beside that of probes trained by Adam in about the same time.

    On a CPU it is the time of the processor, without that of other programs.
    """

    def fit_and_time(kind: Tuned) -> tuple[float, float]:
        clock = time.process_time if DEVICE.type == "cpu" else partial(train.read_clock, DEVICE)
        start = clock()
        return fit_kind(kind).mean().item(), clock() - start

    known, theirs = fit_and_time(before)
    few, more = max(1, before.steps // 6), max(2, before.steps // 3)
    (_, a), (_, b) = (fit_and_time(Tuned(trial)) for trial in (few, more))
    steps = more + max(0, int((theirs - b) * (more - few) / (b - a)))  # the time grows linearly
    loss, ours = fit_and_time(Tuned(steps))
    size = f"{size}, {steps} steps in {ours:.1f} s, Adam {before.steps} in {theirs:.1f} s"
    return Row(what, size, loss, known, "nats", loss / known, goal)


def bench_orthogonalised_steps(args: argparse.Namespace) -> Iterator[Row]:
    """Compare orthogonalised steps with those of Adam in the same time, on one thread, for y and two digits."""
    if not has_fashion_mnist(args.data_dir):
        return
    cases = [
        ("CIFARNet", 1000, "group2", AdamProbes(20), "ratio <= 0.65"),
        ("ResNet", 1000, "block6", AdamProbes(30), "ratio <= 0.2"),
        ("MNISTNet", 2000, "conv2", AdamProbesOfOneStart(300), "ratio <= 0.1"),
        ("MNISTNet", 2000, "conv1", AdamProbes(60), "ratio <= 0.1"),
    ]
    x, y, *_ = data.images.load("FashionMNIST", args.data_dir, False)
    for name, N, split, before, goal in cases:
        chosen = choose_per_class(y, [N // 10] * 10)
        data.SOURCES["bench"] = lambda *_, chosen=chosen: (x[chosen], y[chosen], x[chosen], y[chosen], 10)
        run, _ = train_network("-m", name, "-d", "bench", *UNMEASURED)
        torch.set_num_threads(1)
        _, labelings = dib.make_labelings(run.sets["train"].labels, 10, 1, False, 0)
        fit_kind = partial(fit_probes, run, models.splits(run.model, [split])[split], labelings[:3])
        what = f"{name} mean loss {split}"
        yield compare_at_equal_seconds(what, f"Fashion-MNIST {N}", fit_kind, before, goal)


def bench_probes(args: argparse.Namespace) -> Iterator[Row]:
    """Compare the quality of DIB's probes with the optimum, and their time with that of the algorithm as written.

    ours: an information, a loss or a share. reference: the same by the exact optimum if the decoder is linear. For
    other decoders it is what 4 times the steps find (--slow: the smallest loss of 16 times the steps and 4 seeds). Rows
    of time have the seconds until the probes reach the same mean loss, and their ratio is reference / ours. This part
    takes over an hour, because the algorithm as written runs for up to 20 times our seconds. With --slow it takes
    many hours.
    """
    yield from bench_probes_of_mlp(args.slow)
    yield from bench_suboptimal_probes()
    yield from bench_probes_of_mnistnet(args.data_dir, args.slow)
    yield from bench_convolutional_probes(args)
    yield from bench_orthogonalised_steps(args)
    torch.set_num_threads(THREADS)


PARTS = {
    "nc1": bench_nc1,
    "memory": bench_memory,
    "rank": bench_rank,
    "step": bench_step,
    "growth": bench_growth,
    "layout": bench_layout,
    "processes": bench_processes,
    "dib": bench_dib,
    "probes": bench_probes,
}
NEED_IMAGES = ("rank", "probes")  # real ones, in the folder that a flag names


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("parts", nargs="*", help=f"some of {', '.join(PARTS)} (all)")
    flag("--data-dir", default="datasets", metavar="DIR", help="the images of rank and probes (%(default)s)")
    flag("--cifar-npz", metavar="FILE", help="CIFAR-10's training images as JPEG files, in place of --data-dir's")
    flag("--slow", action="store_true", help="compare probes with 4 runs of 16 times the steps, not one of 4 times")
    return parser


@devices.disable_tf32()
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected some of {', '.join(PARTS)}")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{THREADS} CPU threads"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    with open("bench.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields[:7], "verdict"])
        for part in args.parts or PARTS:
            for row in PARTS[part](args) if part in NEED_IMAGES else PARTS[part]():
                print(row.format_line(), flush=True)
                writer.writerow(row.format_fields(digits=6))
                file.flush()


if __name__ == "__main__":
    main()
