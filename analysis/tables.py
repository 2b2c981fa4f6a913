"""Read the CSVs of runs as tables, and join runs that differ only in their seed into groups."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import StringIO
from math import log
from os.path import commonpath
from pathlib import Path
from typing import NoReturn

import numpy as np
import pandas as pd

from layerwise import schema
from layerwise.runs import find_newest_run

# The columns that are read, by the names of the files without ".csv". epochs.csv is read first: of each epoch a run
# writes its rows last, so the tables that are read later have all rows of the epochs in it.
COLUMNS = {
    Path(name).stem: [column for column in header.split(",") if column != "seconds"]
    for name, header in {
        "epochs.csv": schema.COLUMNS["epochs.csv"],
        **schema.COLUMNS,
        "lr_range.csv": schema.LR_RANGE,
        "convergence.csv": schema.CONVERGENCE,
    }.items()
}
OPTIONAL = {"lr_range": "step", "convergence": "probe"}  # tables that a run may lack, and what each row of them is
WORDS = ("set", "layer", "split", "labeling")
COUNTS = ("epoch", "factor", "steps")
# No two rows of a table have the same values in these columns.
KEYS = ("epoch", "step", "factor", "set", "layer", "split", "permutation", "labeling")
DERIVED = ("num_classes", "dib_samples", "chosen", "recipe")  # hparams that follow from other flags or repeat them
INPUT = "input"  # stands among the layers, before the first; it is measured in one epoch only
SUBOPTIMAL_BITS = schema.SUBOPTIMAL / log(2)
MEAN_SD = "mean ± sd of "


@dataclass
class Group:
    """Runs that differ only in their seed, up to the last epoch that all of them have.

    Attributes:
        label: the model, the data and the flags in which the group differs from others of this model and data.
        folders, hparams: one for each run.
        tables: the rows of all runs, by the names of COLUMNS. They have a column `seed`, and `split` is called `layer`.
            A measure that was switched off is an empty table. nc1 has a column `short`: whether the rank is below
            min(d, C - 1). `upper` of the input is the least of all epochs. Two more tables have minimality and
            sufficiency: information (by epoch) and convergence_information (by steps).
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
        """Return "seed 0", or for several seeds `of` and their number. With a table, only seeds that have rows in it
        count."""
        seeds = self.tables[table]["seed"].unique() if table else [flags["seed"] for flags in self.hparams]
        return f"{of}{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"

    def list_epochs(self, table: str) -> list[int]:
        """Return the epochs that have rows in a table, in order."""
        return sorted(self.tables[table]["epoch"].unique().tolist())

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
        """All layers in order of depth. They include the ends of encoders where NC1 is not measured."""
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
        return [name for name in ("train", "test") if any(name in set(self.tables[t]["set"]) for t in ("nc1", "dib"))]

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
    """Run a script: read the runs that the arguments name, and call `write` with their groups and a folder.

    Parameters:
        description: of the script, for its help.
        write: writes the files of the script into the folder.
        arguments: of the command line (default: those of this process).
        by_depth: whether the script compares epochs by depth, and has the option --epochs.
    """
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs (default: the newest under runs/)")
    parser.add_argument(
        "--out", type=Path, help="folder to write to (default: that of the run; for several runs, the one that has all)"
    )
    parser.set_defaults(epochs=None)
    if by_depth:
        parser.add_argument(
            "--epochs", nargs="+", type=int, help="epochs to compare by depth (default: four from first to last)"
        )
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # some terminals lack ±
    try:
        runs = options.runs or [find_newest_run()]
        groups = read_groups(runs, options.epochs)
    except (ValueError, OSError) as error:
        exit_with_error(error)
    folder = runs[0] if len(runs) == 1 else Path(commonpath([run.resolve().parent for run in runs]))
    try:
        write(groups, options.out or folder)
    except OSError as error:
        exit_with_error(error)


