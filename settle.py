"""How many steps DIB's heads need: those of a run's last epoch again, with 1, 2, 4 and 8 times the steps.

    python settle.py runs/MLP-SZT-seed0        (the newest run without a folder)

The network is that of the run's checkpoint. settle.csv in its folder has the heads; make plots draws them by steps.
"""

import argparse
import copy
import csv
import io
from pathlib import Path

import torch
from tqdm import tqdm

import dib
import runs
import train
from analysis.tables import newest

FACTORS = (1, 2, 4, 8)


def heads_of(args: argparse.Namespace, epoch: int, factor: int, *what: object) -> list[tuple[str, str, dib.Head]]:
    """(set, split, head) of all heads of the last epoch, and of those without encoder as the first epoch had them."""
    found = train.measure_dib(args, *what, epoch, factor)
    if epoch > 1 and "input" in args.splits:
        first = copy.copy(args)
        first.splits = ["input"]
        found = [bounded(*row, found) for row in train.measure_dib(first, *what, 1, factor)] + found
    return found


def bounded(name: str, split: str, head: dib.Head, deeper: list[tuple[str, str, dib.Head]]) -> tuple:
    """The row of a head without encoder, bounded by all deeper heads of its set and labeling."""
    known = [other.bound for of, _, other in deeper if of == name and other[:2] == head[:2]]
    return name, split, head._replace(bound=min([head.bound, *known]))


def settle(args: argparse.Namespace, epoch: int, *what: object) -> list[tuple]:
    """The rows of settle.csv."""
    rows = []
    for factor in tqdm(FACTORS, "times the steps", leave=False, disable=None):
        found = heads_of(args, epoch, factor, *what)
        rows += [(factor, factor * train.dib_steps(args, name), name, split, *head) for name, split, head in found]
        share = dib.beaten(head for *_, head in found)
        tqdm.write(f"{factor} times the steps: {share:.0%} of the heads beaten")
    return rows


def write(folder: Path, rows: list[tuple]) -> None:
    text = io.StringIO()
    text.write(runs.SETTLE + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    runs.write(folder / "settle.csv", text.getvalue().encode())


def main(arguments: list[str] | None = None) -> None:
    parser = train.Parser(prog="settle.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a run (the newest under runs/)")
    folder = parser.parse_args(arguments).run
    progress = train.Progress("settle.csv is as it was", "and the same command begins again")
    with train.one_line(parser, progress):
        folder = folder or newest()
        with runs.locked(folder):
            state = runs.load(folder)
            epoch = state["epoch"]
            if epoch == 0 or not state["hparams"].get("dib"):
                raise ValueError(f"{folder} holds no epoch in which DIB was measured")
            flags = ["--resume", "--run-dir", str(folder)]
            args = train.adopt_flags(train.make_parser(), flags, folder, state["hparams"])
            dataset, build, make_optimizer, parts, _ = train.prepare(args)
            runs.restore(folder, state, torch.device(args.device), parts)
            progress.running = True
            sets = train.dib_sets(args, dataset)
            rows = settle(args, epoch, sets, dataset.num_classes, parts["model"], build, make_optimizer)
            write(folder, rows)
        print(f"done: {folder / 'settle.csv'}; make plots RUN={folder} draws it")


if __name__ == "__main__":
    train.catch_signals()
    main()
