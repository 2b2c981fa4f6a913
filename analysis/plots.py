"""Draw the figures of a run from its CSVs into the run's folder figures/, each as PNG and PDF."""

import argparse
import sys
import warnings
from itertools import pairwise
from math import log
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "pdf.fonttype": 42,  # fonts as text, as publishers ask
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
COLUMNS = {  # what is drawn
    "epochs": ["epoch", "set", "loss", "accuracy"],
    "nc1": ["epoch", "set", "layer", "nc1"],
    "dib": ["epoch", "set", "split", "labeling", "entropy", "loss", "drop"],
}
LR_RANGE = ["step", "learning_rate", "loss", "smoothed", "chosen"]
WORDS = ("set", "layer", "split", "labeling")
VIRIDIS = ListedColormap(
    matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 256))
)  # without the yellow, faint on paper
MARKERS = "osD^v<>Pph*X"
INPUT = "input"  # the split without encoder, measured once


def newest(runs: Path = Path("runs")) -> Path:
    found = sorted(runs.glob("*/hparams.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run in {runs.resolve()}: make train makes one, and RUN=folder names one elsewhere")
    return found[-1].parent


def read(run: Path) -> dict[str, pd.DataFrame]:
    """The tables of a run by name; a measure that was switched off is an empty table.

    Raises ValueError, naming the file and where it can the line, for a table that is not one of a run.
    """
    tables = {name: read_table(run / f"{name}.csv", columns) for name, columns in COLUMNS.items()}
    if (run / "lr_range.csv").exists():
        tables["lr_range"] = read_table(run / "lr_range.csv", LR_RANGE)
        if tables["lr_range"].empty:
            raise ValueError(f"{run / 'lr_range.csv'} holds no step")
    elif tables["epochs"].empty:
        raise ValueError(f"{run / 'epochs.csv'} holds no finished epoch")
    return tables


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header
            table = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False, index_col=False)
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
        elif column == "epoch":
            bad, expected = ~texts.str.fullmatch("[1-9][0-9]{,8}"), "a whole number from 1"
            table[column] = pd.to_numeric(texts, errors="coerce")
        else:
            table[column] = pd.to_numeric(texts, errors="coerce")
            bad, expected = table[column].isna() & (texts != "nan"), "a number"
        if bad.any():
            line = int(bad.argmax())
            raise ValueError(f"{path}, line {line + 2}: {column} is {texts[line]!r}, expected {expected}")
    return table


def information(dib: pd.DataFrame) -> pd.DataFrame:
    """Minimality and sufficiency in bits of every epoch, set and split, splits in order of depth.

    Minimality: the mean over all labelings of all enumerations of entropy - loss; sufficiency: that of the labels.
    """
    bits = dib.assign(bits=(dib["entropy"] - dib["loss"]) / log(2))
    keys = ["epoch", "set", "split"]
    original = bits["labeling"] == "y"
    minimality = bits[~original].groupby(keys, sort=False)["bits"].mean()
    sufficiency = bits[original].groupby(keys, sort=False)["bits"].mean()
    return pd.DataFrame({"minimality": minimality, "sufficiency": sufficiency}).reset_index()


def styles(names: list[str]) -> dict[str, dict]:
    """A colour (dark to light with depth, also in grey) and a marker for each layer."""
    colours = VIRIDIS(np.linspace(0, 1, len(names)))
    return {
        name: {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, colour) in enumerate(zip(names, colours, strict=True))
    }


def panels(rows: int, sets: list[str], title: str) -> tuple[Figure, list]:
    """A figure with a column of panels for each set, sharing axes along each row."""
    fig, axes = plt.subplots(
        rows, len(sets), figsize=(1.6 + 3.4 * len(sets), 0.6 + 2.7 * rows), squeeze=False, sharex=True, sharey="row"
    )
    fig.suptitle(title)
    for axis, name in zip(axes[0], sets, strict=True):
        axis.set_title(f"{name} set")
    for axis in axes[-1]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig, axes


def marks(epochs: pd.Series) -> int:
    """Every how many epochs a marker stands, so that long runs stay lines."""
    return max(1, epochs.nunique() // 15)


def legend(fig: Figure, axis: Axes, title: str) -> None:
    """The legend of all panels, beside them; in two columns of small print where it is long."""
    handles, names = axis.get_legend_handles_labels()
    style = {"ncols": 2, "fontsize": "small", "columnspacing": 1} if len(names) > 10 else {}
    fig.legend(handles, names, loc="outside right center", title=title, **style)
    if style:
        fig.set_figwidth(fig.get_figwidth() + 1.4)


def draw_training(epochs: pd.DataFrame, title: str) -> Figure:
    fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.3))
    fig.suptitle(title)
    for name, style in (("train", {"color": "#0072B2", "marker": "o"}), ("test", {"color": "#D55E00", "marker": "s"})):
        part = epochs[epochs["set"] == name]
        for axis, values in zip(axes, (part["loss"], 100 * part["accuracy"]), strict=True):
            axis.plot(part["epoch"], values, label=name, markevery=marks(part["epoch"]), **style)
    for axis, label in zip(axes, ("cross-entropy (nats)", "accuracy (%)"), strict=True):
        axis.set(xlabel="epoch", ylabel=label)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    return fig


