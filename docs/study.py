"""The study of study.md: its runs, begun, gone on with or skipped, then its figures and its tables (make study)."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

import runs
from analysis import gallery, tables
from analysis.table import markdown
from analysis.tables import Group
from docs import findings

ROOT, DOCS = Path("runs/study"), Path(__file__).parent
PROGRAM = DOCS.parent
LONG = "--dib-size 512 --dib-epochs 120 --measure-dib 0 3 10 18 32 56 100 178 316 1000 3162 8000"
IMAGES = "-d FashionMNIST --download --train-size 2000"


class Sweep(NamedTuple):
    """Runs that differ in their seed: how many, a run's minutes on one core, the flags of train.py, whether seed 0 is
    settled, the minutes of that included."""

    seeds: int
    minutes: float
    flags: str
    settled: bool = False

    def folders(self, name: str) -> list[Path]:
        return [ROOT / f"{name}-seed{seed}" for seed in range(self.seeds)]


SWEEPS = {  # the longest runs first
    "cifarnet": Sweep(
        1, 32, f"-m CIFARNet {IMAGES} -b 100 -lr 0.01 --schedule one-cycle --epochs 15 --measure log "
        "--measure-dib 0 3 15 --dib-size 2000 --dib-epochs 1 --splits group2 group3", settled=True,
    ),
    "tanh": Sweep(8, 4, f"--recipe shwartz-ziv {LONG}"),
    "tanh-600-steps": Sweep(8, 4, "--recipe shwartz-ziv --dib-size 512", settled=True),
    "resnet": Sweep(
        1, 26, f"-m ResNet {IMAGES} -b 100 --schedule one-cycle --epochs 30 --measure log "
        "--measure-dib 0 5 30 --dib-size 2000 --dib-epochs 1 --splits block6 block8", settled=True,
    ),
    "mnistnet": Sweep(
        3, 7, f"-m MNISTNet {IMAGES} --recipe papyan --epochs 100 --measure-dib 0 1 3 10 30 100 "
        "--dib-size 2000 --dib-epochs 15 --splits conv2 hidden1", settled=True,
    ),
    "convnext": Sweep(
        1, 14, "-m ConvNeXt -d FashionMNIST --download --train-size 1000 -b 50 -lr 5e-4 --schedule one-cycle "
        "--epochs 20 --measure log --no-dib",
    ),
    "tanh-epoch-18": Sweep(1, 2, "--recipe shwartz-ziv --dib-size 512 --epochs 18", settled=True),
    "tanh-epoch-133": Sweep(1, 2, "--recipe shwartz-ziv --dib-size 512 --epochs 133", settled=True),
    "relu": Sweep(4, 3.5, f"--recipe shwartz-ziv -nl ReLU {LONG}"),
    "tanh-thesis": Sweep(3, 3, "--recipe shwartz-ziv --dib-size 512 --heads thesis --dib-epochs 600"),
    "mnistnet-thesis": Sweep(
        3, 2, f"-m MNISTNet {IMAGES} --recipe papyan --epochs 100 --measure-dib 0 1 3 10 30 100 "
        "--dib-size 2000 --heads thesis --dib-epochs 15 --splits conv2 hidden1",
    ),
}  # fmt: skip

MLPS, IMAGED = ["tanh", "relu"], ["mnistnet", "cifarnet", "resnet"]

FIGURES = {  # a file: a figure of analysis/gallery.py, and the sweeps in it
    "training-mlps": ("training", MLPS),
    "training-images": ("training", [*IMAGED, "convnext"]),
    "nc1-tanh": ("nc1", ["tanh"]),
    "nc1-mnistnet": ("nc1", ["mnistnet"]),
    "nc1-cifarnet": ("nc1", ["cifarnet"]),
    "depth-resnet": ("depth", ["resnet"]),
    "depth-convnext": ("depth", ["convnext"]),
    "law-tanh": ("law", ["tanh"]),
    "law-images": ("law", ["mnistnet", "resnet"]),
    "plane": ("plane_by_epoch", ["tanh"]),
    "information-tanh": ("information", ["tanh"]),
    "information-relu": ("information", ["relu"]),
    "information-mnistnet": ("information", ["mnistnet"]),
    "gap-tanh": ("gap", ["tanh"]),
    "gap-mnistnet": ("gap", ["mnistnet"]),
    "settle-tanh": ("settle", ["tanh-600-steps"]),
    "settle-images": ("settle", IMAGED),
    "information-thesis": ("information", ["tanh-thesis"]),
}

TABLES = {  # a table: what makes it, and the sweeps in it
    "fitted": (findings.fitted, [*MLPS, *IMAGED, "convnext"]),
    "collapse": (findings.collapse, [*MLPS, *IMAGED, "convnext"]),
    "law": (findings.law, [*MLPS, *IMAGED, "convnext"]),
    "compression": (findings.compression, [*MLPS, *IMAGED]),
    "generalisation": (findings.generalisation, [*MLPS, "mnistnet"]),
    "architectures": (findings.architectures, [*MLPS, *IMAGED, "convnext"]),
    "settled": (findings.settled, ["tanh-epoch-18", "tanh-epoch-133", "tanh-600-steps", *IMAGED]),
    "heads": (findings.heads, ["tanh", "tanh-600-steps", "tanh-thesis"]),
    "heads of images": (findings.heads, ["mnistnet", "mnistnet-thesis"]),
}

caught: list[int] = []  # signals, after which nothing more is begun
children: set[subprocess.Popen] = set()


def commands(name: str) -> str:
    """The sweep as one asks for it."""
    sweep = SWEEPS[name]
    lines = [f'make sweep SEEDS={sweep.seeds} ARGS="{sweep.flags} --run-dir {ROOT / name}"']
    lines += [f"make settle RUN={sweep.folders(name)[0]}"] if sweep.settled else []
    return "".join(f"    {line}\n" for line in lines)


def finished(folder: Path, sweep: Sweep) -> bool:
    try:
        state = runs.load(folder)
    except (ValueError, OSError):
        return False
    settled = not sweep.settled or not folder.name.endswith("seed0") or (folder / "settle.csv").exists()
    return settled and state["epoch"] >= state["hparams"]["epochs"]


def say_budget(jobs: int) -> None:
    left = {}
    for name, sweep in SWEEPS.items():
        folders = [folder for folder in sweep.folders(name) if not finished(folder, sweep)]
        if folders:
            left[name] = len(folders) * sweep.minutes
            print(f"{name}: {len(folders)} to do, about {left[name]:.0f} min on one core")
    if left:
        about = max(*left.values(), sum(left.values()) / jobs)
        print(f"{jobs} at a time take about {about:.0f} min; {ROOT}/<name>.log says how far each is", flush=True)


def run(name: str) -> bool:
    """Bring the runs of a sweep to their end, and settle the first; whether that went well."""
    sweep, first = SWEEPS[name], SWEEPS[name].folders(name)[0]
    with (ROOT / f"{name}.log").open("a") as log:
        there = launch(log, "sweep.py", str(sweep.seeds), *sweep.flags.split(), "--run-dir", str(ROOT / name))
        if there and sweep.settled and not (first / "settle.csv").exists():
            there = launch(log, "settle.py", str(first))
    print(f"{name}: there\n" if there else f"{name}: not finished, as {log.name} says\n", end="", flush=True)
    return there


def launch(log: TextIO, script: str, *words: str) -> bool:
    """Run a script of the project on one thread; whether it did what it should."""
    if caught:
        return False
    command = [sys.executable, PROGRAM / script, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    # in a session of its own, so that a keyboard's SIGINT comes to it once, through stop, like any other signal
    child = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    children.add(child)
    return child.wait() == 0


def stop(number: int, frame: object) -> None:
    """End the runs, which lose the epoch in flight, and begin no more."""
    caught.append(number)
    for child in list(children):
        child.terminate()


@cache
def groups(*names: str) -> list[Group]:
    """The runs of these sweeps, named by what sets them apart."""
    return tables.groups([folder for name in names for folder in SWEEPS[name].folders(name)])


def draw(figure: str) -> None:
    kind, names = FIGURES[figure]
    (content,) = gallery.picture(kind, groups(*names), ("png",))
    tables.put(DOCS / "study" / f"{figure}.png", content)


def shown(figure: str) -> str:
    """The figure in the document, with the command that draws it."""
    kind, names = FIGURES[figure]
    wanted = " ".join(f"{ROOT / name}-seed{'?' if SWEEPS[name].seeds > 1 else 0}" for name in names)
    several = len(names) > 1 or SWEEPS[names[0]].seeds > 1
    path = (ROOT if several else Path(wanted)) / "figures" / f"{kind}.png"
    picture = f"![{gallery.KINDS[kind].title}: {', '.join(names)}](study/{figure}.png)"
    return f'{picture}\n\n    make plots RUN="{wanted}"    # {path}\n'


def fill(text: str, parts: dict[str, str]) -> str:
    """The text with each part between its marks, <!-- name --> and <!-- end -->."""
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"study.md lacks <!-- {name} --> or its <!-- end -->")
        text = before + mark + part + end + after
    return text


def main() -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ROOT.mkdir(parents=True, exist_ok=True)
    say_budget(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        there = list(pool.map(run, SWEEPS))
    if not all(there):
        sys.exit(128 + caught[0] if caught else 1)
    for figure in FIGURES:
        draw(figure)
        print(f"docs/study/{figure}.png")
    parts = {name: markdown(make({each: groups(each)[0] for each in names})) for name, (make, names) in TABLES.items()}
    parts |= {f"figure {name}": shown(name) for name in FIGURES}
    parts["commands"] = "    export OMP_NUM_THREADS=1\n" + "".join(map(commands, SWEEPS))
    path = DOCS / "study.md"
    tables.put(path, fill(path.read_text("utf-8"), parts).encode())
    print("docs/study.md")


if __name__ == "__main__":
    main()
