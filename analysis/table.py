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
        table = last(group.tables["epochs"], ["set"])
        table = table.assign(accuracy=100 * table["accuracy"])
        parts = [(f"seed {its['seed']}", table[table["seed"] == its["seed"]]) for its in group.hparams]
        if len(parts) > 1:
            parts.append((group.seeds, table))
        for name, part in parts if group.last else []:
            row = {"run": group.label, "seeds": name, "epochs": str(group.last)}
            for value, unit in (("loss", "nats"), ("accuracy", "%")):
                for each in SETS:
                    row[f"{value}, {each} ({unit})"] = over(part.loc[part["set"] == each, value])
            rows.append(row)
    return pd.DataFrame(rows)


def layers(groups: list[Group]) -> pd.DataFrame:
    """NC1, minimality and sufficiency (bits) after the last epoch: a row for each layer, over the seeds of a group."""
    rows = []
    for group in groups:
        nc1 = last(group.tables["nc1"], ["set", "layer"])
        information = last(group.tables["information"], ["set", "split"])
        measured = [tables.INPUT] if tables.INPUT in set(information["split"]) else []
        for layer in [*measured, *group.layers]:
            row = {"run": group.label, "seeds": group.seeds, "layer": layer}
            for table, key, value, title in (
                (nc1, "layer", "nc1", "NC1, {}"),
                (information, "split", "minimality", "minimality, {} (bits)"),
                (information, "split", "sufficiency", "sufficiency, {} (bits)"),
            ):
                for each in SETS:
                    row[title.format(each)] = over(table.loc[(table["set"] == each) & (table[key] == layer), value])
            rows.append(row)
    return pd.DataFrame(rows)


def last(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """The rows of the last epoch in which each was measured, for the input the first."""
    return table[table["epoch"] == table.groupby(keys)["epoch"].transform("max")]


def over(values: pd.Series) -> str:
    """One value to four digits, or mean ± standard deviation (n - 1) of several to two digits of the latter.

    A value that is NaN, the NC1 of a layer whose class means coincide, is left out, and how many are left is said.
    """
    present = values.dropna()
    if present.empty:
        return "rank 0" if len(values) else NOT_MEASURED
    mean, deviation = present.mean(), present.std()
    if len(present) == 1:
        text = digits(mean, 4, of=mean)
    elif deviation <= 1e-9 * abs(mean):
        text = f"{digits(mean, 4, of=mean)} ± 0"
    else:
        text = f"{digits(mean, 2, of=deviation)} ± {digits(deviation, 2, of=deviation)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def digits(value: float, count: int, of: float) -> str:
    """The value, to the place where another one has so many significant digits."""
    decimals = count - 1 - math.floor(math.log10(abs(of))) if of else count
    return f"{value:.{min(max(decimals, 0), 8)}f}"


def markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def latex(table: pd.DataFrame) -> str:
    text = table.to_latex(index=False, escape=True, column_format="ll" + "r" * (len(table.columns) - 2))
    text = re.sub(r"(?<= )-(?=\d)", "$-$", text)
    return text.replace("±", r"$\pm$").replace("–", "--")


def write(groups: list[Group], folder: Path) -> None:
    both = [table for table in (fits(groups), layers(groups)) if len(table)]
    if not both:
        raise ValueError(f"{groups[0].folders[0]} holds no finished epoch, of which there could be a table")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text("\n".join(map(markdown, both)))
    (folder / "table.tex").write_text("% needs \\usepackage{booktabs}\n" + "\n".join(map(latex, both)))
    print((folder / "table.md").read_text())
    print(folder / "table.md", folder / "table.tex", sep="\n")


if __name__ == "__main__":
    tables.script(__doc__, write)
