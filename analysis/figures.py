"""What is drawn: a function for each figure, of one or several groups of runs; gallery.py has their captions."""

from collections.abc import Iterator
from itertools import cycle
from math import log

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, ScalarFormatter

from analysis import style
from analysis.tables import INPUT, Group, over_seeds, spaced

NC1 = r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit"
MEASURES = ("minimality", "sufficiency")
SETTLED = 1e-3  # bits: where the axis of drop turns from linear to logarithmic


def rows(fig: Figure, groups: list[Group]) -> Iterator[tuple[FigureBase, Group]]:
    """A strip of the figure for each group, titled with its name where there are several."""
    for part, group in zip(fig.subfigures(len(groups), squeeze=False)[:, 0], groups, strict=True):
        if len(groups) > 1:
            part.suptitle(group.label, fontsize="medium", fontweight="bold")
        yield part, group


def panels(fig: FigureBase, group: Group, down: int = 1, **shared) -> np.ndarray:
    """A column of panels for each set, (down, sets)."""
    axes = fig.subplots(down, len(group.sets), squeeze=False, **shared)
    for axis, name in zip(axes[0], group.sets, strict=True):
        axis.set_title(f"{name} set", fontsize="medium")
    return axes


def curve(axis: Axes, line: pd.DataFrame, label: str | None, dash: str, look: dict, width: float | None = None) -> None:
    """The mean over seeds by epoch, in a band of one standard deviation."""
    every = style.thin(len(line))
    axis.plot(line["epoch"], line["mean"], label=label, markevery=every, linestyle=dash, linewidth=width, **look)
    if (line["high"] > line["low"]).any():
        axis.fill_between(line["epoch"], line["low"], line["high"], color=look["color"], alpha=0.2, linewidth=0)


def logarithmic(axis: Axes, values: pd.Series) -> None:
    if (values > 0).any():
        axis.set_yscale("log")


def layer_curves(axis: Axes, over: pd.DataFrame, key: str, group: Group) -> None:
    """A curve for each layer or split; the input, measured once, as a dashed line."""
    looks = style.colours(group.layers)
    width = 1 if len(group.layers) > style.MANY else None
    for layer, line in over.groupby(key, sort=False):
        few = line["count"].min()
        label = layer if few == len(group.folders) else f"{layer} (from {few})"  # of the seeds, others have no value
        if layer == INPUT:
            axis.axhline(line["mean"].iloc[0], color="black", linestyle="--", linewidth=1.2, label=label)
        else:
            curve(axis, line, label, "-", looks[layer], width)
    axis.set_xlabel("epoch")
    style.whole(axis)


def draw_training(fig: Figure, groups: list[Group]) -> None:
    """All groups in one pair of panels."""
    axes = fig.subplots(1, 2)
    for values, axis in zip(("loss", "accuracy"), axes, strict=True):
        if len(groups) == 1:
            for each, look in style.colours(["train", "test"]).items():
                curve(axis, over_seeds(groups[0].of("epochs", each), ["epoch"], values), each, style.DASHES[each], look)
        else:
            for group, look in zip(groups, style.colours(range(len(groups))).values(), strict=True):
                for each, label in (("train", f"{group.label}, {group.seeds}"), ("test", None)):
                    curve(
                        axis, over_seeds(group.of("epochs", each), ["epoch"], values), label, style.DASHES[each], look
                    )
            for each, dash in style.DASHES.items():
                axis.plot([], [], color="black", linestyle=dash, label=each)
        axis.set_xlabel("epoch")
        style.whole(axis)
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[1].set_ylabel("accuracy")
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    handles, names = axes[0].get_legend_handles_labels()
    title = groups[0].seeds if len(groups) == 1 else None
    fig.legend(handles, names, loc="outside lower center", ncols=2, title=title)


def draw_nc1(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharey=True)[0]
        for each, axis in zip(group.sets, axes, strict=True):
            table = group.of("nc1", each)
            layer_curves(axis, over_seeds(table, ["layer", "epoch"], "nc1", log=True), "layer", group)
            logarithmic(axis, table["nc1"])
        axes[0].set_ylabel(NC1)
        style.legend(part, axes[0], f"layer\n{group.seeds}")


