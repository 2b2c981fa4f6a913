"""Measure DIB of an epoch of a run again, with 1, 2, 4 and 8 times the steps of the probes.

    python -m tools.convergence runs/MLP-SZT-seed0 --epoch 3        (default: the newest run, its last epoch)

The weights are those in checkpoint.pt, or in weights/epoch3.pt. The results are written to convergence.csv in the run's
folder, and the number of epochs that the probes of each split need is printed. `make plots` draws the results.
"""

from math import isfinite, log, nan
from pathlib import Path

from tqdm import tqdm

import dib
import train
from layerwise import runs, schema
from training import checkpoint, configuration
from training.flags import Config, make_number_type
from training.setup import Run, prepare_run
from training.terminal import ExitMessages, Parser, quote_for_make, report_errors, set_up_terminal

FACTORS = (1, 2, 4, 8)
TOLERANCE = 0.01  # bits of minimality

Row = tuple[str, str, dib.ProbeResult]  # set, split, result


def load_run(folder: Path, device: str | None, epoch: int | None) -> tuple[Run, int]:
    """Return a run with its weights after an epoch (default: the last finished epoch), and the epoch.

    DIB need not be measured in this epoch. Raises ValueError if the folder does not hold the weights, or if DIB was not
    measured in the run.
    """
    state = checkpoint.load(folder)
    flags = ["--resume", "--run-dir", str(folder), *(["--device", device] if device else [])]
    config = configuration.adopt_recorded(flags, folder, state["hparams"])
    if not config.dib or state["epoch"] < configuration.get_first_measured(config.measure_dib):
        raise ValueError(f"DIB was not measured in any epoch of {folder}")
    run, _ = prepare_run(config)
    checkpoint.restore(folder, state, run.device, run.parts)
    if epoch is None or epoch == state["epoch"]:
        return run, state["epoch"]
    checkpoint.load_weights(folder, state, epoch, run.model)
    return run, epoch


def measure_epoch(run: Run, epoch: int, factor: int) -> list[Row]:
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


def carry_bounds(row: Row, fewer: Row) -> Row:
    """Return the row with the closer of its bounds and those of the same probe with fewer steps.

    All of them are bounds on the same H_V. The held-out loss has no bounds.
    """
    set_name, split, result = row
    if result.labeling == schema.HELD_OUT:
        return row
    upper = min(filter(isfinite, (result.upper, fewer[2].upper)), default=nan)
    return set_name, split, result._replace(lower=min(max(result.lower, fewer[2].lower), upper), upper=upper)


def measure_convergence(run: Run, epoch: int) -> list[tuple]:
    """Measure DIB for every factor. Return the rows of convergence.csv. Print the share of suboptimal probes."""
    rows, fewer = [], []
    for factor in tqdm(FACTORS, "times the steps", leave=False, disable=None):
        results = measure_epoch(run, epoch, factor)
        results = [carry_bounds(*pair) for pair in zip(results, fewer or results, strict=True)]
        steps = {name: factor * train.count_dib_steps(run.config, name) for name in run.config.sets}
        rows += [(factor, steps[name], epoch, name, split, *result) for name, split, result in results]
        share = dib.compute_suboptimal_share(result for *_, result in results)
        tqdm.write(f"{factor} times the steps: {share:.0%} of the probes are known suboptimal")
        fewer = results
    return rows


def find_sufficient_factors(rows: list[tuple]) -> dict[str, dict[str, int | None]]:
    """Return {split: {set: the smallest factor whose minimality is within TOLERANCE of that of the largest factor}}.

    It is None if only the largest factor is: more steps than these may find more. rows: of convergence.csv.
    """
    nats = {}  # {split: {set: {factor: the information about each digit}}}
    for factor, _, _, set_name, split, *values in rows:
        result = dib.ProbeResult(*values)
        if isinstance(result.labeling, int):
            of_factor = nats.setdefault(split, {}).setdefault(set_name, {}).setdefault(factor, [])
            of_factor.append(result.entropy - result.upper)
    return {split: {name: find_sufficient_factor(each) for name, each in sets.items()} for split, sets in nats.items()}


def find_sufficient_factor(nats: dict[int, list[float]]) -> int | None:
    """Return the factor of one split and set. nats: {factor: the information about each digit}."""
    minimality = {factor: sum(digits) / len(digits) / log(2) for factor, digits in sorted(nats.items())}
    *fewer, largest = minimality
    enough = [factor for factor in fewer if minimality[largest] - minimality[factor] <= TOLERANCE]
    return enough[0] if enough else None


def describe_split(config: Config, split: str, factors: dict[str, int | None]) -> str:
    """Return the printed line of a split. factors: {set: the smallest sufficient factor, or None}."""
    if split in config.linear_splits:
        return f"{split}: any, because the probes are linear"
    parts = []
    for set_name, factor in factors.items():
        words = f"--dib-epochs {factor * config.dib_epochs}" if factor else "not converged"
        parts.append(f"{words} ({set_name})")
    return f"{split}: {', '.join(parts)}"


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="convergence", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("run", nargs="?", type=Path, help="folder of the run (default: the newest in runs/)")
    help_of_epoch = "epoch whose weights are measured (default: the last one; others need train.py --save-weights)"
    parser.add_argument("--epoch", type=make_number_type(int, 0), metavar="N", help=help_of_epoch)
    parser.add_argument("--device", help="as in train.py (default: the device of the run)")
    given = parser.parse_args(arguments)
    messages = ExitMessages("convergence.csv was not changed", "to start again, repeat the command")
    with report_errors(parser, messages):
        folder = given.run or runs.find_newest_run()
        with runs.lock(folder):
            run, epoch = load_run(folder, given.device, given.epoch)
            messages.running = True
            rows = measure_convergence(run, epoch)
            runs.write_table(folder / "convergence.csv", schema.CONVERGENCE, rows)
        goal = f"minimality within {TOLERANCE} bits of that with {FACTORS[-1]} times the steps"
        print(f"the smallest --dib-epochs for {goal}, in epoch {epoch}:")
        for split, factors in find_sufficient_factors(rows).items():
            print(describe_split(run.config, split, factors))
        print(f"done: {folder / 'convergence.csv'}; to draw it: make plots RUN={quote_for_make(folder)}")


if __name__ == "__main__":
    set_up_terminal()
    main()
