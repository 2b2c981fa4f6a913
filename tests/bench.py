"""How fast the measures and the training step are, as ratios to plain code timed in turn: `make bench`.

Prints a table and writes bench.csv. ratio: seconds (or bytes) of ours over the yardstick's; goal: the largest ratio to
accept, where there is one. BENCH_ARGS="dib nc1" runs a part.
"""

import argparse
import csv
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import data
import dib
import models
import nc1
import ranks
import train
from tests.toys import Toy
from tests.yardsticks import train_alone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"MNISTNet": (1, 28, 28), "CIFARNet": (3, 32, 32), "ResNet": (3, 32, 32), "ConvNeXt": (3, 32, 32)}
ADAMW = partial(torch.optim.AdamW, lr=2e-3, fused=True)
COLUMNS = "what,size,ours,yardstick,unit,ratio,goal"
Row = tuple[str, str, float, float, str, float, float | None]


def seconds(run: Callable[[], object]) -> float:
    start = train.clock(DEVICE)
    run()
    return train.clock(DEVICE) - start


def compare(what: str, size: str, ours: Callable, yardstick: Callable, goal: float | None) -> Row:
    """Medians of three runs of each, taken in turn, so that both see the same machine.

    A pair goes before them, as the first one costs more; where it takes over 20 seconds, it stands for all.
    """
    pairs = [(seconds(ours), seconds(yardstick))]
    if sum(pairs[0]) < 20:
        pairs = [(seconds(ours), seconds(yardstick)) for _ in range(3)]
    return medians(what, size, pairs, goal)


def medians(what: str, size: str, pairs: list[tuple[float, float]], goal: float | None) -> Row:
    """The row of pairs of seconds, (ours, yardstick)."""
    a, b = (median(times) for times in zip(*pairs, strict=True))
    return what, size, a, b, "s", a / b, goal


def setting(name: str, N: int) -> tuple[Callable[[], nn.Sequential], data.Split]:
    """A constructor and a split: SZT's training set for MLP, else N random images."""
    if name == "MLP":
        split = data.load("SZT", device=DEVICE).train
        subset = torch.arange(len(split) - N, len(split), device=DEVICE)
        return lambda: models.build("MLP", (12,), 2), Toy(*split.batch(subset))
    shape = SHAPES[name]
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(0, 256, (N, *shape), generator=g, dtype=torch.uint8), torch.arange(N) % 10
    split = data.Split(*(t.to(DEVICE) for t in (x, y, torch.tensor(127.5), torch.tensor(74.0))))
    return lambda: models.build(name, shape, 10).to(memory_format=torch.channels_last), split


def bench_dib() -> Iterator[Row]:
    cases = [
        ("MLP", 3481, ["hidden1", "hidden2", "hidden3", "hidden4", "hidden5"], 30, 1 / 20),
        ("MNISTNet", 10_000, ["conv2", "hidden1"], 1, 1 / 4),
        ("ResNet", 2000, None, 1, 1 / 1.5),
        ("CIFARNet", 2000, None, 1, 1 / 1.5),
    ]
    for name, N, names, epochs, goal in cases:
        build, split = setting(name, N)
        model, C = build().to(DEVICE), 2 if name == "MLP" else 10
        ks = list(models.splits(model, names).values())
        x, _ = split.batch(torch.arange(N, device=DEVICE))
        _, targets = dib.label(split.labels, C, labelings=1, seed=0)

        def ours(model=model, ks=ks, split=split, C=C, build=build, epochs=epochs) -> None:
            dib.measure_splits(model, ks, split, C, build, ADAMW, epochs)

        def yardstick(model=model, ks=ks, x=x, targets=targets, build=build, epochs=epochs) -> None:
            for k in ks:
                for target in targets:
                    head = build()[k:].to(DEVICE)
                    train_alone(model[:k], head, x, target, ADAMW, epochs, 400, torch.Generator().manual_seed(0))

        size = f"N {N}, splits {len(ks)}, heads {len(targets)}, epochs {epochs}"
        yield compare(f"DIB {name}", size, ours, yardstick, goal)


def bench_nc1() -> Iterator[Row]:
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000), ("CIFARNet", 800), ("ResNet", 2000), ("ConvNeXt", 800)):
        build, split = setting(name, N)
        model = build().to(DEVICE).eval()

        @torch.no_grad()
        def forward(model=model, split=split) -> None:
            for indices in torch.arange(len(split), device=DEVICE).split(400):
                model(split.batch(indices)[0])

        for words, keep_bytes, goal in (("kept", nc1.KEEP_BYTES, 1.25), ("recomputed", 0, 2.3)):
            C = 2 if name == "MLP" else 10
            ours = partial(nc1.measure, model, models.taps(model), split, C, 400, keep_bytes)
            yield compare(f"NC1 {name}, {words}", f"N {N}, taps {len(models.taps(model))}", ours, forward, goal)