def draw_depth(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharey=True)[0]
        table = group.tables["nc1"]
        layers = list(table["layer"].unique())
        norm = style.epochs(group.last)
        for epoch, marker in zip(group.shown, cycle(style.MARKERS), strict=False):
            look = {"color": style.COLOURS(norm(epoch)), "marker": marker}
            fits = []
            for each, axis in zip(group.sets, axes, strict=True):
                over = over_seeds(
                    table[(table["set"] == each) & (table["epoch"] == epoch)], ["layer"], "nc1", log=True
                ).dropna()
                over["depth"] = [1 + layers.index(layer) for layer in over["layer"]]
                fits += depth_line(axis, over, each, look)
            axes[0].plot([], [], linestyle="", label="\n".join([f"epoch {epoch}", *fits]), **look)
        for axis in axes:
            axis.set_xticks(range(1, len(layers) + 1), layers, rotation=0 if len(layers) <= 4 else 90)
            logarithmic(axis, table["nc1"])
        axes[0].set_ylabel(NC1)
        style.legend(part, axes[0], f"change per layer,\ncorrelation\n{group.seeds}")


def depth_line(axis: Axes, over: pd.DataFrame, each: str, look: dict) -> list[str]:
    """NC1 of one epoch by depth, and a straight line fitted to its logarithm, which is said if it says something."""
    spread = [over["mean"] - over["low"], over["high"] - over["mean"]]
    axis.errorbar(over["depth"], over["mean"], spread, linestyle="", elinewidth=1, **look)
    if len(over) < 3:
        return []
    slope, start = np.polyfit(over["depth"], np.log(over["mean"]), 1)
    correlation = np.corrcoef(over["depth"], np.log(over["mean"]))[0, 1]
    axis.plot(over["depth"], np.exp(start + slope * over["depth"]), color=look["color"], linewidth=1, linestyle="--")
    return [f"  {each} ×{np.exp(slope):.2f}, {correlation:.2f}"]


def draw_information(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, 2, sharex=True, sharey="row")
        table = group.tables["information"]
        for measure, pair in zip(MEASURES, axes, strict=True):
            for each, axis in zip(group.sets, pair, strict=True):
                over = over_seeds(table[table["set"] == each], ["split", "epoch"], measure)
                layer_curves(axis, over, "split", group)
                if (table[measure] < 0).any():  # where a head does worse than one that only knows the labels' shares
                    axis.axhline(0, color="0.4", linewidth=0.8)
                axis.label_outer()
            pair[0].set_ylabel(f"{measure} (bits)")
        style.legend(part, axes[0, 0], f"encoder up to\n{group.seeds}")


def draw_plane(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharex=True, sharey=True)[0]
        looks = style.colours(group.layers) | {INPUT: {"color": "black", "marker": "P"}}
        for each, axis in zip(group.sets, axes, strict=True):
            for split, track in tracks(group, each, *MEASURES).items():
                arrow(axis, track, split, looks[split])
            axis.set_xlabel("minimality (bits)")
            axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes[0].set_ylabel("sufficiency (bits)")
        style.legend(part, axes[0], f"encoder up to\n{group.mean}")


def tracks(group: Group, each: str, across: str, up: str) -> dict[str, pd.DataFrame]:
    """The means over seeds of two columns of information, as x and y by epoch, for each split."""
    table = group.of("information", each)
    both = [over_seeds(table, ["split", "epoch"], values).set_index(["split", "epoch"]) for values in (across, up)]
    table = pd.DataFrame({"x": both[0]["mean"], "y": both[1]["mean"]}).reset_index()
    return dict(list(table.groupby("split", sort=False)))


def arrow(axis: Axes, track: pd.DataFrame, label: str, look: dict) -> None:
    """A line through x and y, an arrow where it is half-way out from its start, a large marker at its end."""
    x, y = track["x"].to_numpy(), track["y"].to_numpy()
    axis.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.7)
    axis.plot(x[-1:], y[-1:], markersize=7, mec="white", mew=0.5, linestyle="", label=label, zorder=3, **look)
    far = np.hypot((x - x[0]) / (np.ptp(x) or 1), (y - y[0]) / (np.ptp(y) or 1))
    half = int(np.argmax(far >= far.max() / 2))
    if half > 0:
        arrow = {"arrowstyle": "-|>", "color": look["color"], "linewidth": 0.8}
        axis.annotate("", (x[half], y[half]), (x[half - 1], y[half - 1]), arrowprops=arrow)


def draw_plane_by_epoch(fig: Figure, groups: list[Group]) -> None:
    """The layers of an epoch joined by a line, in the colour of the epoch."""
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharex=True, sharey=True)[0]
        norm, shown = style.epochs(group.last), spaced(group.last, 40)
        for each, axis in zip(group.sets, axes, strict=True):
            by_split = tracks(group, each, *MEASURES)
            points = pd.concat(by_split).set_index("epoch")
            for epoch in shown:
                places = points[(points["split"] == INPUT) | (points.index == epoch)]
                axis.plot(places["x"], places["y"], color=style.COLOURS(norm(epoch)), linewidth=0.8, zorder=1)
            for (split, track), marker in zip(by_split.items(), style.MARKERS, strict=False):
                dots = track[track["epoch"].isin(shown)]
                axis.scatter(dots["x"], dots["y"], c=style.COLOURS(norm(dots["epoch"])), marker=marker, s=16)
                axis.scatter([], [], color="black", marker=marker, s=16, label=split)
            axis.set_xlabel("minimality (bits)")
        axes[0].set_ylabel("sufficiency (bits)")
        colour_bar(part, axes, norm)
        style.legend(part, axes[0], f"encoder up to\n{group.mean}")


