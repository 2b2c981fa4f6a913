"""Run the missing runs of docs/study.md, then make its figures and tables (`make study`)."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple, TextIO

from analysis import gallery
from analysis.table import format_markdown
from analysis.tables import Group, read_groups
from layerwise.runs import write_atomically
from tools import findings
from training import checkpoint

ROOT = Path(__file__).parent.parent
RUNS, DOCS = Path("runs/study"), ROOT / "docs"
UNCONTROLLED = "--enumerations data --no-controls"  # as the figures and tables of docs/study.md were measured
SZT = f"--recipe shwartz-ziv {UNCONTROLLED} --dib-size 512"
LONG = "--dib-epochs 120 --measure-dib 0 3 10 18 32 56 100 178 316 1000 3162 8000"
IMAGES = f"-d FashionMNIST --download --train-size 2000 {UNCONTROLLED}"


class Sweep(NamedTuple):
    """Runs that differ only in their seed.

    Attributes:
        seeds: the number of seeds.
        minutes: the estimated minutes of a run on one core, with `make convergence` if it is run.
        flags: the flags of train.py.
        convergence: whether `make convergence` is run for seed 0.
    """

    seeds: int
    minutes: float
    flags: str
    convergence: bool = False

    def list_folders(self, name: str) -> list[Path]:
        """Return the folders of the runs, in order of the seed."""
        return [RUNS / f"{name}-seed{seed}" for seed in range(self.seeds)]


SWEEPS = {  # the longest runs first
    "cifarnet": Sweep(
        1, 32, f"-m CIFARNet {IMAGES} -b 100 -lr 0.01 --schedule one-cycle --epochs 15 --measure log "
        "--measure-dib 0 3 15 --dib-size 2000 --dib-epochs 1 --splits group2 group3", convergence=True,
    ),
    "tanh": Sweep(8, 4, f"{SZT} {LONG}"),
    "tanh-600-steps": Sweep(8, 4, SZT, convergence=True),
    "resnet": Sweep(
        1, 26, f"-m ResNet {IMAGES} -b 100 --schedule one-cycle --epochs 30 --measure log "
        "--measure-dib 0 5 30 --dib-size 2000 --dib-epochs 1 --splits block6 block8", convergence=True,
    ),
    "mnistnet": Sweep(
        3, 7, f"-m MNISTNet {IMAGES} --recipe papyan --epochs 100 --measure-dib 0 1 3 10 30 100 "
        "--dib-size 2000 --dib-epochs 15 --splits conv2 hidden1", convergence=True,
    ),
    "convnext": Sweep(
        1, 14, "-m ConvNeXt -d FashionMNIST --download --train-size 1000 -b 50 -lr 5e-4 --schedule one-cycle "
        "--epochs 20 --measure log --no-dib",
    ),
    "tanh-epoch-18": Sweep(1, 2, f"{SZT} --epochs 18", convergence=True),
    "tanh-epoch-133": Sweep(1, 2, f"{SZT} --epochs 133", convergence=True),
    "relu": Sweep(4, 3.5, f"{SZT} -nl ReLU {LONG}"),
    "tanh-thesis": Sweep(3, 3, f"{SZT} --probes thesis --dib-epochs 600"),
    "mnistnet-thesis": Sweep(
        3, 2, f"-m MNISTNet {IMAGES} --recipe papyan --epochs 100 --measure-dib 0 1 3 10 30 100 "
        "--dib-size 2000 --probes thesis --dib-epochs 15 --splits conv2 hidden1",
    ),
}  # fmt: skip

MLPS, IMAGED = ["tanh", "relu"], ["mnistnet", "cifarnet", "resnet"]

FIGURES = {  # {file: (figure of analysis/gallery.py, the sweeps in it)}
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
    "convergence-tanh": ("convergence", ["tanh-600-steps"]),
    "convergence-images": ("convergence", IMAGED),
    "information-thesis": ("information", ["tanh-thesis"]),
}

TABLES = {  # {mark in docs/study.md: (function that makes the table, the sweeps in it)}
    "fit": (findings.tabulate_fit, [*MLPS, *IMAGED, "convnext"]),
    "collapse": (findings.tabulate_collapse, [*MLPS, *IMAGED, "convnext"]),
    "law": (findings.tabulate_law, [*MLPS, *IMAGED, "convnext"]),
    "compression": (findings.tabulate_compression, [*MLPS, *IMAGED]),
    "generalisation": (findings.tabulate_generalisation, [*MLPS, "mnistnet"]),
    "architectures": (findings.tabulate_architectures, [*MLPS, *IMAGED, "convnext"]),
    "convergence": (findings.tabulate_convergence, ["tanh-epoch-18", "tanh-epoch-133", "tanh-600-steps", *IMAGED]),
    "probes": (findings.tabulate_probes, ["tanh", "tanh-600-steps", "tanh-thesis"]),
    "probes of images": (findings.tabulate_probes, ["mnistnet", "mnistnet-thesis"]),
}

caught: list[int] = []  # received signals; after one, no program is started
children: set[subprocess.Popen] = set()


def format_commands(name: str) -> str:
    """Return the make commands of a sweep, indented as in docs/study.md."""
    sweep = SWEEPS[name]
    lines = [f'make sweep SEEDS={sweep.seeds} ARGS="{sweep.flags} --run-dir {RUNS / name}"']
    lines += [f"make convergence RUN={sweep.list_folders(name)[0]}"] if sweep.convergence else []
    return "".join(f"    {line}\n" for line in lines)


def is_finished(folder: Path, sweep: Sweep) -> bool:
    """Return whether all epochs are finished and convergence.csv exists if it is required."""
    try:
        state = checkpoint.load(folder)
    except (ValueError, OSError):
        return False
    is_required = sweep.convergence and folder.name.endswith("seed0")
    if is_required and not (folder / "convergence.csv").exists():
        return False
    return state["epoch"] >= state["hparams"]["epochs"]


def print_estimate(jobs: int) -> None:
    """Print the number of missing runs and the estimated time. jobs: the number of sweeps that run in parallel."""
    left = {}
    for name, sweep in SWEEPS.items():
        folders = [folder for folder in sweep.list_folders(name) if not is_finished(folder, sweep)]
        if folders:
            left[name] = len(folders) * sweep.minutes
            print(f"{name}: {len(folders)} to do, about {left[name]:.0f} min on one core")
    if left:
        about = max(*left.values(), sum(left.values()) / jobs)
        print(f"about {about:.0f} min with {jobs} sweeps in parallel; for progress see {RUNS}/<name>.log", flush=True)


def finish_sweep(name: str) -> bool:
    """Run a sweep, and `make convergence` for its first run if required. Return whether both succeeded."""
    sweep, first = SWEEPS[name], SWEEPS[name].list_folders(name)[0]
    with (RUNS / f"{name}.log").open("a") as log:
        done = launch(log, "tools.sweep", str(sweep.seeds), *sweep.flags.split(), "--run-dir", str(RUNS / name))
        if done and sweep.convergence and not (first / "convergence.csv").exists():
            done = launch(log, "tools.convergence", str(first))
    print(f"{name}: finished\n" if done else f"{name}: not finished, see {log.name}\n", end="", flush=True)
    return done


def launch(log: TextIO, module: str, *arguments: str) -> bool:
    """Run a program of the project on one thread. Return whether its exit status was 0."""
    if caught:
        return False
    command = [sys.executable, "-m", module, *arguments]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    # start_new_session: otherwise Ctrl-C would be sent to it twice, by the terminal and by stop_programs
    child = subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
    children.add(child)
    return child.wait() == 0


def stop_programs(number: int, frame: object) -> None:
    """Terminate the running programs and do not start others. The epochs in progress are lost."""
    caught.append(number)
    for child in list(children):
        child.terminate()


@cache
def read_sweeps(*names: str) -> list[Group]:
    """Return the groups of the runs of these sweeps."""
    return read_groups([folder for name in names for folder in SWEEPS[name].list_folders(name)])


def draw_figure(name: str) -> None:
    """Write a figure to docs/study."""
    kind, sweeps = FIGURES[name]
    (content,) = gallery.render_figure(kind, read_sweeps(*sweeps), ("png",))
    write_atomically(DOCS / "study" / f"{name}.png", content)


def format_figure(name: str) -> str:
    """Return a figure as Markdown, with the command that draws it."""
    kind, sweeps = FIGURES[name]
    wanted = " ".join(f"{RUNS / sweep}-seed{'?' if SWEEPS[sweep].seeds > 1 else 0}" for sweep in sweeps)
    is_one_run = len(sweeps) == 1 and SWEEPS[sweeps[0]].seeds == 1
    path = (Path(wanted) if is_one_run else RUNS) / "figures" / f"{kind}.png"
    image = f"![{gallery.KINDS[kind].title}: {', '.join(sweeps)}](study/{name}.png)"
    return f'{image}\n\n    make plots RUN="{wanted}"    # {path}\n'


def replace_parts(text: str, parts: dict[str, str]) -> str:
    """Replace the text between the marks <!-- name --> and <!-- end --> by parts[name]."""
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"study.md lacks <!-- {name} --> or its <!-- end -->")
        text = before + mark + part + end + after
    return text


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_programs)
    jobs = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    RUNS.mkdir(parents=True, exist_ok=True)
    print_estimate(jobs)
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(finish_sweep, SWEEPS))
    if not all(done):
        sys.exit(128 + caught[0] if caught else 1)
    for name in FIGURES:
        draw_figure(name)
        print(f"docs/study/{name}.png")
    parts = {f"figure {name}": format_figure(name) for name in FIGURES}
    for name, (tabulate, sweeps) in TABLES.items():
        parts[name] = format_markdown(tabulate({sweep: read_sweeps(sweep)[0] for sweep in sweeps}))
    parts["commands"] = "    export OMP_NUM_THREADS=1\n" + "".join(map(format_commands, SWEEPS))
    path = DOCS / "study.md"
    write_atomically(path, replace_parts(path.read_text("utf-8"), parts).encode())
    print("docs/study.md")


if __name__ == "__main__":
    main()