def last_line(call: str, launch: Iterable[str] = (), **environment: str) -> float:
    """The number that a function of this file prints last, in a process of its own, started by launch."""
    command = [*launch, sys.executable, "-c", f"from tests import bench; bench.{call}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    return float(done.stdout.splitlines()[-1])


class Wide(nn.Module):
    """A layer of d outputs that needs next to no memory beside them."""

    def __init__(self, d: int):
        super().__init__()
        self.register_buffer("weight", torch.rand(d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight  # (B, 1) * (d,)


def peak_resident_bytes() -> int:
    """Of this program alone: getrusage would count what the process that started it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def peak_of_nc1(d: int, C: int, N: int) -> None:
    """Print the bytes by which NC1 raises the peak memory of this process (on CUDA, of the device)."""
    split, model = Toy(torch.rand(N, 1, device=DEVICE), torch.arange(N, device=DEVICE) % C), nn.Sequential(Wide(d))
    model.to(DEVICE)
    nc1.measure(model, {"wide": model[0]}, Toy(split.x[:C], split.labels[:C]), C, 1, keep_bytes=0)  # loads libraries
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        nc1.measure(model, {"wide": model[0]}, split, C, 400, keep_bytes=0)
        print(torch.cuda.max_memory_allocated() - before)
    else:
        before = peak_resident_bytes()
        nc1.measure(model, {"wide": model[0]}, split, C, 400, keep_bytes=0)
        print(peak_resident_bytes() - before)


def bench_memory() -> Iterator[Row]:
    d, C, N = 100_000, 10, 10_000
    peak = last_line(f"peak_of_nc1({d}, {C}, {N})")
    floor = 400 * d * 4 + 2 * C * d * 8
    yield "NC1 peak memory", f"d {d}, C {C}, N {N}, batch 400", peak / 2**20, floor / 2**20, "MiB", peak / floor, 2


def training_epoch(name: str, N: int, *flags: str) -> None:
    """Print the seconds of the training steps of train.py's third epoch, as its epochs.csv has them."""
    _, split = setting(name, N)
    images = (split.inputs.cpu(), split.labels.cpu()) if name != "MLP" else ()
    data.SOURCES["bench"] = lambda *_: (*images, *images, 10)
    options = ["-m", name, "-d", "bench" if images else "SZT", "--epochs", "3", "--no-nc1", "--no-dib", *flags]
    with tempfile.TemporaryDirectory() as folder:
        train.main([*options, "--run-dir", f"{folder}/run"])
        with (Path(folder) / "run" / "epochs.csv").open() as file:
            print([row for row in csv.DictReader(file) if row["set"] == "train"][-1]["seconds"])


def in_turn(what: str, name: str, N: int, B: int, flags: list[str], yardstick: Callable, goal: float) -> Row:
    """train.py's epoch, each in a process of its own, as it chooses how many threads it runs on, and the yardstick."""
    pairs = []
    for _ in range(3):
        ours = last_line(f"training_epoch({name!r}, {N}, '-b', '{B}', *{flags})")
        pairs.append((ours, seconds(yardstick)))
    return medians(what, f"N {N}, batch {B}", pairs, goal)


def bench_step() -> Iterator[Row]:
    """An epoch of train.py beside the same steps on a DataLoader; on a GPU beside the steps alone, on one batch."""
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000)):
        build, split = setting(name, N)
        x, y = (t.cpu() for t in split.batch(torch.arange(N, device=DEVICE)))
        model = build().to(DEVICE)
        optimizer = ADAMW(model.parameters())
        loader = DataLoader(TensorDataset(x, y), 400, shuffle=True)

        def with_loader(model=model, optimizer=optimizer, loader=loader) -> None:
            for inputs, labels in loader:
                loss = F.cross_entropy(model(inputs.to(DEVICE)), labels.to(DEVICE))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        flags = ["--precision", "float32", "--no-compile"]
        yield in_turn(f"training epoch {name}", name, N, 400, flags, with_loader, 1 / 3)

    if DEVICE.type == "cuda":
        N, B = 20_000, 2000
        build, split = setting("CIFARNet", N)
        model = build().to(DEVICE)
        optimizer = ADAMW([p for p in model.parameters() if p.requires_grad])
        network = torch.compile(model, dynamic=False)
        x, y = split.batch(torch.arange(B, device=DEVICE))

        def alone() -> None:
            for _ in range(N // B):
                with torch.autocast("cuda", torch.bfloat16):
                    loss = F.cross_entropy(network(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        alone()  # compiles
        flags = ["--precision", "bfloat16", "--compile"]
        yield in_turn("training epoch CIFARNet", "CIFARNet", N, B, flags, alone, 1.1)


def bench_heads() -> Iterator[Row]:
    """A training step of heads that are not plain, as dib.train takes it, a loop over them with channels last, beside
    the loop with channels first and beside one network of grouped convolutions, which vmap makes of them."""
    J, B = 4, 100
    for name in ("ResNet", "CIFARNet"):
        build, split = setting(name, B)
        x, y = split.batch(torch.arange(B, device=DEVICE))
        y = y.expand(J, -1)  # (J, B)

        def step(forward: Callable, params: list[torch.Tensor], y=y) -> Callable:
            optimizer = ADAMW([p for p in params if p.requires_grad])

            def once() -> None:
                loss = F.cross_entropy(forward(), y, reduction="none").mean(1)
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()

            return once

        def loop(layout: torch.memory_format, build=build, x=x, step=step) -> Callable:
            heads = [build().to(DEVICE).to(memory_format=layout) for _ in range(J)]
            z = x.contiguous(memory_format=layout)
            return step(lambda: heads.one_by_one(heads, {0: z}), [p for head in heads for p in head.parameters()])

        def grouped(build=build, x=x, step=step) -> Callable:
            heads = [build().to(DEVICE) for _ in range(J)]
            params, buffers = torch.func.stack_module_state(heads)
            params = {n: p.detach().requires_grad_(heads[0].get_parameter(n).requires_grad) for n, p in params.items()}
            forward = torch.func.vmap(partial(torch.func.functional_call, heads[0]), in_dims=((0, 0), None))
            return step(lambda: forward((params, buffers), (x.clone(),)).transpose(1, 2), list(params.values()))

        ours, size = loop(torch.channels_last), f"heads {J}, batch {B}"
        yield compare(f"step {name}, vs first", size, ours, loop(torch.contiguous_format), None)
        yield compare(f"step {name}, vs grouped", size, ours, grouped(), None)


def bench_growth() -> Iterator[Row]:
    """Seconds at N and 4 N (with 2 N between); ratio: the exponent e of time ~ N^e."""

    def exponent(what: str, sizes: list[int], run: Callable[[int], Callable]) -> Row:
        runs = [run(N) for N in sizes]
        for once in runs:
            once()
        times = [median(column) for column in zip(*([seconds(once) for once in runs] for _ in range(3)), strict=True)]
        logs = [math.log(sizes[-1] / sizes[0]), math.log(times[-1] / times[0])]
        return f"growth of {what}", "N " + " ".join(map(str, sizes)), times[-1], times[0], "s", logs[1] / logs[0], 1.1

    def nc1_of(N: int) -> Callable:
        build, split = setting("MNISTNet", N)
        model = build().to(DEVICE)
        return partial(nc1.measure, model, models.taps(model), split, 10)

    def dib_of(N: int) -> Callable:
        build, split = setting("MNISTNet", N)
        return partial(dib.measure, build().to(DEVICE), 2, split, 10, build, ADAMW, 1)

    yield exponent("NC1 MNISTNet", [1000, 2000, 4000], nc1_of)
    yield exponent("DIB MNISTNet", [1000, 2000, 4000], dib_of)


def dib_on_ranks() -> None:
    """Print the seconds of DIB of MLP on SZT, shared by the processes of torchrun on one CPU thread each."""
    torch.set_num_threads(1)
    ranks.join()
    build, split = setting("MLP", 3481)
    torch.manual_seed(0)
    model = build()
    ks = list(models.splits(model).values())[1:]
    times = [seconds(lambda: dib.measure_splits(model, ks, split, 2, build, ADAMW)) for _ in range(4)]
    if ranks.rank() == 0:
        print(median(times[1:]))
    ranks.leave()


def bench_ranks() -> Iterator[Row]:
    """Two processes beside one; DIB's heads are shared."""

    def run(processes: int) -> float:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--no-python"]
        return last_line("dib_on_ranks()", launch, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

    pairs = [(run(2), run(1)) for _ in range(3)]
    yield medians("DIB MLP, two processes", "N 3481, splits 5, heads 12, epochs 30", pairs, 1 / 1.7)


PARTS = {
    "nc1": bench_nc1,
    "memory": bench_memory,
    "step": bench_step,
    "growth": bench_growth,
    "heads": bench_heads,
    "ranks": bench_ranks,
    "dib": bench_dib,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)} (all)")
    parts = parser.parse_args().parts or list(PARTS)
    for part in parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}: expected some of {', '.join(PARTS)}")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{name}, torch {torch.__version__}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}")
    with open("bench.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS.split(","))
        for part in parts:
            for what, size, ours, yardstick, unit, ratio, goal in PARTS[part]():
                verdict = "" if goal is None else f"<= {goal:.3f} {'reached' if ratio <= goal else 'MISSED'}"
                print(f"{what:24} {size:42} {ours:9.4g} {yardstick:9.4g} {unit:4} {ratio:7.3f} {verdict}")
                sys.stdout.flush()
                numbers = [f"{number:.6g}" for number in (ours, yardstick)]
                writer.writerow([what, size, *numbers, unit, f"{ratio:.4g}", "" if goal is None else f"{goal:.4g}"])
                file.flush()


if __name__ == "__main__":
    main()
