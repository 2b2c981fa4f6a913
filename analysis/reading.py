"""Read the CSVs and the flags of a run from its folder."""

import json
import math
import warnings
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas as pd

from layerwise import schema

# The columns that are read, by the names of the files without ".csv". epochs.csv is read first. Because a run writes it
# last, the tables that are read afterwards contain all rows of the epochs in epochs.csv.
COLUMNS = {
    Path(name).stem: [column for column in header.split(",") if column != "seconds"]
    for name, header in {
        "epochs.csv": schema.COLUMNS["epochs.csv"],
        **schema.COLUMNS,
        "lr_range.csv": schema.LR_RANGE,
        "convergence.csv": schema.CONVERGENCE,
        "noise.csv": schema.NOISE,
    }.items()
}
# optional tables, and the word for one of their rows
OPTIONAL = {"lr_range": "step", "convergence": "probe", "noise": "probe"}
# columns that earlier versions did not write: they are NaN
OPTIONAL_COLUMNS = {"dib": ("lower",), "convergence": ("lower", "epoch")}
SETS = ("train", "test")
WORDS = ("set", "layer", "split", "labeling")
COUNTS = ("epoch", "factor", "steps")
# No two rows of a table have the same values in these columns.
KEYS = ("epoch", "step", "factor", "set", "layer", "split", "enumeration", "labeling")
DERIVED = ("num_classes", "dib_samples", "linear_splits", "chosen", "recipe")  # hparams that follow from other flags
INPUT = "input"  # name of the raw input in the column `layer`; it is measured in one epoch only


@dataclass
class RunTables:
    """The contents of a run's folder: its flags, and its tables by the names of COLUMNS.

    If NC1 or DIB was not measured, its table is empty.
    """

    folder: Path
    hparams: dict
    tables: dict[str, pd.DataFrame]

    @property
    def settings(self) -> dict:
        """The flags that determine the values of an epoch, except the seed.

        Flags that are None or False are left out, so that runs of versions without the flag compare equal. A learning
        rate that a range test selected is left out, because it is determined by the other flags. The number of epochs
        is left out unless the schedule depends on it.
        """
        ignored = {"seed", "save_weights", *schema.MAY_CHANGE, *DERIVED}
        if self.hparams.get("tune"):
            ignored.add("learning_rate")
        if self.hparams.get("schedule", "constant") != "constant":
            ignored.remove("epochs")
        return {
            name: value
            for name, value in self.hparams.items()
            if name not in ignored and value is not None and value is not False
        }

    @property
    def last_epoch(self) -> int:
        """The last epoch that has all its rows, or -1 if there is none.

        A run that is in progress or was killed may have some rows of the next epoch. epochs.csv is written last in an
        epoch, with a row for each set.
        """
        sets = self.tables["epochs"].groupby("epoch")["set"].nunique()
        finished = sets.index[sets == len(SETS)]
        return int(finished.max()) if len(finished) else -1


def read_run(folder: Path) -> RunTables:
    """Return the flags and tables of a run. Raise ValueError if one of its files is not valid."""
    run = RunTables(folder, read_hparams(folder), read_tables(folder))
    # earlier versions measured convergence in the last epoch only
    run.tables["convergence"] = run.tables["convergence"].fillna({"epoch": run.last_epoch}).astype({"epoch": int})
    if run.last_epoch < 0 and run.tables["lr_range"].empty:
        raise ValueError(f"{folder / 'epochs.csv'} holds no finished epoch")
    return run


def read_hparams(folder: Path) -> dict:
    """Return the flags of a run. Flags of the first version have their present names and values."""
    path = folder / "hparams.json"
    try:
        hparams = json.loads(path.read_text("utf-8"))
        missing = [name for name in ("model", "data", "seed", "num_classes") if name not in hparams]
        if "labelings" in hparams:  # the number of enumerations, of which the first was in data order
            random = hparams["labelings"] - 1
            hparams["labelings"] = f"data and {random} random" if random else "data"
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} does not hold the flags of a run: {getattr(error, 'strerror', error)}") from None
    if missing:
        raise ValueError(f"{path} does not hold the flags of a run: it lacks {missing[0]}")
    return {schema.RENAMED_HPARAMS.get(name, name): value for name, value in hparams.items()}


def find_table(folder: Path, name: str) -> Path:
    """Return the path of a table of a run. If only a file with its old name exists, return the path of this file."""
    path = folder / f"{name}.csv"
    old_paths = [folder / old for old, new in schema.RENAMED_FILES.items() if new == path.name]
    return next((each for each in (path, *old_paths) if each.exists()), path)


def read_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a run by the names of COLUMNS. An optional table without a file is empty."""
    tables = {}
    for name, columns in COLUMNS.items():
        path = find_table(folder, name)
        if name in OPTIONAL and not path.exists():
            tables[name] = pd.DataFrame(columns=columns)
            continue
        tables[name] = read_table(path, columns, OPTIONAL_COLUMNS.get(name, ()))
        if name in OPTIONAL and tables[name].empty:
            raise ValueError(f"{path} has no rows: expected at least one {OPTIONAL[name]}")
    return tables


def read_table(path: Path, columns: list[str], optional: tuple[str, ...]) -> pd.DataFrame:
    """Return a CSV with numbers as such. Columns of the first version are renamed to their present names.

    optional: columns that may be missing. They are NaN then.

    Raises ValueError if a column is missing, a value is not valid, or a row appears twice. The message gives the file
    and, if possible, the line.
    """
    table = read_texts(path)
    missing = [column for column in columns if column not in (*table, *optional)]
    if missing:
        raise ValueError(f"{path}, line 1, lacks the column {missing[0]!r}: expected {','.join(columns)}")
    for column in columns:
        if column not in table:
            table[column] = math.nan
            continue
        texts = table[column].fillna("")
        if column not in WORDS:
            table[column] = pd.to_numeric(texts, errors="coerce")
        if column == "set":
            is_valid, expected = texts.isin(SETS), "train or test"
        elif column in WORDS:
            is_valid, expected = texts != "", "a name"
        elif column == "epoch":  # epoch 0 is the network before training
            is_valid, expected = texts.str.fullmatch("0|[1-9][0-9]{,8}"), "a whole number from 0"
        elif column in COUNTS:
            is_valid, expected = texts.str.fullmatch("[1-9][0-9]{,8}"), "a whole number from 1"
        else:
            is_valid, expected = table[column].notna() | (texts == "nan"), "a number"
        if not is_valid.all():
            line = int(is_valid.argmin())
            raise ValueError(f"{path}, line {line + 2}: {column} is {texts[line]!r}, expected {expected}")
    keys = [column for column in columns if column in KEYS]
    is_repeated = table.duplicated(keys)
    if is_repeated.any():
        line = int(is_repeated.argmax())
        row = ", ".join(f"{key} {table[key][line]}" for key in keys)
        raise ValueError(f"{path}, line {line + 2}: {row} appears twice")
    return table


def read_texts(path: Path) -> pd.DataFrame:
    """Return a CSV with all cells as text."""
    try:
        text = path.read_text("utf-8")
        text = text[: text.rfind("\n") + 1]  # the last line of a run in progress may be incomplete
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            table = pd.read_csv(
                StringIO(text), dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False
            )
    except (OSError, ValueError, pd.errors.ParserWarning) as error:  # the errors of pandas contain the line
        raise ValueError(f"{path} is not a CSV of a run: {' '.join(str(error).split())}") from None
    return table.rename(columns=schema.RENAMED_COLUMNS)