def exit_with_error(reason: object) -> NoReturn:
    """Print the reason in one line and exit with status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def read_groups(folders: list[Path], epochs: list[int] | None = None) -> list[Group]:
    """Return the runs in these folders in the order given, joined where they differ only in their seed.

    Raises ValueError for a folder that does not hold a run, for two runs that do not differ, and for a requested epoch
    in which a run was not measured.
    """
    found: dict[str, list[tuple]] = {}
    for folder in folders:
        hparams = read_hparams(folder)
        runs = found.setdefault(json.dumps(select_settings(hparams), sort_keys=True), [])
        for other, flags, _ in runs:
            if flags["seed"] == hparams["seed"]:
                raise ValueError(f"{other} and {folder} have the same flags and seed: expected runs that differ")
        runs.append((folder, hparams, read_tables(folder)))
    settings = [select_settings(runs[0][1]) for runs in found.values()]
    groups = [
        join_runs(make_label(flags, settings, runs[0][0]), runs, epochs)
        for flags, runs in zip(settings, found.values(), strict=True)
    ]
    for group in groups:
        measured = sorted({*group.list_epochs("nc1"), *group.list_epochs("dib")})
        for epoch in (epochs or []) if measured else []:
            if epoch not in measured:
                listed = ", ".join(map(str, measured))
                raise ValueError(f"epoch {epoch} cannot be shown: {group.label} was measured in epochs {listed}")
    return groups


def read_hparams(folder: Path) -> dict:
    """Return the flags of a run, those of the first version under their present names."""
    path = folder / "hparams.json"
    try:
        hparams = json.loads(path.read_text("utf-8"))
        missing = [name for name in ("model", "data", "seed", "num_classes") if name not in hparams]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold the flags of a run: {getattr(error, 'strerror', error)}") from None
    if missing:
        raise ValueError(f"{path} does not hold the flags of a run: it lacks {missing[0]}")
    return {schema.RENAMED_HPARAMS.get(name, name): value for name, value in hparams.items()}


def select_settings(hparams: dict) -> dict:
    """Return the flags that determine the values of an epoch, except the seed.

    Flags that are off are left out, because a version that lacks a flag does not record it. A learning rate that a
    range test found is left out, because it follows from the other flags. The number of epochs is left out unless the
    schedule depends on it.
    """
    ignored = {"seed", *schema.ELSEWHERE, *DERIVED}
    if hparams.get("tune"):
        ignored.add("learning_rate")
    if hparams.get("schedule", "constant") != "constant":
        ignored.remove("epochs")
    return {
        name: value
        for name, value in hparams.items()
        if name not in ignored and value is not None and value is not False
    }


def make_label(flags: dict, others: list[dict], folder: Path) -> str:
    """Return model and data, and the flags in which runs of this model and data differ; if these are long, the folder.

    others: the flags of all groups.
    """
    alike = [other for other in others if (other["model"], other["data"]) == (flags["model"], flags["data"])]
    names = [name for name in flags if any(other.get(name) != flags[name] for other in alike)]
    differing = ", ".join(f"{name} {format_value(flags[name])}" for name in names)
    start = f"{flags['model']} on {flags['data']}"
    if len(differing) > 60:
        return f"{start}: {folder}"
    return f"{start}, {differing}" if differing else start


def format_value(value: object) -> str:
    """Return the value of a flag as text, lists and dicts without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_value(item)}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def join_runs(label: str, runs: list[tuple], epochs: list[int] | None) -> Group:
    """Return the group of these runs, each given as (folder, hparams, tables)."""
    folders, hparams, tables = zip(*runs, strict=True)
    lasts = [find_last_epoch(run) for run in tables]
    last = min(lasts)
    if last < max(lasts):
        label += f", up to epoch {last}"
    joined = {}
    for name in COLUMNS:
        parts = [run[name].assign(seed=flags["seed"]) for run, flags in zip(tables, hparams, strict=True)]
        joined[name] = pd.concat(parts, ignore_index=True).rename(columns={"split": "layer"})
        if name not in OPTIONAL:  # runs of other lengths end with an epoch that the others do not measure
            common = set.intersection(*(set(part["epoch"]) for part in parts))
            joined[name] = joined[name][joined[name]["epoch"].isin(common) & (joined[name]["epoch"] <= last)]
    full = joined["nc1"]["dim"].clip(upper=hparams[0]["num_classes"] - 1)  # all runs have the same classes
    joined["nc1"] = joined["nc1"].assign(short=joined["nc1"]["rank"] < full)
    joined["dib"] = update_input_upper(joined["dib"])
    joined["information"] = compute_information(joined["dib"], "epoch")
    joined["convergence_information"] = compute_information(joined["convergence"], "steps")
    return Group(label, list(folders), list(hparams), joined, last, epochs)


def find_last_epoch(tables: dict[str, pd.DataFrame]) -> int:
    """Return the last epoch that has all its rows, or -1 if there is none.

    A run that is in progress or was killed may have some rows of the next epoch. The rows of both sets in epochs.csv
    are the last that are written in an epoch.
    """
    sets = tables["epochs"].groupby("epoch")["set"].nunique()
    return int(sets.index[sets == 2].max()) if (sets == 2).any() else -1


def choose_log_spaced(epochs: list[int], count: int) -> list[int]:
    """Return at most `count` of these sorted epochs, the first and the last included.

    They are spaced evenly on a scale of log(1 + epoch). Where two would coincide there are fewer.
    """
    if not epochs:
        return []
    places = np.log1p(epochs)
    wanted = np.linspace(places[0], places[-1], count)
    return [epochs[i] for i in sorted({int(np.abs(places - place).argmin()) for place in wanted})]


def find_table(folder: Path, name: str) -> Path:
    """Return the path of a table of a run, under its old file name if only that is there."""
    path = folder / f"{name}.csv"
    old_paths = [folder / old for old, new in schema.RENAMED_FILES.items() if new == path.name]
    return next((each for each in (path, *old_paths) if each.exists()), path)


