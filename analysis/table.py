"""Write the final numbers of runs, mean and standard deviation over seeds, as Markdown and as LaTeX (booktabs)."""

import math
import re
from pathlib import Path

import pandas as pd

from analysis import tables
from analysis.tables import Group
from layerwise import runs

SETS = ("train", "test")
NOT_MEASURED = "–"


def tabulate_training(groups: list[Group]) -> pd.DataFrame:
    """Return loss (nats) and accuracy (%) after the last epoch: a row for each run, and one for the mean over seeds."""
    rows = []
    for group in groups:
        table = group.tables["epochs"]
        table = table[table["epoch"] == group.last].assign(accuracy=100 * table["accuracy"])
        parts = [(f"seed {flags['seed']}", table[table["seed"] == flags["seed"]]) for flags in group.hparams]
        if len(parts) > 1:
            parts.append((group.describe_seeds(tables.MEAN_SD), table))
        for name, part in parts if group.last >= 0 else []:
            row = {"run": group.label, "seeds": name, "epochs": str(group.last)}
            for value, unit in (("loss", "nats"), ("accuracy", "%")):
                for set_name in SETS:
                    row[f"{value}, {set_name} ({unit})"] = format_mean(part.loc[part["set"] == set_name, value])
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_layers(group: Group) -> pd.DataFrame:
    """Return NC1, minimality and sufficiency (bits) after the last epoch that has them, over seeds: a row per layer.

    The input does not change, and is measured in one epoch only.
    """
    nc1, information = (
        table[(table["epoch"] == table["epoch"].max()) | (table["layer"] == tables.INPUT)]
        for table in (group.tables["nc1"], group.tables["information"])
    )
    first = [tables.INPUT] if tables.INPUT in {*nc1["layer"], *information["layer"]} else []
    rows = []
    for layer in [*first, *group.layers]:
        row = {"layer": layer}
        for set_name in SETS:
            values = nc1[(nc1["set"] == set_name) & (nc1["layer"] == layer)]
            # NC1 is NaN if the class means coincide
            row[f"NC1, {set_name}"] = format_mean(values["nc1"], nan="rank 0") + format_rank(values)
        for measure in ("minimality", "sufficiency"):
            for set_name in SETS:
                chosen = (information["set"] == set_name) & (information["layer"] == layer)
                row[f"{measure}, {set_name} (bits)"] = format_mean(information.loc[chosen, measure])
        rows.append(row)
    return pd.DataFrame(rows)


def format_rank(nc1: pd.DataFrame) -> str:
    """Return the least and the largest rank of the class means over seeds, or nothing if no rank is short.

    A short rank has to be shown, because a direction that the class means lost lowers NC1.
    """
    least, largest = nc1["rank"].min(), nc1["rank"].max()
    if not nc1["short"].any() or largest == 0:
        return ""
    return f" (rank {least})" if least == largest else f" (rank {least} to {largest})"


def format_mean(values: pd.Series, nan: str = "nan") -> str:
    """Return one value with four digits, or mean ± standard deviation (n - 1) with two digits of the latter.

    NaN is left out. If there are others, their number is given; if there are none, the text is `nan`.
    """
    present = values.dropna()
    if present.empty:
        return nan if len(values) else NOT_MEASURED
    mean = present.mean()
    if not math.isfinite(mean):
        text = str(mean)
    elif len(present) == 1:
        text = format_digits(mean, 4, of=mean)
    elif (deviation := present.std()) <= 1e-9 * abs(mean):
        text = f"{format_digits(mean, 4, of=mean)} ± 0"
    else:
        text = f"{format_digits(mean, 2, of=deviation)} ± {format_digits(deviation, 2, of=deviation)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def format_digits(value: float, count: int, of: float) -> str:
    """Return the value, rounded to the decimal place of the count-th significant digit of another number, `of`."""
    place = math.floor(math.log10(abs(of))) if of else 0
    decimals = count - 1 - place
    if decimals <= 7 or not value:
        return f"{value:.{min(max(decimals, 0), 7)}f}"
    return f"{value:.{max(math.floor(math.log10(abs(value))) + decimals, 0)}e}"


def format_markdown(table: pd.DataFrame) -> str:
    """Return a table of texts in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def format_latex(table: pd.DataFrame) -> str:
    """Return a table of texts in LaTeX. Its titles have two lines: what was measured, and below it the set."""
    titles = [re.fullmatch(r"(\w+), (\w+)(.*)", name) or ("", "", name, "") for name in table]
    aligned = "".join("rl"[name in ("run", "seeds", "layer")] for name in table)
    table = table.set_axis(pd.MultiIndex.from_tuples([(title[1] + title[3], title[2]) for title in titles]), axis=1)
    text = table.to_latex(index=False, escape=True, column_format=aligned, multicolumn_format="c")
    text = re.sub(r"(?<= )-(?=\d)", "$-$", text)
    return text.replace("±", r"$\pm$").replace("–", "--")


def describe_suboptimal_probes(group: Group) -> str:
    """Return a sentence with the share of known suboptimal probes, or nothing if there are no probes."""
    shares = tables.compute_suboptimal_share(group.tables["dib"])
    parts = " and ".join(f"{shares[name]:.1%} ({name} set)" for name in SETS if name in shares)
    if not parts:
        return ""
    return (
        f"Of the probes of all epochs, {parts} are known suboptimal: a loss more than {tables.SUBOPTIMAL_BITS:g} bits "
        "lower is known to be possible. The table uses the lowest known loss."
    )


def describe_epoch(group: Group) -> str:
    """Return the epoch after which the layers were measured last, or both epochs if NC1 and DIB have different ones."""
    measured = {name: group.list_epochs(table) for name, table in (("NC1", "nc1"), ("DIB", "dib"))}
    lasts = {name: epochs[-1] for name, epochs in measured.items() if epochs}
    if len(set(lasts.values())) <= 1:
        return f"epoch {max(lasts.values(), default=group.last)}"
    return ", ".join(f"{name} epoch {epoch}" for name, epoch in lasts.items())


def make_tables(groups: list[Group]) -> list[tuple[str, pd.DataFrame, str]]:
    """Return (title, table, note) of all runs and of the layers of each group. Tables without rows are left out."""
    found = [("Loss and accuracy", tabulate_training(groups), "")]
    for group in groups:
        title = f"{group.label}, {describe_epoch(group)}, {group.describe_seeds(tables.MEAN_SD)}"
        found.append((title, tabulate_layers(group), describe_suboptimal_probes(group)))
    return [each for each in found if len(each[1])]


def write(groups: list[Group], folder: Path) -> None:
    """Write table.md and table.tex into the folder, and print the former."""
    found = make_tables(groups)
    if not found:
        tables.exit_with_error(f"{groups[0].folders[0]} holds no finished epoch: expected at least one")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        f"**{title}**\n\n{format_markdown(table)}" + (f"\n{note}\n" if note else "") for title, table, note in found
    )
    runs.write_atomically(folder / "table.md", text.encode(errors="replace"))
    tex = "\n".join(
        f"% {title}\n" + (f"% {note}\n" if note else "") + format_latex(table) for title, table, note in found
    )
    runs.write_atomically(folder / "table.tex", f"% needs \\usepackage{{booktabs}}\n\n{tex}".encode(errors="replace"))
    print(text)
    print(folder / "table.md", folder / "table.tex", sep="\n")


if __name__ == "__main__":
    tables.run_script(__doc__, write, by_depth=False)