def gap(table: pd.DataFrame, keys: list[str], value: str) -> pd.Series:
    """Test - train of every seed and epoch, indexed by the keys, seed and epoch; empty where not both were measured."""
    wide = table.pivot(index=[*keys, "seed", "epoch"], columns="set", values=value)
    return wide["test"] - wide["train"] if {"train", "test"} <= set(wide) else pd.Series(dtype=float)


def gaps(group: Group) -> dict[str, pd.Series]:
    """The gap of each measure of the layers that has one."""
    information = group.tables["information"]
    measured = {
        "NC1": gap(group.tables["nc1"], ["layer"], "nc1"),
        "minimality (bits)": gap(information[information["split"] != INPUT], ["split"], "minimality"),
    }
    return {title: values for title, values in measured.items() if len(values)}


def draw_gap(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        loss, measured = gap(group.tables["epochs"], [], "loss"), gaps(group)
        axes = part.subplots(1, len(measured), squeeze=False, sharey=True)[0]
        for (title, values), axis in zip(measured.items(), axes, strict=True):
            for layer, look in style.colours(group.layers).items():
                if layer in values.index.get_level_values(0):
                    both = pd.DataFrame({"x": values.loc[layer], "y": loss}).dropna()
                    arrow(axis, both.groupby("epoch").mean(), layer, look)
            size = values.abs()
            if size.max() > 100 * size.median() > 0:
                axis.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(size.median())))
            axis.set_xlabel(f"{title}, test − train")
        axes[0].set_ylabel("cross-entropy (nats), test − train")
        style.legend(part, axes[0], f"layer\n{group.mean}")


def draw_drop(fig: Figure, groups: list[Group]) -> None:
    """The mean and the largest, over the heads of a split, of the fall of their loss in the last tenth of training."""
    for part, group in rows(fig, groups):
        axes = panels(part, group, 2, sharex=True, sharey=True)
        dib = group.tables["dib"].assign(drop=group.tables["dib"]["drop"] / log(2))
        for pair, of, words in zip(axes, ("mean", "max"), ("mean of the heads", "largest"), strict=True):
            heads = dib.groupby(["seed", "set", "split", "epoch"], sort=False)["drop"].agg(of).reset_index()
            for each, axis in zip(group.sets, pair, strict=True):
                over = over_seeds(heads[heads["set"] == each], ["split", "epoch"], "drop")
                layer_curves(axis, over, "split", group)
                axis.set_yscale("symlog", linthresh=SETTLED, linscale=0.4, subs=[2, 5])
                axis.axhline(0, color="0.4", linewidth=0.8)
                axis.label_outer()
            pair[0].set_ylabel(f"{words} (bits)")
        style.legend(part, axes[0, 0], f"encoder up to\n{group.seeds}")


def draw_lr_range(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axis = part.subplots()
        table = group.tables["lr_range"]
        axis.plot(table["learning_rate"], table["loss"], ".", color="0.6", label="of a step")
        for number, (_, steps) in enumerate(table.groupby("seed", sort=False)):
            first = number == 0
            axis.plot(steps["learning_rate"], steps["smoothed"], color="#0072B2", label="smoothed" if first else None)
            for rate in steps.loc[steps["chosen"] == 1, "learning_rate"]:
                axis.axvline(rate, color="#D55E00", linestyle="--", label=f"chosen: {rate:.2g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats)")
        early = table[table["step"] <= table["step"].max() / 2]  # the end, where it diverges, would flatten the rest
        axis.set_ylim(top=1.3 * early["smoothed"].max())
        axis.legend(title=group.seeds)


def colour_bar(fig: FigureBase, axes: np.ndarray, norm: LogNorm) -> None:
    bar = fig.colorbar(ScalarMappable(norm, style.COLOURS), ax=list(axes), label="epoch")
    bar.solids.set(rasterized=False, edgecolor="face")  # lines in a PDF, like everything else
    ticks = [t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if t <= norm.vmax]
    bar.ax.yaxis.set_major_locator(FixedLocator(ticks))
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
