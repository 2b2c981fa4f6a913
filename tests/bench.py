"""How fast the measures and the training step are, as ratios to plain code timed in turn: `make bench`.

Prints a table and writes bench.csv. ratio: seconds (or bytes) of ours over the yardstick's, medians both; goal:
the largest ratio to accept. BENCH_ARGS="dib nc1" runs a part.
"""

import argparse
import csv
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
import train
from tests.toys import Toy
from tests.yardsticks import train_alone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"MNISTNet": (1, 28, 28), "CIFARNet": (3, 32, 32), "ResNet": (3, 32, 32), "ConvNeXt": (3, 32, 32)}
ADAMW = partial(torch.optim.AdamW, lr=2e-3, fused=True)
COLUMNS = "what,size,ours,yardstick,unit,ratio,goal"
Row = tuple[str, str, float, float, str, float, float | str]


def seconds(run: Callable[[], object]) -> float:
    start = train.clock(DEVICE)
    run()
    return train.clock(DEVICE) - start


def compare(what: str, size: str, ours: Callable, yardstick: Callable, goal: float, runs: int = 3) -> Row:
    """Time both in turn, so that both see the same machine; what the first pair costs more is left out."""
    if runs > 1:
        ours(), yardstick()
    pairs = [(seconds(ours), seconds(yardstick)) for _ in range(runs)]
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
        ("MLP", 3481, ["hidden1", "hidden2", "hidden3", "hidden4", "hidden5"], 30, 1 / 20, 3),
        ("MNISTNet", 10_000, ["conv2", "hidden1"], 1, 1 / 4, 3),
        ("ResNet", 2000, None, 1, 1 / 1.5, 1),
        ("CIFARNet", 2000, None, 1, 1 / 1.5, 1),
    ]
    for name, N, names, epochs, goal, runs in cases:
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
        yield compare(f"DIB {name}", size, ours, yardstick, goal, runs)


def bench_nc1() -> Iterator[Row]:
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000), ("CIFARNet", 2000), ("ResNet", 2000), ("ConvNeXt", 800)):
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
    code = f"from tests.bench import peak_of_nc1; peak_of_nc1({d}, {C}, {N})"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    floor = 400 * d * 4 + 2 * C * d * 8
    yield "NC1 peak memory", f"d {d}, C {C}, N {N}, batch 400", peak / 2**20, floor / 2**20, "MiB", peak / floor, 2


def bench_step() -> Iterator[Row]:
    """An epoch of train.py, as its own epochs.csv has it, and of the same steps on a DataLoader."""
    for name, N in (("MLP", 3481), ("MNISTNet", 10_000)):
        build, split = setting(name, N)
        x, y = (t.cpu() for t in split.batch(torch.arange(N, device=DEVICE)))
        model = build().to(DEVICE)
        optimizer = ADAMW(model.parameters())
        loader = DataLoader(TensorDataset(x, y), 400, shuffle=True)

        def yardstick(model=model, optimizer=optimizer, loader=loader) -> None:
            for inputs, labels in loader:
                loss = F.cross_entropy(model(inputs.to(DEVICE)), labels.to(DEVICE))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        def epoch(name=name, split=split) -> float:
            data.SOURCES["bench"] = lambda *_: (split.inputs.cpu(), split.labels.cpu()) * 2 + (10,)
            flags = ["-d", "SZT"] if name == "MLP" else ["-d", "bench"]
            with tempfile.TemporaryDirectory() as folder:
                options = ["--epochs", "3", "--no-nc1", "--no-dib", "--precision", "float32", "--no-compile"]
                train.main(["-m", name, *flags, *options, "--run-dir", f"{folder}/run"])
                with (Path(folder) / "run" / "epochs.csv").open() as file:
                    return float([row for row in csv.DictReader(file) if row["set"] == "train"][-1]["seconds"])

        pairs = [(epoch(), seconds(yardstick)) for _ in range(3)]
        ours, theirs = (median(times) for times in zip(*pairs, strict=True))
        yield f"training epoch {name}", f"N {N}, batch 400", ours, theirs, "s", ours / theirs, 1 / 3


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

    yield exponent("NC1 MNISTNet", [2500, 5000, 10_000], nc1_of)
    yield exponent("DIB MNISTNet", [2500, 5000, 10_000], dib_of)


PARTS = {"nc1": bench_nc1, "memory": bench_memory, "step": bench_step, "growth": bench_growth, "dib": bench_dib}


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
                verdict = "reached" if ratio <= goal else "MISSED"
                print(
                    f"{what:24} {size:42} {ours:9.4g} {yardstick:9.4g} {unit:4} {ratio:7.3f} <= {goal:5.3f} {verdict}"
                )
                sys.stdout.flush()
                writer.writerow([what, size, f"{ours:.6g}", f"{yardstick:.6g}", unit, f"{ratio:.4g}", f"{goal:.4g}"])
                file.flush()


if __name__ == "__main__":
    main()
