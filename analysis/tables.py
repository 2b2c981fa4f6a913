"""Join runs that differ only in their seed into groups, and start the scripts that write results of groups."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from analysis.reading import COLUMNS, INPUT, OPTIONAL, SETS, RunTables, read_run
from analysis.statistics import (
    choose_log_spaced,
    compute_information,
    explain_unequal_sets,
    is_digit,
    update_input_upper,
)
from layerwise.runs import find_newest_run

MEAN_SD = "mean ± sd of "


@dataclass
class Group:
    """Runs that differ only in their seed, cut to the last epoch that all of them finished.

    Attributes:
        label: the model, the data set, and the flags that distinguish the group from others with the same model and
            data set.
        folders: the folder of each run.
        hparams: the flags of each run.
        tables: the rows of all runs, by the names of COLUMNS. A column `seed` is added, and the column `split` is
            renamed to `layer`, so that the tables can be joined. nc1 has a column `rank_deficient`: whether the rank of
            the class means is below min(d, C - 1). `upper` of the input is the minimum over all epochs and splits.
            Three more tables contain minimality, sufficiency and their controls: information (by epoch),
            convergence_information (by steps) and noise_information (of Gaussian features).
        last: the last epoch, or -1 if no epoch is finished.
        requested_epochs: the epochs to compare by depth, or None for four from the first to the last.
    """

    label: str
    folders: list[Path]
    hparams: list[dict]
    tables: dict[str, pd.DataFrame]
    last: int
    requested_epochs: list[int] | None

    def describe_seeds(self, of: str = "", table: str = "") -> str:
        """Return "seed 0", or for several seeds `of` and their number.

        table: if given, only seeds with rows in this table are counted.
        """
        seeds = self.tables[table]["seed"].unique() if table else [flags["seed"] for flags in self.hparams]
        return f"{of}{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"

    def list_epochs(self, table: str) -> list[int]:
        """Return the epochs that have rows in a table, in order."""
        return sorted(self.tables[table]["epoch"].unique().tolist())

    @property
    def measured_epochs(self) -> list[int]:
        """The epochs in which NC1 or DIB was measured, in order."""
        return sorted({*self.list_epochs("nc1"), *self.list_epochs("dib")})

    @property
    def has_uneven_epochs(self) -> bool:
        """Whether the distances between measured epochs differ. Such epochs are drawn on a log axis."""
        return any(len(set(np.diff(self.list_epochs(table)))) > 1 for table in ("nc1", "dib"))

    def choose_epochs(self, table: str) -> list[int]:
        """Return the epochs of a table that are compared by depth."""
        measured = self.list_epochs(table)
        if self.requested_epochs is None:
            return choose_log_spaced(measured, 4)
        return [epoch for epoch in self.requested_epochs if epoch in measured]

    @property
    def layers(self) -> list[str]:
        """All layers of NC1 and all splits of DIB, in order of depth."""
        names = [name for name in self.tables["nc1"]["layer"].unique() if name != INPUT]
        before = None
        for split in pd.concat([self.tables[name]["layer"] for name in ("dib", "convergence")]).unique():
            if split not in (INPUT, *names):
                names.insert(names.index(before) + 1 if before in names else 0, split)
            before = split
        return names

    @property
    def sets(self) -> list[str]:
        """The measured sets."""
        measured = {*self.tables["nc1"]["set"], *self.tables["dib"]["set"]}
        return [name for name in SETS if name in measured]

    @property
    def has_controls(self) -> bool:
        """Whether the shuffled labels were measured in any epoch."""
        return bool(self.tables["information"]["shuffled"].notna().any())

    @property
    def enumerations(self) -> int:
        """The number of enumerations that the digits are from."""
        return self.tables["dib"]["enumeration"].where(is_digit(self.tables["dib"])).nunique()

    @property
    def has_equal_sets(self) -> bool:
        """Whether minimality and sufficiency can be compared between the sets. If not, their panels differ in scale."""
        return not explain_unequal_sets(self.hparams)

    def describe_samples(self, set_name: str) -> str:
        """Return "N = 3,482", the number of samples of DIB, or an empty string if it is not recorded."""
        counts = [(flags.get("dib_samples") or {}).get(set_name) for flags in self.hparams]
        if None in counts:
            return ""
        fewest, most = min(counts), max(counts)
        return f"N = {fewest:,}" if fewest == most else f"N = {fewest:,} to {most:,}"

    def select_last(self, table: str) -> pd.DataFrame:
        """Return the rows of the last measured epoch, and those of the input, which is measured in one epoch only."""
        rows = self.tables[table]
        return rows[(rows["epoch"] == rows["epoch"].max()) | (rows["layer"] == INPUT)]

    def select_rows(self, table: str, set_name: str) -> pd.DataFrame:
        """Return the rows of a table that belong to one set."""
        rows = self.tables[table]
        return rows[rows["set"] == set_name]


def run_script(
    description: str,
    write: Callable[[list[Group], Path], None],
    arguments: list[str] | None = None,
    by_depth: bool = True,
) -> None:
    """Read the runs that are named on the command line, and call `write` with their groups and the output folder.

    Parameters:
        description: the description of the script in its help.
        write: a function that writes the files of the script.
        arguments: the words of the command line (default: sys.argv[1:]).
        by_depth: whether the script compares epochs by depth, and has the option --epochs.
    """
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs (default: the newest under runs/)")
    help_of_out = "output folder (default: the run's folder, or for several runs their common parent)"
    parser.add_argument("--out", type=Path, help=help_of_out)
    parser.set_defaults(epochs=None)
    if by_depth:
        help_of_epochs = "epochs to compare by depth (default: four from first to last)"
        parser.add_argument("--epochs", nargs="+", type=int, help=help_of_epochs)
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # some terminals lack ±
    try:
        folders = options.runs or [find_newest_run()]
        groups = read_groups(folders, options.epochs)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    out = options.out
    if out is None:
        out = folders[0] if len(folders) == 1 else Path(commonpath([folder.resolve().parent for folder in folders]))
    try:
        write(groups, out)
    except OSError as error:
        exit_with_error(error)


def exit_with_error(reason: object) -> NoReturn:
    """Print the reason in one line and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def read_groups(folders: list[Path], epochs: list[int] | None = None) -> list[Group]:
    """Return the runs in these folders, joined into groups. The groups are in the order of their first runs.

    Raises ValueError if a folder does not hold a run, if two runs have the same flags and the same seed, or if a group
    was not measured in a requested epoch.
    """
    runs_by_settings: dict[str, list[RunTables]] = {}
    for folder in folders:
        run = read_run(folder)
        runs = runs_by_settings.setdefault(json.dumps(run.settings, sort_keys=True), [])
        for other in runs:
            if other.hparams["seed"] == run.hparams["seed"]:
                raise ValueError(f"{other.folder} and {folder} have the same flags and the same seed: give only one")
        runs.append(run)
    settings = [runs[0].settings for runs in runs_by_settings.values()]
    groups = [join_runs(runs, make_label(runs[0], settings), epochs) for runs in runs_by_settings.values()]
    for group in groups:
        unmeasured = [epoch for epoch in epochs or [] if epoch not in group.measured_epochs]
        if unmeasured and group.measured_epochs:
            listed = ", ".join(map(str, group.measured_epochs))
            raise ValueError(f"--epochs {unmeasured[0]}: {group.label} was measured in epochs {listed}")
    return groups


