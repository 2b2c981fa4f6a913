"""What runs measured, as tables: read from their CSVs, and the runs that differ only in their seed put together."""

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

COLUMNS = {  # what is used
    "epochs": ["epoch", "set", "loss", "accuracy"],
    "nc1": ["epoch", "set", "layer", "dim", "rank", "nc1", "kept", "dropped"],
    "dib": ["epoch", "set", "split", "permutation", "labeling", "entropy", "loss", "bound"],
    "lr_range": ["step", "learning_rate", "loss", "smoothed", "chosen"],
    "settle": ["factor", "steps", "set", "split", "permutation", "labeling", "entropy", "loss", "bound"],
}
OPTIONAL = {"lr_range": "step", "settle": "head"}  # tables that a run need not have, and what is in a line of them
WORDS = ("set", "layer", "split", "labeling")
COUNTS = ("epoch", "factor", "steps")
# Of these together no two rows have the same.
KEYS = ("epoch", "step", "factor", "set", "layer", "split", "permutation", "labeling")
# Where and with what a run was made, which does not change what an epoch of it is.
ELSEWHERE = ("run_dir", "data_dir", "download", "resume", "device", "processes", "torch", "torchvision")
FOLLOWS = ("num_classes", "dib_samples", "chosen", "recipe")  # what follows from other flags, or says them again
INPUT = "input"  # the layer before the first, measured once
BEATEN = 1e-3  # bits: a head whose loss is further above what is known to be possible was not found
MEAN_SD = "mean ± sd of "


@dataclass
class Group:
    """Runs that differ only in their seed, up to the last epoch that all of them have.

    label: what sets the group apart from the others. tables: by name, as in the CSVs, with a column seed, splits called
    layers too, nc1 with short (the rank is below min(d, C - 1)), the input's bounds those of all epochs, and
    information (by epoch) and settling (by steps) beside them; a measure that was switched off is an empty table.
    last: -1 where no epoch is finished. asked: the epochs to be compared by depth, if not those evenly spaced.
    """

    label: str
    folders: list[Path]
    hparams: list[dict]
    tables: dict[str, pd.DataFrame]
    last: int
    asked: list[int] | None

    def seeds(self, of: str = "", table: str = "") -> str:
        """The seed; for several, what of how many: of all, or of those that have rows in a table."""
        seeds = self.tables[table]["seed"].unique() if table else [its["seed"] for its in self.hparams]
        return f"{of}{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"

    def epochs(self, table: str) -> list[int]:
        """Those in which a table has rows, in order."""
        return sorted(self.tables[table]["epoch"].unique().tolist())

    @property
    def uneven(self) -> bool:
        """Whether the measured epochs lie further and further apart, and are drawn on a log axis."""
        return any(len(set(np.diff(self.epochs(table)))) > 1 for table in ("nc1", "dib"))

    def shown(self, table: str) -> list[int]:
        """The epochs of a table that are compared by depth."""
        there = self.epochs(table)
        return spaced(there, 4) if self.asked is None else [epoch for epoch in self.asked if epoch in there]

    @property
    def layers(self) -> list[str]:
        """All layers in order of depth, those at which DIB splits the network but NC1 is not measured among them."""
        names = [name for name in self.tables["nc1"]["layer"].unique() if name != INPUT]
        before = None
        for split in pd.concat([self.tables[name]["layer"] for name in ("dib", "settle")]).unique():
            if split not in (INPUT, *names):
                names.insert(names.index(before) + 1 if before in names else 0, split)
            before = split
        return names

    @property
    def sets(self) -> list[str]:
        """The sets that were measured."""
        return [name for name in ("train", "test") if any(name in set(self.tables[t]["set"]) for t in ("nc1", "dib"))]

    def of(self, table: str, each: str) -> pd.DataFrame:
        """The rows of one set."""
        rows = self.tables[table]
        return rows[rows["set"] == each]


