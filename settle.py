"""How many steps DIB's heads need: those of a run's last epoch again, with 1, 2, 4 and 8 times the steps.

    python settle.py runs/MLP-SZT-seed0        (the newest run without a folder)

The network is that of the run's checkpoint. settle.csv in its folder has the heads; make plots draws them by steps.
"""

import csv
import io
from pathlib import Path

from tqdm import tqdm

import dib
import flags
import runs
import train
from analysis.tables import newest
from command import Parser, Progress, begin, for_make, one_line

FACTORS = (1, 2, 4, 8)


def heads_of(run: train.Run, epoch: int, factor: int) -> list[tuple[str, str, dib.Head]]:
    """(set, split, head) of all heads of the last epoch, and of those without encoder as the first epoch had them."""
    first = flags.first_measured(run.args.measure_dib)
    if epoch == first:
        return train.measure_dib(run, epoch, run.args.splits, factor)
    found = train.measure_dib(run, epoch, [name for name in run.args.splits if name != "input"], factor)
    of_input = train.measure_dib(run, first, [name for name in run.args.splits if name == "input"], factor)
    return [bounded(*row, found) for row in of_input] + found


def bounded(name: str, split: str, head: dib.Head, deeper: list[tuple[str, str, dib.Head]]) -> tuple:
    """The row of a head without encoder, bounded by all deeper heads of its set and labeling."""
    known = [other.bound for of, _, other in deeper if of == name and other[:2] == head[:2]]
    return name, split, head._replace(bound=min([head.bound, *known]))


def settle(run: train.Run, epoch: int) -> list[tuple]:
    """The rows of settle.csv."""
    rows = []
    for factor in tqdm(FACTORS, "times the steps", leave=False, disable=None):
        found = heads_of(run, epoch, factor)
        rows += [(factor, factor * train.dib_steps(run.args, name), name, split, *head) for name, split, head in found]
        share = dib.beaten(head for *_, head in found)
        tqdm.write(f"{factor} times the steps: {share:.0%} of the heads beaten")
    return rows


def write(folder: Path, rows: list[tuple]) -> None:
    text = io.StringIO()
    text.write(runs.SETTLE + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    runs.write(folder / "settle.csv", text.getvalue().encode())


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="settle.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a run (the newest under runs/)")
    parser.add_argument("--device", help="as in train.py (as the run's, chosen anew if it was left open)")
    given = parser.parse_args(arguments)
    folder, device = given.run, ["--device", given.device] if given.device else []
    progress = Progress("settle.csv is as it was", "and the same command begins again")
    with one_line(parser, progress):
        folder = folder or newest()
        with runs.locked(folder):
            state = runs.load(folder)
            epoch, recorded = state["epoch"], state["hparams"]
            args = flags.adopt(["--resume", "--run-dir", str(folder), *device], folder, recorded)
            if not args.dib or epoch < flags.first_measured(args.measure_dib):
                raise ValueError(f"{folder} holds no epoch in which DIB was measured")
            run, _ = train.prepare(args)
            runs.restore(folder, state, run.device, run.parts)
            progress.running = True
            write(folder, settle(run, epoch))
        print(f"done: {folder / 'settle.csv'}; make plots RUN={for_make(folder)} draws it")


if __name__ == "__main__":
    begin()
    main()
