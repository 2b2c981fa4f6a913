"""Write the final values of runs, with mean and standard deviation over seeds, as Markdown and as LaTeX (booktabs)."""

import math
import re
from pathlib import Path

import pandas as pd

from analysis.reading import INPUT, SETS
from analysis.statistics import (
    QUANTITIES,
    SUBOPTIMAL_BITS,
    compute_linear_gaps,
    compute_suboptimal_share,
    explain_unequal_sets,
)
from analysis.tables import MEAN_SD, Group, exit_with_error, run_script
from layerwise.runs import write_atomically
from layerwise.schema import PROVED

NOT_MEASURED = "–"
# The columns of the table of controls: (column of the table information, meaning).
CONTROLS = {
    "shuffled": (
        "shuffled",
        "the information about the labels in a random order, which decoders can only memorise. Sufficiency counts only "
        "where it is higher",
    ),
    "held-out": (
        "held_out",
        "the information about the labels of the test set that probes of the training set can use",
    ),
    "noise": ("minimality", "the minimality of linear probes on as many Gaussian samples of the same dimension"),
    "deviation": ("deviation", "the standard deviation of minimality over the enumerations"),
}


def tabulate_training(groups: list[Group]) -> pd.DataFrame:
    """Return loss (nats) and accuracy (%) after the last epoch: a row for each run, and one for the mean over seeds."""
    rows = []
    for group in groups:
        table = group.tables["epochs"]
        table = table[table["epoch"] == group.last].assign(accuracy=100 * table["accuracy"])
        parts = [(f"seed {flags['seed']}", table[table["seed"] == flags["seed"]]) for flags in group.hparams]
        if len(parts) > 1:
            parts.append((group.describe_seeds(MEAN_SD), table))
        for name, part in parts if group.last >= 0 else []:
            row = {"run": group.label, "seeds": name, "epochs": str(group.last)}
            for value, unit in (("loss", "nats"), ("accuracy", "%")):
                for set_name in SETS:
                    row[f"{value}, {set_name} ({unit})"] = format_mean(part.loc[part["set"] == set_name, value])
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_layers(group: Group) -> pd.DataFrame:
    """Return NC1, minimality and sufficiency (bits) in the last measured epoch: a row for each layer, over seeds."""
    nc1, information = group.select_last("nc1"), group.select_last("information")
    rows = []
    for layer in list_layers(group):
        row = {"layer": layer}
        for set_name in SETS:
            values = nc1[(nc1["set"] == set_name) & (nc1["layer"] == layer)]
            # NC1 is NaN if the class means coincide
            row[f"NC1, {set_name}"] = format_mean(values["nc1"], nan="rank 0") + format_rank(values)
        for quantity in QUANTITIES:
            for set_name in SETS:
                chosen = (information["set"] == set_name) & (information["layer"] == layer)
                row[f"{quantity}, {set_name} (bits)"] = format_mean(information.loc[chosen, quantity])
        rows.append(row)
    return pd.DataFrame(rows)


def list_layers(group: Group) -> list[str]:
    """Return the layers in order of depth, after the input if it was measured."""
    is_measured = any(INPUT in group.tables[name]["layer"].array for name in ("nc1", "information"))
    return [INPUT, *group.layers] if is_measured else group.layers


def tabulate_controls(group: Group) -> pd.DataFrame:
    """Return the controls of DIB (bits) in the last measured epoch: a row for each layer, over seeds.

    CONTROLS describes the columns. Those without any value are left out.
    """
    information, noise = group.select_last("information"), group.tables["noise_information"]
    columns = {}
    for title, (column, _) in CONTROLS.items():
        table = noise if title == "noise" else information
        for set_name in SETS:
            values = table[table["set"] == set_name].set_index("layer")[column].dropna()
            if len(values):
                columns[f"{title}, {set_name} (bits)"] = [
                    format_mean(values[values.index == layer]) for layer in list_layers(group)
                ]
    return pd.DataFrame({"layer": list_layers(group), **columns} if columns else {})


def format_rank(nc1: pd.DataFrame) -> str:
    """Return a note on the rank of the class means, or an empty string if the rank is full for all seeds.

    A deficient rank is shown, because it lowers NC1.
    """
    lowest, highest = nc1["rank"].min(), nc1["rank"].max()
    if not nc1["rank_deficient"].any() or highest == 0:
        return ""
    return f" (rank {lowest})" if lowest == highest else f" (rank {lowest} to {highest})"


def format_mean(values: pd.Series, nan: str = "nan") -> str:
    """Format one value with four significant digits, or mean ± standard deviation (ddof=1).

    The standard deviation has two significant digits, and the mean as many decimal places. NaN values are ignored. If
    some values are NaN, the number of the others is appended. If all are NaN, the text is `nan`.
    """
    present = values.dropna()
    if present.empty:
        return nan if len(values) else NOT_MEASURED
    mean = present.mean()
    if not math.isfinite(mean):
        text = str(mean)
    elif len(present) == 1:
        text = format_digits(mean, 4, of=mean)
    else:
        deviation = present.std()
        if deviation <= 1e-9 * abs(mean):
            text = f"{format_digits(mean, 4, of=mean)} ± 0"
        else:
            text = f"{format_digits(mean, 2, of=deviation)} ± {format_digits(deviation, 2, of=deviation)}"
    return text if len(present) == len(values) else f"{text} ({len(present)} of {len(values)})"


