"""Write the final figures of runs, mean and standard deviation over seeds, as Markdown and as LaTeX (booktabs)."""

import math
import re
from pathlib import Path

import pandas as pd

from analysis import tables
from analysis.tables import Group

SETS = ("train", "test")
NOT_MEASURED = "–"


def fits(groups: list[Group]) -> pd.DataFrame:
    """Loss (nats) and accuracy (%) after the last epoch: a row for each run, and one for the mean over the seeds."""
    rows = []
    for group in groups:
        table = group.tables["epochs"]
        table = table[table["epoch"] == group.last].assign(accuracy=100 * table["accuracy"])
        parts = [(f"seed {its['seed']}", table[table["seed"] == its["seed"]]) for its in group.hparams]
        if len(parts) > 1:
            parts.append((group.seeds(tables.MEAN_SD), table))
        for name, part in parts if group.last >= 0 else []:
            row = {"run": group.label, "seeds": name, "epochs": str(group.last)}
            for value, unit in (("loss", "nats"), ("accuracy", "%")):
                for each in SETS:
                    row[f"{value}, {each} ({unit})"] = cell(part.loc[part["set"] == each, value])
            rows.append(row)
    return pd.DataFrame(rows)


def layers(group: Group) -> pd.DataFrame:
    """NC1, minimality and sufficiency (bits) after the last epoch that has them, over seeds: a row for each layer.

    The input was measured in the first epoch, and does not change.
    """
    nc1, information = (
        table[(table["epoch"] == table["epoch"].max()) | (table["layer"] == tables.INPUT)]
        for table in (group.tables["nc1"], group.tables["information"])
    )
    first = [tables.INPUT] if tables.INPUT in {*nc1["layer"], *information["layer"]} else []
    rows = []
    for layer in [*first, *group.layers]:
        row = {"layer": layer}
        for each in SETS:
            its = nc1[(nc1["set"] == each) & (nc1["layer"] == layer)]
            row[f"NC1, {each}"] = cell(its["nc1"], none="rank 0") + rank(its)  # 0: the class means coincide
        for measure in ("minimality", "sufficiency"):
            for each in SETS:
                values = information.loc[(information["set"] == each) & (information["layer"] == layer), measure]
                row[f"{measure}, {each} (bits)"] = cell(values)
        rows.append(row)
    return pd.DataFrame(rows)


def rank(nc1: pd.DataFrame) -> str:
    """The rank of the class means where it is short, from least to largest over seeds: a lost direction lowers NC1."""
    least, largest = nc1["rank"].min(), nc1["rank"].max()
    if not nc1["short"].any() or largest == 0:
        return ""
    return f" (rank {least})" if least == largest else f" (rank {least} to {largest})"


def cell(values: pd.Series, none: str = "nan") -> str:
    """One value to four digits, or mean ± standard deviation (n - 1) of several to two digits of the latter.

    NaN is left out, and how many are left is said; none: what stands where none are.
    """
    present = values.dropna()
    if present.empty:
        return none if len(values) else NOT_MEASURED
    mean = present.mean()
    if not math.isfinite(mean):
        text = str(mean)
    elif len(present) == 1:
        text = digits(mean, 4, of=mean)
    elif (deviation := present.std()) <= 1e-9 * abs(mean):
        text = f"{digits(mean, 4, of=mean)} ± 0"
    else:
        text = f"{digits(mean, 2, of=deviation)} ± {digits(deviation, 2, of=deviation)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def digits(value: float, count: int, of: float) -> str:
    """The value, to the place where another one has so many significant digits."""
    place = math.floor(math.log10(abs(of))) if of else 0
    decimals = count - 1 - place
    if decimals <= 7 or not value:
        return f"{value:.{min(max(decimals, 0), 7)}f}"
    return f"{value:.{max(math.floor(math.log10(abs(value))) + decimals, 0)}e}"


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def latex(table: pd.DataFrame) -> str:
    """The table with a head of two lines: what was measured, and below it the set."""
    heads = [re.fullmatch(r"(\w+), (\w+)(.*)", name) or ("", "", name, "") for name in table]
    aligned = "".join("rl"[name in ("run", "seeds", "layer")] for name in table)
    table = table.set_axis(pd.MultiIndex.from_tuples([(head[1] + head[3], head[2]) for head in heads]), axis=1)
    text = table.to_latex(index=False, escape=True, column_format=aligned, multicolumn_format="c")
    text = re.sub(r"(?<= )-(?=\d)", "$-$", text)
    return text.replace("±", r"$\pm$").replace("–", "--")


def heads(group: Group) -> str:
    """How many of DIB's heads were not found, in a sentence; nothing where there are none."""
    shares = tables.beaten(group.tables["dib"])
    parts = " and ".join(f"{shares[each]:.1%} ({each} set)" for each in SETS if each in shares)
    if not parts:
        return ""
    return (
        f"Of DIB's decoders in all epochs {parts} ended more than {tables.BEATEN} bits above the least loss that is "
        "known to be possible: they were not found, and the table shows what is known."
    )


def when(group: Group) -> str:
    """The epoch after which the layers were measured last; those, where NC1 and DIB have different ones."""
    lasts = {name: max(group.epochs(table)) for name, table in (("NC1", "nc1"), ("DIB", "dib")) if group.epochs(table)}
    if len(set(lasts.values())) <= 1:
        return f"epoch {max(lasts.values(), default=group.last)}"
    return ", ".join(f"{name} epoch {epoch}" for name, epoch in lasts.items())


def titled(groups: list[Group]) -> list[tuple[str, pd.DataFrame, str]]:
    """The table of all runs and that of the layers of each group, with what they are and a note; none without rows."""
    found = [("Loss and accuracy", fits(groups), "")]
    for group in groups:
        title = f"{group.label}, {when(group)}, {group.seeds(tables.MEAN_SD)}"
        found.append((title, layers(group), heads(group)))
    return [each for each in found if len(each[1])]


def write(groups: list[Group], folder: Path) -> None:
    found = titled(groups)
    if not found:
        tables.refuse(f"{groups[0].folders[0]} holds no finished epoch, of which there could be a table")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        f"**{title}**\n\n{markdown(table)}" + (f"\n{note}\n" if note else "") for title, table, note in found
    )
    tables.put(folder / "table.md", text.encode(errors="replace"))
    tex = "\n".join(f"% {title}\n" + (f"% {note}\n" if note else "") + latex(table) for title, table, note in found)
    tables.put(folder / "table.tex", f"% needs \\usepackage{{booktabs}}\n\n{tex}".encode(errors="replace"))
    print(text)
    print(folder / "table.md", folder / "table.tex", sep="\n")


if __name__ == "__main__":
    tables.script(__doc__, write, by_depth=False)
