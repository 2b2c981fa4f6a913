"""Measure DIB of a run's last epoch again, with 1, 2, 4 and 8 times the steps of the probes.

    python -m tools.convergence runs/MLP-SZT-seed0        (default: the newest run)

The network is loaded from checkpoint.pt. The results are written to convergence.csv in the run's folder. `make plots`
draws them.
"""

from pathlib import Path

from tqdm import tqdm

import dib
import train
from layerwise import runs, schema
from training import checkpoint, configuration
from training.setup import Run, prepare_run
from training.terminal import ExitMessages, Parser, quote_for_make, report_errors, set_up_terminal

FACTORS = (1, 2, 4, 8)

Row = tuple[str, str, dib.ProbeResult]  # set, split, result


def measure_last_epoch(run: Run, epoch: int, factor: int) -> list[Row]:
    """Measure DIB of every split. The input has the random numbers of the first measured epoch, as in the run."""
    first = configuration.get_first_measured(run.config.measure_dib)
    if epoch == first:
        return train.measure_dib(run, epoch, run.config.splits, factor)
    results = train.measure_dib(run, epoch, [name for name in run.config.splits if name != "input"], factor)
    of_input = train.measure_dib(run, first, [name for name in run.config.splits if name == "input"], factor)
    return [take_smallest_upper(row, results) for row in of_input] + results


def take_smallest_upper(row: Row, deeper: list[Row]) -> Row:
    """Return the row, with `upper` lowered to that of a deeper split of the same set and labeling, if smaller.

    The held-out loss has no other upper bound.
    """
    set_name, split, result = row
    if result.labeling == schema.HELD_OUT:
        return row
    uppers = [result.upper]
    for other_set, _, other in deeper:
        if (other_set, other.enumeration, other.labeling) == (set_name, result.enumeration, result.labeling):
            uppers.append(other.upper)
    return set_name, split, result._replace(upper=min(uppers))


def measure_convergence(run: Run, epoch: int) -> list[tuple]:
    """Measure DIB for every factor. Return the rows of convergence.csv. Print the share of suboptimal probes."""
    rows = []
    for factor in tqdm(FACTORS, "times the steps", leave=False, disable=None):
        results = measure_last_epoch(run, epoch, factor)
        steps = {name: factor * train.count_dib_steps(run.config, name) for name in run.config.sets}
        rows += [(factor, steps[name], name, split, *result) for name, split, result in results]
        share = dib.compute_suboptimal_share(result for *_, result in results)
        tqdm.write(f"{factor} times the steps: {share:.0%} of the probes are known suboptimal")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="convergence", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of the run (default: the newest in runs/)")
    parser.add_argument("--device", help="as in train.py (default: the device of the run)")
    given = parser.parse_args(arguments)
    folder, device = given.run, ["--device", given.device] if given.device else []
    messages = ExitMessages("convergence.csv was not changed", "to start again, repeat the command")
    with report_errors(parser, messages):
        folder = folder or runs.find_newest_run()
        with runs.lock(folder):
            state = checkpoint.load(folder)
            epoch, recorded = state["epoch"], state["hparams"]
            config = configuration.adopt_recorded(["--resume", "--run-dir", str(folder), *device], folder, recorded)
            if not config.dib or epoch < configuration.get_first_measured(config.measure_dib):
                raise ValueError(f"DIB was not measured in any epoch of {folder}")
            run, _ = prepare_run(config)
            checkpoint.restore(folder, state, run.device, run.parts)
            messages.running = True
            runs.write_table(folder / "convergence.csv", schema.CONVERGENCE, measure_convergence(run, epoch))
        print(f"done: {folder / 'convergence.csv'}; to draw it: make plots RUN={quote_for_make(folder)}")


if __name__ == "__main__":
    set_up_terminal()
    main()