def read_tables(run: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a run by the names of COLUMNS. A measure that was switched off is an empty table.

    Raises ValueError, naming the file and if possible the line, for a table that cannot be read.
    """
    tables = {}
    for name, columns in COLUMNS.items():
        path = find_table(run, name)
        is_read = name not in OPTIONAL or path.exists()
        tables[name] = read_table(path, columns) if is_read else pd.DataFrame(columns=columns)
        if is_read and name in OPTIONAL and tables[name].empty:
            raise ValueError(f"{path}, line 2, is missing: expected a {OPTIONAL[name]}")
    if find_last_epoch(tables) < 0 and tables["lr_range"].empty:
        raise ValueError(f"{run / 'epochs.csv'} holds no finished epoch")
    return tables


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """Return a CSV with numbers as such. Columns of the first version have their present names.

    Raises ValueError, naming the file and if possible the line, if it lacks one of the columns, has a value that is not
    of its column, or has a row twice.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            text = path.read_text("utf-8")
            text = text[: text.rfind("\n") + 1]  # a run in progress may have written a part of a line
            table = pd.read_csv(
                StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False
            ).rename(columns=schema.RENAMED_COLUMNS)
    except (OSError, ValueError, pd.errors.ParserWarning) as error:  # pandas' errors are ValueErrors, and name the line
        raise ValueError(f"{path} is not a CSV of a run: {' '.join(str(error).split())}") from None
    missing = [column for column in columns if column not in table]
    if missing:
        raise ValueError(f"{path}, line 1, lacks the column {missing[0]!r}: expected {','.join(columns)}")
    for column in columns:
        texts = table[column].fillna("")
        if column == "set":
            bad, expected = ~texts.isin(["train", "test"]), "train or test"
        elif column in WORDS:
            bad, expected = texts == "", "a name"
        elif column in COUNTS:
            # epoch 0 is the network before training
            least, form = (0, "0|[1-9][0-9]{,8}") if column == "epoch" else (1, "[1-9][0-9]{,8}")
            bad, expected = ~texts.str.fullmatch(form), f"a whole number from {least}"
            table[column] = pd.to_numeric(texts, errors="coerce")
        else:
            table[column] = pd.to_numeric(texts, errors="coerce")
            bad, expected = table[column].isna() & (texts != "nan"), "a number"
        if bad.any():
            line = int(bad.argmax())
            raise ValueError(f"{path}, line {line + 2}: {column} is {texts[line]!r}, expected {expected}")
    keys = [column for column in columns if column in KEYS]
    repeated = table.duplicated(keys)
    if repeated.any():
        line = int(repeated.argmax())
        row = ", ".join(f"{key} {table[key][line]}" for key in keys)
        raise ValueError(f"{path}, line {line + 2}: {row} appears twice")
    return table


def update_input_upper(dib: pd.DataFrame) -> pd.DataFrame:
    """Lower `upper` of the input to the least of the same labeling in any epoch and at any split.

    The input has no encoder and does not change. Every encoder followed by its probe is a decoder of the input.
    """
    least = dib.groupby(["seed", "set", "permutation", "labeling"])["upper"].transform("min")
    return dib.assign(upper=dib["upper"].where(dib["layer"] != INPUT, least))


def compute_information(probes: pd.DataFrame, across: str) -> pd.DataFrame:
    """Return minimality and sufficiency in bits for every seed, set, layer and value of `across`, in order of depth.

    Minimality is the mean of entropy - upper over all labelings of all enumerations. Sufficiency is entropy - upper of
    the original labels. The columns minimality_by_loss and sufficiency_by_loss have the same of entropy - loss, which
    is what the probes themselves reached.

    across: "epoch" or "steps".
    """
    original = probes["labeling"] == "y"
    values = probes[["seed", across, "set", "layer"]].copy()
    keys = list(values)
    for end, column in (("", "upper"), ("_by_loss", "loss")):
        bits = (probes["entropy"] - probes[column]) / log(2)
        values[f"minimality{end}"], values[f"sufficiency{end}"] = bits[~original], bits[original]
    return values.groupby(keys, sort=False).mean().reset_index()


def compute_suboptimal_share(dib: pd.DataFrame) -> pd.Series:
    """Return the share of known suboptimal probes by set. A probe whose loss is NaN counts as one."""
    optimal = dib["loss"] - dib["upper"] <= schema.SUBOPTIMAL
    return 1 - optimal.groupby(dib["set"]).mean()


def average_over_seeds(table: pd.DataFrame, keys: list[str], value: str, log: bool = False) -> pd.DataFrame:
    """Return mean and standard deviation of a value by the keys, over the seeds for which it is finite.

    The columns are the keys, mean, low and high (a standard deviation below and above it) and count (the number of
    those seeds). The deviation is that with n - 1, and 0 for one seed.

    log: whether mean and deviation are those of the logarithm, for positive values on a log axis (a geometric mean).
    """
    values = table[value].astype(float).replace([np.inf, -np.inf], np.nan)
    if log:
        values = np.log(values.where(values > 0))
    over = table.assign(value=values).groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    std = over.pop("std").fillna(0)
    over["low"], over["high"] = over["mean"] - std, over["mean"] + std
    if log:
        over[["mean", "low", "high"]] = np.exp(over[["mean", "low", "high"]])
    return over