def draw_lr_range(steps: pd.DataFrame, title: str) -> Figure:
    fig, axis = plt.subplots(figsize=(5.6, 3.6))
    fig.suptitle(title)
    axis.plot(steps["learning_rate"], steps["loss"], ".", color="0.6", label="of a step")
    axis.plot(steps["learning_rate"], steps["smoothed"], color="#0072B2", label="smoothed")
    for rate in steps.loc[steps["chosen"] == 1, "learning_rate"]:
        axis.axvline(rate, color="#D55E00", linestyle="--", label=f"chosen: {rate:.2g}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats)")
    top = steps["smoothed"].iloc[: max(1, len(steps) // 2)].max()  # the end, where it diverges, would flatten the rest
    axis.set_ylim(top=1.3 * top)
    axis.legend()
    return fig


def draw_nc1(nc1: pd.DataFrame, title: str) -> Figure:
    fig, axes = panels(1, list(nc1["set"].unique()), title)
    for (_, part), axis in zip(nc1.groupby("set", sort=False), axes[0], strict=True):
        for layer, style in styles(list(nc1["layer"].unique())).items():
            line = part[part["layer"] == layer]
            axis.plot(line["epoch"], line["nc1"], label=layer, markevery=marks(line["epoch"]), **style)
        if (part["nc1"] > 0).any():
            axis.set_yscale("log")
    axes[0, 0].set_ylabel(r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit")
    legend(fig, axes[0, 0], "layer")
    return fig


def draw_information(info: pd.DataFrame, drop: pd.Series, title: str) -> Figure:
    """Minimality above sufficiency; drop, of every head in nats, tells below how settled the heads were."""
    measures = ("minimality", "sufficiency")
    fig, axes = panels(2, list(info["set"].unique()), title)
    layers = [s for s in info["split"].unique() if s != INPUT]
    for (_, part), column in zip(info.groupby("set", sort=False), axes.T, strict=True):
        for measure, axis in zip(measures, column, strict=True):
            for once in part.loc[part["split"] == INPUT, measure]:
                axis.axhline(once, color="black", linestyle="--", linewidth=1.2, label="input (epoch 1)")
            for split, style in styles(layers).items():
                line = part[part["split"] == split]
                axis.plot(line["epoch"], line[measure], label=split, markevery=marks(line["epoch"]), **style)
            if (info[measure] < 0).any():  # where a head does worse than one that only knows the labels' shares
                axis.axhline(0, color="0.4", linewidth=0.8)
    still = f"median {drop.median() / log(2):.2g}, largest {drop.max() / log(2):.2g} bits"
    fig.supxlabel(f"loss of the heads, still falling over the last tenth of their epochs: {still}", fontsize="small")
    for measure, axis in zip(measures, axes[:, 0], strict=True):
        axis.set_ylabel(f"{measure} (bits)")
    legend(fig, axes[0, 0], "encoder up to")
    return fig


def draw_plane(info: pd.DataFrame, title: str) -> Figure:
    """Minimality across, sufficiency up: a line for each split, from a small to a large marker, coloured by epoch."""
    sets = list(info["set"].unique())
    fig, axes = plt.subplots(
        1, len(sets), figsize=(2.4 + 3.6 * len(sets), 3.9), squeeze=False, sharex=True, sharey=True
    )
    fig.suptitle(title)
    norm = plt.Normalize(1, max(2, info["epoch"].max()))
    splits = list(info["split"].unique())
    for (name, part), axis in zip(info.groupby("set", sort=False), axes[0], strict=True):
        for split, marker in zip(splits, MARKERS * len(splits), strict=False):
            line = part[part["split"] == split].sort_values("epoch")
            points = line[["minimality", "sufficiency"]].to_numpy()
            segments = list(pairwise(points))
            axis.add_collection(
                LineCollection(segments, array=line["epoch"][1:], norm=norm, cmap=VIRIDIS, linewidth=1.2)
            )
            sizes = [12] * (len(line) - 1) + [60]
            dots = axis.scatter(*points.T, c=line["epoch"], norm=norm, cmap=VIRIDIS, s=sizes, marker=marker, zorder=2)
            axis.scatter([], [], color="black", marker=marker, s=30, label=split)
        axis.set(title=f"{name} set", xlabel="minimality (bits)")
        axis.xaxis.set_major_locator(MaxNLocator(5))
    axes[0, 0].set_ylabel("sufficiency (bits)")
    colours = fig.colorbar(dots, ax=axes, label="epoch (last one: large marker)")
    colours.locator = MaxNLocator(integer=True)
    legend(fig, axes[0, 0], "encoder up to")
    return fig


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plots.py", description=__doc__.split("\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("run", nargs="?", type=Path, help="the run's folder (the newest under runs/)")
    run = parser.parse_args(arguments).run or newest()
    tables = read(run)
    figures = {}
    if "lr_range" in tables:
        figures["lr_range"] = draw_lr_range(tables["lr_range"], f"Learning-rate range test: {run.name}")
    if not tables["epochs"].empty:
        figures["training"] = draw_training(tables["epochs"], f"Loss and accuracy: {run.name}")
    if not tables["nc1"].empty:
        figures["nc1"] = draw_nc1(tables["nc1"], f"Neural collapse: {run.name}")
    if not tables["dib"].empty:
        info = information(tables["dib"])
        figures["information"] = draw_information(info, tables["dib"]["drop"], f"Decodable information: {run.name}")
        figures["plane"] = draw_plane(info, f"Information plane: {run.name}")
    folder = run / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        for ending in ("png", "pdf"):
            figure.savefig(folder / f"{name}.{ending}")
        print(folder / f"{name}.png")


if __name__ == "__main__":
    try:
        with plt.rc_context(STYLE):
            main()
    except (ValueError, OSError) as error:
        print(f"plots.py: error: {error}", file=sys.stderr)
        sys.exit(2)