def newest(runs: Path = Path("runs")) -> Path:
    found = sorted(runs.glob("*/hparams.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run in {runs.resolve()}: make train makes one, and RUN=folder names one elsewhere")
    return found[-1].parent


def script(
    description: str,
    write: Callable[[list[Group], Path], None],
    arguments: list[str] | None = None,
    by_depth: bool = True,
) -> None:
    """Run a script: write the groups of the runs that the arguments name into a folder.

    by_depth: whether it shows epochs by depth, and can be told which.
    """
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    parser.add_argument("runs", nargs="*", type=Path, help="the folders of the runs (the newest under runs/)")
    parser.add_argument(
        "--out", type=Path, help="the folder to write to (that of the run; for several runs the one that holds them)"
    )
    parser.set_defaults(epochs=None)
    if by_depth:
        parser.add_argument("--epochs", nargs="+", type=int, help="the epochs shown by depth (four from first to last)")
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(errors="replace")  # where the terminal has no ±
    try:
        runs = options.runs or [newest()]
        found = groups(runs, options.epochs)
    except (ValueError, OSError) as error:
        refuse(error)
    own = runs[0] if len(runs) == 1 else Path(commonpath([run.resolve().parent for run in runs]))
    try:
        write(found, options.out or own)
    except OSError as error:
        refuse(error)


def put(path: Path, content: bytes) -> None:
    """Write a file, or leave the old one as it is."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def refuse(reason: object) -> NoReturn:
    """Say in one line what cannot be used, with exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {reason}", file=sys.stderr)
    sys.exit(2)


def groups(folders: list[Path], epochs: list[int] | None = None) -> list[Group]:
    """The runs in these folders, put together where they differ only in their seed, in the order given.

    Raises ValueError for a folder that does not hold a run, for two runs that do not differ at all, and for an epoch
    to be shown that a run does not have.
    """
    found: dict[str, list[tuple]] = {}
    for folder in folders:
        hparams = read_hparams(folder)
        others = found.setdefault(json.dumps(settings(hparams), sort_keys=True), [])
        for other, its, _ in others:
            if its["seed"] == hparams["seed"]:
                raise ValueError(f"{other} and {folder} have the same flags and seed: expected runs that differ")
        others.append((folder, hparams, read(folder)))
    flags = [settings(runs[0][1]) for runs in found.values()]
    made = [
        together(label(its, flags, runs[0][0]), runs, epochs) for its, runs in zip(flags, found.values(), strict=True)
    ]
    for group in made:
        measured = sorted({*group.epochs("nc1"), *group.epochs("dib")})
        for epoch in (epochs or []) if measured else []:
            if epoch not in measured:
                there = ", ".join(map(str, measured))
                raise ValueError(f"epoch {epoch} cannot be shown: {group.label} was measured in epochs {there}")
    return made


def read_hparams(folder: Path) -> dict:
    path = folder / "hparams.json"
    try:
        hparams = json.loads(path.read_text("utf-8"))
        missing = [name for name in ("model", "data", "seed", "num_classes") if name not in hparams]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold the flags of a run: {getattr(error, 'strerror', error)}") from None
    if missing:
        raise ValueError(f"{path} does not hold the flags of a run: it lacks {missing[0]}")
    return hparams


def settings(hparams: dict) -> dict:
    """The flags that make a run what it is, but for its seed and those that are off.

    A flag that is off is none, as in runs of versions that did not have it; a rate that a range test found follows
    from the others.
    """
    found = ("learning_rate",) if hparams.get("tune") else ()
    length = ("epochs",) if hparams.get("schedule", "constant") == "constant" else ()  # on which other schedules depend
    beside = ("seed", *ELSEWHERE, *FOLLOWS, *found, *length)
    return {
        name: value
        for name, value in hparams.items()
        if name not in beside and value is not None and value is not False
    }


def label(flags: dict, others: list[dict], folder: Path) -> str:
    """Model and data, and the flags in which runs of this model on this data differ; if they are many, the folder."""
    alike = [its for its in others if (its["model"], its["data"]) == (flags["model"], flags["data"])]
    names = [name for name in flags if any(its.get(name) != flags[name] for its in alike)]
    differing = ", ".join(f"{name} {text(flags[name])}" for name in names)
    start = f"{flags['model']} on {flags['data']}"
    if len(differing) > 60:
        return f"{start}: {folder}"
    return f"{start}, {differing}" if differing else start


def text(value: object) -> str:
    """A flag's value in words, lists and dicts without brackets."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {text(its)}" for name, its in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def together(label: str, runs: list[tuple], epochs: list[int] | None) -> Group:
    folders, hparams, tables = zip(*runs, strict=True)
    lasts = [finished(its) for its in tables]
    last = min(lasts)
    if last < max(lasts):
        label += f", up to epoch {last}"
    joined = {}
    for name in COLUMNS:
        each = [its[name].assign(seed=flags["seed"]) for its, flags in zip(tables, hparams, strict=True)]
        joined[name] = pd.concat(each, ignore_index=True).rename(columns={"split": "layer"})
        if name not in OPTIONAL:  # runs of other lengths end with an epoch that the others do not measure
            common = set.intersection(*(set(its["epoch"]) for its in each))
            joined[name] = joined[name][joined[name]["epoch"].isin(common) & (joined[name]["epoch"] <= last)]
    full = joined["nc1"]["dim"].clip(upper=hparams[0]["num_classes"] - 1)  # C is the data's, the same in all runs
    joined["nc1"] = joined["nc1"].assign(short=joined["nc1"]["rank"] < full)
    joined["dib"] = with_input_bounded(joined["dib"])
    joined["information"] = information(joined["dib"], "epoch")
    joined["settling"] = information(joined["settle"], "steps")
    return Group(label, list(folders), list(hparams), joined, last, epochs)


def finished(tables: dict[str, pd.DataFrame]) -> int:
    """The last epoch that has all its rows, -1 for none: a run that goes on, or was killed, has some of the next one.

    Those of both sets in epochs.csv are the last that are written of an epoch.
    """
    sets = tables["epochs"].groupby("epoch")["set"].nunique()
    return int(sets.index[sets == 2].max()) if (sets == 2).any() else -1


def spaced(epochs: list[int], count: int) -> list[int]:
    """So many of the epochs, in order, from the first to the last, evenly on a scale of log(1 + epoch); fewer where
    they would coincide."""
    if not epochs:
        return []
    places = np.log1p(epochs)
    wanted = np.linspace(places[0], places[-1], count)
    return [epochs[i] for i in sorted({int(np.abs(places - place).argmin()) for place in wanted})]


def read(run: Path) -> dict[str, pd.DataFrame]:
    """The tables of a run by name; a measure that was switched off is an empty table.

    Raises ValueError, naming the file and where it can the line, for a table that is not one of a run.
    """
    tables = {}
    for name, columns in COLUMNS.items():
        path = run / f"{name}.csv"
        there = name not in OPTIONAL or path.exists()
        tables[name] = read_table(path, columns) if there else pd.DataFrame(columns=columns)
        if there and name in OPTIONAL and tables[name].empty:
            raise ValueError(f"{path}, line 2: there is none, expected a {OPTIONAL[name]}")
    if finished(tables) < 0 and tables["lr_range"].empty:
        raise ValueError(f"{run / 'epochs.csv'} holds no finished epoch")
    return tables


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            text = path.read_text("utf-8")
            text = text[: text.rfind("\n") + 1]  # a run that goes on may be in the middle of a line
            table = pd.read_csv(
                StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False
            )
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
    again = table.duplicated(keys)
    if again.any():
        line = int(again.argmax())
        row = ", ".join(f"{key} {table[key][line]}" for key in keys)
        raise ValueError(f"{path}, line {line + 2}: {row} is there twice")
    return table


def with_input_bounded(dib: pd.DataFrame) -> pd.DataFrame:
    """The heads, those of the input with the least that is known of their labeling at any epoch and split.

    The input has no encoder and does not change: whatever an encoder and a head reached, a decoder of the input can.
    """
    least = dib.groupby(["seed", "set", "permutation", "labeling"])["bound"].transform("min")
    return dib.assign(bound=dib["bound"].where(dib["layer"] != INPUT, least))


def information(heads: pd.DataFrame, across: str) -> pd.DataFrame:
    """Minimality and sufficiency in bits of every seed, set, split (layer) and epoch or steps, in order of depth.

    Minimality: the mean over all labelings of all enumerations of entropy - bound; sufficiency: that of the labels.
    The columns minimality_by_loss and sufficiency_by_loss have what the heads themselves reached, by entropy - loss.
    """
    original = heads["labeling"] == "y"
    values = heads[["seed", across, "set", "layer"]].copy()
    keys = list(values)
    for end, least in (("", "bound"), ("_by_loss", "loss")):
        bits = (heads["entropy"] - heads[least]) / log(2)
        values[f"minimality{end}"], values[f"sufficiency{end}"] = bits[~original], bits[original]
    return values.groupby(keys, sort=False).mean().reset_index()


def beaten(dib: pd.DataFrame) -> pd.Series:
    """The share of each set's heads that were not found: loss not a number, or more than BEATEN bits above bound."""
    found = (dib["loss"] - dib["bound"]) / log(2) <= BEATEN
    return 1 - found.groupby(dib["set"]).mean()


def over_seeds(table: pd.DataFrame, keys: list[str], value: str, log: bool = False) -> pd.DataFrame:
    """Mean and standard deviation (n - 1; 0 for one seed) of a value by the keys, over seeds that have a finite one.

    Columns mean, low and high (a standard deviation below and above) and count, the number of those seeds. log: mean
    and deviation are those of the logarithm, for positive values on a log axis (a geometric mean).
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
