"""Measure DIB of a run's last epoch again, with 1, 2, 4 and 8 times the steps of the probes.

    python -m tools.convergence runs/MLP-SZT-seed0        (without a folder: the newest run)

The network is that of the run's checkpoint. The results are written to convergence.csv in the run's folder, and make
plots draws them by steps.
"""

import csv
import io
from pathlib import Path

from tqdm import tqdm

import dib
import train
from layerwise import runs, schema
from training import checkpoint, configuration
from training.terminal import Parser, Progress, catch_signals, quote_for_make, report_errors

FACTORS = (1, 2, 4, 8)

Row = tuple[str, str, dib.ProbeResult]  # set, split, result


def measure_last_epoch(run: train.Run, epoch: int, factor: int) -> list[Row]:
    """Return the probes of the last epoch, and those of the input as they were measured in the first epoch."""
    first = configuration.get_first_measured(run.args.measure_dib)
    if epoch == first:
        return train.measure_dib(run, epoch, run.args.splits, factor)
    results = train.measure_dib(run, epoch, [name for name in run.args.splits if name != "input"], factor)
    of_input = train.measure_dib(run, first, [name for name in run.args.splits if name == "input"], factor)
    return [lower_upper(row, results) for row in of_input] + results


def lower_upper(row: Row, deeper: list[Row]) -> Row:
    """Return the row of a probe of the input, with `upper` lowered to that of any deeper probe of the same labeling."""
    name, split, result = row
    known = [other.upper for of, _, other in deeper if of == name and other[:2] == result[:2]]
    return name, split, result._replace(upper=min([result.upper, *known]))


def measure_convergence(run: train.Run, epoch: int) -> list[tuple]:
    """Return the rows of convergence.csv, and print the share of probes known suboptimal for each factor."""
    rows = []
    for factor in tqdm(FACTORS, "times the steps", leave=False, disable=None):
        results = measure_last_epoch(run, epoch, factor)
        steps = {name: factor * train.count_dib_steps(run.args, name) for name in run.args.sets}
        rows += [(factor, steps[name], name, split, *result) for name, split, result in results]
        share = dib.compute_suboptimal_share(result for *_, result in results)
        tqdm.write(f"{factor} times the steps: {share:.0%} of the probes known suboptimal")
    return rows


def write_table(folder: Path, rows: list[tuple]) -> None:
    """Write convergence.csv."""
    text = io.StringIO()
    text.write(schema.CONVERGENCE + "\n")
    csv.writer(text, lineterminator="\n").writerows(rows)
    runs.write_atomically(folder / "convergence.csv", text.getvalue().encode())


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="convergence", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a run (the newest under runs/)")
    parser.add_argument("--device", help="as in train.py (that of the run)")
    given = parser.parse_args(arguments)
    folder, device = given.run, ["--device", given.device] if given.device else []
    progress = Progress("convergence.csv is as it was", "and the same command starts again")
    with report_errors(parser, progress):
        folder = folder or runs.find_newest_run()
        with runs.lock(folder):
            state = checkpoint.load(folder)
            epoch, recorded = state["epoch"], state["hparams"]
            args = configuration.adopt(["--resume", "--run-dir", str(folder), *device], folder, recorded)
            if not args.dib or epoch < configuration.get_first_measured(args.measure_dib):
                raise ValueError(f"{folder} holds no epoch in which DIB was measured")
            run, _ = train.prepare(args)
            checkpoint.restore(folder, state, run.device, run.parts)
            progress.running = True
            write_table(folder, measure_convergence(run, epoch))
        print(f"done: {folder / 'convergence.csv'}; make plots RUN={quote_for_make(folder)} draws it")


if __name__ == "__main__":
    catch_signals()
    main()