def make_label(run: RunTables, settings: list[dict]) -> str:
    """Return a label: model, data set, and the flags in which runs with the same model and data set differ.

    If the flags are too long, the label contains the folder instead. settings: the settings of all groups.
    """
    flags = run.settings
    alike = [other for other in settings if (other["model"], other["data"]) == (flags["model"], flags["data"])]
    names = [name for name in flags if any(other.get(name) != flags[name] for other in alike)]
    differing = ", ".join(f"{name} {format_value(flags[name])}" for name in names)
    start = f"{flags['model']} on {flags['data']}"
    if len(differing) > 60:
        return f"{start}: {run.folder}"
    return f"{start}, {differing}" if differing else start


def format_value(value: object) -> str:
    """Return the value of a flag as text, lists and dicts without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def join_runs(runs: list[RunTables], label: str, epochs: list[int] | None) -> Group:
    """Return the group of these runs. epochs: the epochs to compare by depth."""
    last = min(run.last_epoch for run in runs)
    if any(run.last_epoch > last for run in runs):
        label += f", up to epoch {last}"
    tables = {name: join_tables(runs, name, last) for name in COLUMNS}
    nc1 = tables["nc1"]
    full_rank = nc1["dim"].clip(upper=runs[0].hparams["num_classes"] - 1)  # all runs have the same classes
    tables["nc1"] = nc1.assign(rank_deficient=nc1["rank"] < full_rank)
    tables["dib"] = update_input_upper(tables["dib"])
    tables["information"] = compute_information(tables["dib"], "epoch")
    tables["convergence_information"] = compute_information(tables["convergence"], "steps")
    tables["noise_information"] = compute_information(tables["noise"])
    return Group(label, [run.folder for run in runs], [run.hparams for run in runs], tables, last, epochs)


def join_tables(runs: list[RunTables], name: str, last: int) -> pd.DataFrame:
    """Return the rows of a table of all runs, in the epochs up to the last that all runs have."""
    parts = [run.tables[name].assign(seed=run.hparams["seed"]) for run in runs]
    table = pd.concat(parts, ignore_index=True).rename(columns={"split": "layer"})
    if name == "convergence":
        return table[table["epoch"] == table["epoch"].max()]  # seeds that were measured in other epochs are left out
    if name in OPTIONAL:
        return table
    # With --measure log the last epoch is always measured, so a shorter run may have an epoch that the others lack.
    common = set.intersection(*(set(part["epoch"]) for part in parts))
    return table[table["epoch"].isin(common) & (table["epoch"] <= last)]