def format_digits(value: float, count: int, of: float) -> str:
    """Round a value to the decimal place of the last of `count` significant digits of the number `of`."""
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
    """Return a table of texts in LaTeX. A column title "loss, train (nats)" is split into two lines."""
    titles = [re.fullmatch(r"([\w-]+), (\w+)(.*)", name) or ("", "", name, "") for name in table]
    aligned = "".join("l" if name in ("run", "seeds", "layer") else "r" for name in table)
    table = table.set_axis(pd.MultiIndex.from_tuples([(title[1] + title[3], title[2]) for title in titles]), axis=1)
    text = table.to_latex(index=False, escape=True, column_format=aligned, multicolumn_format="c")
    text = re.sub(r"(?<= )-(?=\d)", "$-$", text)
    return text.replace("±", r"$\pm$").replace("–", "--")


def describe_controls(controls: pd.DataFrame) -> str:
    """Return a note that describes the columns of the table of controls."""
    found = [title for title in CONTROLS if any(name.startswith(title) for name in controls)]
    return " ".join(f"{title}: {CONTROLS[title][1]}." for title in found)


def describe_information(group: Group) -> str:
    """Return a note on minimality and sufficiency, or an empty string if there are no probes."""
    information = group.tables["information"]
    if information.empty:
        return ""
    notes = [describe_suboptimal_probes(group), describe_linear_probes(group)]
    for quantity, column in QUANTITIES.items():
        means = information.groupby("set")[column].mean().dropna()
        parts = " and ".join(f"{means[name]:.4f} bits ({name} set)" for name in SETS if name in means)
        notes.append(f"The ceiling of {quantity} is {parts}." if parts else "")
    reason = explain_unequal_sets(group.hparams)
    if reason and set(SETS) <= set(information["set"]):
        notes.append(
            f"Minimality and sufficiency of the two sets cannot be compared: {reason}. Use --dib-size to measure both "
            "sets at equal size."
        )
    return " ".join(note for note in notes if note)


def describe_linear_probes(group: Group) -> str:
    """Return a note on how far linear probes are from their optima, or an empty string if there are none."""
    gaps = compute_linear_gaps(group.tables["dib"], group.hparams)
    if gaps.empty:
        return ""
    unproved = int((~(gaps <= PROVED)).sum())  # `~`, so that NaN counts
    return (
        f"The loss of linear probes is above the optimum by at most {gaps.max():.1e} nats. {unproved} of {len(gaps):,} "
        f"are not proved to be within {PROVED:.0e} nats."
    )


def describe_suboptimal_probes(group: Group) -> str:
    """Return a note on the share of known suboptimal probes, or an empty string if there are no probes."""
    shares = compute_suboptimal_share(group.tables["dib"])
    parts = " and ".join(f"{shares[name]:.1%} ({name} set)" for name in SETS if name in shares)
    if not parts:
        return ""
    return (
        f"Of the probes of all epochs, {parts} are known suboptimal: their loss exceeds the smallest known upper bound "
        f"by more than {SUBOPTIMAL_BITS:g} bits. The table uses this bound."
    )


def describe_epoch(group: Group) -> str:
    """Return the last measured epoch as text, or the last epochs of NC1 and DIB if they differ."""
    measured = {name: group.list_epochs(table) for name, table in (("NC1", "nc1"), ("DIB", "dib"))}
    lasts = {name: epochs[-1] for name, epochs in measured.items() if epochs}
    if len(set(lasts.values())) <= 1:
        return f"epoch {max(lasts.values(), default=group.last)}"
    return ", ".join(f"{name} epoch {epoch}" for name, epoch in lasts.items())


def make_tables(groups: list[Group]) -> list[tuple[str, pd.DataFrame, str]]:
    """Return (title, table, note) of all runs, and of the layers and the controls of each group.

    Empty tables are left out.
    """
    found = [("Loss and accuracy", tabulate_training(groups), "")]
    for group in groups:
        title = f"{group.label}, {describe_epoch(group)}, {group.describe_seeds(MEAN_SD)}"
        controls = tabulate_controls(group)
        found.append((title, tabulate_layers(group), describe_information(group)))
        found.append((f"{title}: controls", controls, describe_controls(controls)))
    return [each for each in found if len(each[1])]


def write_tables(groups: list[Group], folder: Path) -> None:
    """Write table.md and table.tex into the folder, and print the Markdown."""
    found = make_tables(groups)
    if not found:
        exit_with_error(f"{groups[0].folders[0]} holds no finished epoch: expected at least one")
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(
        f"**{title}**\n\n{format_markdown(table)}" + (f"\n{note}\n" if note else "") for title, table, note in found
    )
    write_atomically(folder / "table.md", text.encode(errors="replace"))
    tex = "\n".join(
        f"% {title}\n" + (f"% {note}\n" if note else "") + format_latex(table) for title, table, note in found
    )
    write_atomically(folder / "table.tex", f"% needs \\usepackage{{booktabs}}\n\n{tex}".encode(errors="replace"))
    print(text)
    print(folder / "table.md", folder / "table.tex", sep="\n")


if __name__ == "__main__":
    run_script(__doc__, write_tables, by_depth=False)
