"""What is drawn: a function for each figure, of one or several groups of runs; gallery.py has their captions."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

from analysis import style
from analysis.tables import BEATEN, INPUT, MEAN_SD, Group, over_seeds, spaced

NC1 = r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit"
SHORT = "rank below\nmin(d, C − 1)"
MEASURES = ("minimality", "sufficiency")
MINIMALITY = "minimality (bits)"


def rows(fig: Figure, groups: list[Group]) -> Iterator[tuple[FigureBase, Group]]:
    """A strip of the figure for each group, titled with its name where there are several."""
    for part, group in zip(fig.subfigures(len(groups), squeeze=False)[:, 0], groups, strict=True):
        if len(groups) > 1:
            part.suptitle(style.plain(group.label), fontsize="medium", fontweight="bold")
        yield part, group


def panels(fig: FigureBase, group: Group, down: int = 1, **shared) -> np.ndarray:
    """A column of panels for each set, (down, sets)."""
    axes = fig.subplots(down, len(group.sets), squeeze=False, **shared)
    for axis, name in zip(axes[0], group.sets, strict=True):
        axis.set_title(f"{name} set", fontsize="medium")
    return axes


def same_scale(fig: Figure, groups: list[Group], *along: str) -> None:
    """The same view in all strips of panels that show the same on the same data, to be compared by eye."""
    alike: dict[tuple, list[Axes]] = {}
    for part, group in zip(fig.subfigs, groups, strict=True):
        for axis in part.axes:
            if axis.get_ylabel() and axis.get_label() != "<colorbar>":  # one of each row of panels, which share it
                alike.setdefault((axis.get_ylabel(), group.hparams[0]["data"]), []).append(axis)
    for each in along:
        for axes in alike.values():
            limits = [getattr(axis, f"get_{each}lim")() for axis in axes]
            for axis in axes:
                getattr(axis, f"set_{each}lim")(min(low for low, _ in limits), max(high for _, high in limits))


def curve(
    axis: Axes,
    line: pd.DataFrame,
    label: str | None,
    dash: str,
    look: dict,
    width: float | None = None,
    log: bool = False,
) -> None:
    """The mean over seeds by the index (epoch or steps), in a band of one standard deviation.

    log: markers stand evenly on a log axis, else every so many points.
    """
    short = line.get("short", pd.Series(False, line.index))
    marked = line.index.get_indexer(spaced(list(line.index), 15)) if log else range(0, len(line), style.thin(len(line)))
    every = [int(i) for i in marked if not short.iloc[i]]
    axis.plot(line.index, line["mean"], label=label, markevery=every, linestyle=dash, linewidth=width, **look)
    crosses(axis, line["mean"][short], look)
    if (line["high"] > line["low"]).any():
        axis.fill_between(line.index, line["low"], line["high"], color=look["color"], alpha=0.2, linewidth=0)


def crosses(axis: Axes, short: pd.Series, look: dict) -> None:
    """NC1 of layers of short rank by the index: where they are many, some of them."""
    short = short[:: style.thin(len(short))]
    axis.plot(short.index, short, linestyle="", zorder=3, color=look["color"], **style.CROSS)


def say_short(axis: Axes, nc1: pd.DataFrame, more: str = "") -> None:
    """What the crosses are, in the legend, where there are any."""
    if (nc1["short"] & nc1["nc1"].notna()).any():
        axis.plot([], [], linestyle="", color="0.3", label=SHORT + more, **style.CROSS)


def layer_curves(axes: np.ndarray, means: pd.DataFrame, group: Group, seeds: int, across: str = "epoch") -> None:
    """On the panel of each set a curve for each layer; the input, measured in one epoch, as a dashed line."""
    looks = style.colours(group.layers) | {INPUT: style.INPUT}
    width = 1 if len(group.layers) > style.MANY else None
    for each, axis in zip(group.sets, axes, strict=True):
        for layer, line in means[means["set"] == each].groupby("layer", sort=False):
            fewest = means.loc[means["layer"] == layer, "count"].min()
            label = layer if fewest == seeds or seeds == 1 else f"{layer} ({fewest} to {seeds} seeds)"
            if layer == INPUT and across == "epoch":
                axis.axhline(line["mean"].iloc[0], color="black", linestyle="--", linewidth=1.2, label=label)
                axis.axhspan(line["low"].iloc[0], line["high"].iloc[0], color="black", alpha=0.1, linewidth=0)
                if "short" in line:
                    crosses(axis, line.set_index("epoch")["mean"][line["short"].to_numpy()], looks[INPUT])
            else:
                curve(axis, line.set_index(across), label, "-", looks[layer], width)
        if across == "epoch":
            style.epoch_axis(axis, group.uneven)
        else:
            style.steps(axis, means.loc[means["set"] == each, across])
        axis.set_xlabel(across)
        axis.label_outer()


def logarithmic(axis: Axes, values: pd.Series) -> None:
    if (values > 0).any():
        axis.set_yscale("log")


def plain_numbers(fig: Figure) -> None:
    """On log axes that have come to less than two decades, where powers of ten would be one tick or none."""
    for axis in fig.axes:
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log" and high < 100 * low:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())


def draw_training(fig: Figure, groups: list[Group]) -> None:
    """All groups in one pair of panels."""
    axes, log = fig.subplots(1, 2), any(group.uneven for group in groups)
    for values, axis in zip(("loss", "accuracy"), axes, strict=True):
        if len(groups) == 1:
            for each, look in style.colours(["train", "test"]).items():
                line = over_seeds(groups[0].of("epochs", each), ["epoch"], values).set_index("epoch")
                curve(axis, line, each, style.DASHES[each], look, log=log)
        else:
            for group, look in zip(groups, style.colours(range(len(groups))).values(), strict=True):
                name = f"{style.plain(group.label)}, {group.seeds(MEAN_SD)}"
                for each, label in (("train", name), ("test", None)):
                    line = over_seeds(group.of("epochs", each), ["epoch"], values).set_index("epoch")
                    curve(axis, line, label, style.DASHES[each], look, log=log)
            for each, dash in style.DASHES.items():
                axis.plot([], [], color="black", linestyle=dash, label=each)
        axis.set_xlabel("epoch")
        style.epoch_axis(axis, log)
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[1].set_ylabel("accuracy")
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    handles, names = axes[0].get_legend_handles_labels()
    title = groups[0].seeds(MEAN_SD) if len(groups) == 1 else None
    fig.legend(handles, names, loc="outside lower center", ncols=2, title=title)


def draw_nc1(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharey=True)[0]
        table = group.tables["nc1"]
        keys = ["layer", "set", "epoch"]
        means = over_seeds(table, keys, "nc1", log=True)
        means["short"] = table.groupby(keys, sort=False)["short"].any().to_numpy()
        layer_curves(axes, means, group, len(group.folders))
        say_short(axes[0], table)
        logarithmic(axes[0], table["nc1"])
        axes[0].set_ylabel(NC1)
        style.legend(part, axes[0], f"{group.seeds(MEAN_SD)}\nlayer")
    same_scale(fig, groups, "y")
    plain_numbers(fig)


def draw_depth(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes = panels(part, group, sharey=True)[0]
        table, shown = by_depth(group), group.shown("nc1")
        layers, star = table[table["layer"] != INPUT], style.INPUT | {"marker": "*", "markersize": 7}
        for each, axis in zip(group.sets, axes, strict=True):
            depth_points(axis, table[(table["set"] == each) & (table["layer"] == INPUT)], star)
        for epoch, marker in zip(shown, cycle(style.MARKERS), strict=False):
            look = {"color": style.of_epoch(epoch, group.last), "marker": marker}
            fits = []
            for each, axis in zip(group.sets, axes, strict=True):
                its = layers[(layers["set"] == each) & (layers["epoch"] == epoch)]
                depth_points(axis, its, look)
                fits += depth_line(axis, its, each, look)
            axes[0].plot([], [], linestyle="", label="\n".join([f"epoch {epoch}", *fits]), **look)
        say_short(axes[0], table[(table["layer"] == INPUT) | table["epoch"].isin(shown)], ",\nnot in the line")
        ticks = table.drop_duplicates("depth")
        for axis in axes:
            axis.set_xticks(ticks["depth"], ticks["layer"], rotation=0 if len(ticks) <= 4 else 90)
        logarithmic(axes[0], table["nc1"])
        axes[0].set_ylabel(NC1)
        style.legend(part, axes[0], f"{group.seeds(MEAN_SD)}\nchange per layer,\ncorrelation")
    same_scale(fig, groups, "y")
    plain_numbers(fig)


def depth_points(axis: Axes, nc1: pd.DataFrame, look: dict) -> None:
    """NC1 of one epoch by depth."""
    means = over_seeds(nc1, ["depth"], "nc1", log=True).set_index("depth")
    short = nc1.groupby("depth")["short"].any().reindex(means.index)
    full = means[~short]
    bars = [full["mean"] - full["low"], full["high"] - full["mean"]]
    axis.errorbar(full.index, full["mean"], bars, linestyle="", elinewidth=1, **look)
    crosses(axis, means["mean"][short], look)


def depth_line(axis: Axes, nc1: pd.DataFrame, each: str, look: dict) -> list[str]:
    """The mean of the lines fitted to the seeds, which is said if there are any."""
    lines = fits(nc1)
    if lines.empty:
        return []
    depth = nc1.loc[in_line(nc1), "depth"].drop_duplicates().sort_values()
    fitted = np.exp(lines["start"].mean() + lines["slope"].mean() * depth)
    axis.plot(depth, fitted, color=look["color"], linewidth=1, linestyle="--")
    spread = f" ± {np.exp(lines['slope']).std():.2f}" if len(lines) > 1 else ""
    return [f"  {each} ×{np.exp(lines['slope'].mean()):.2f}{spread}, {lines['correlation'].mean():.2f}"]


def by_depth(group: Group) -> pd.DataFrame:
    """NC1 with a column depth: 0 is the input, and every layer counts, also those where NC1 is not measured."""
    depths = {layer: depth for depth, layer in enumerate([INPUT, *group.layers])}
    table = group.tables["nc1"]
    return table.assign(depth=table["layer"].map(depths))


def in_line(nc1: pd.DataFrame) -> pd.Series:
    """Which rows the line of log NC1 by depth goes through: of layers of full rank, the input not being one."""
    return nc1["nc1"].between(0, np.inf, inclusive="neither") & ~nc1["short"] & (nc1["layer"] != INPUT)


def fits(nc1: pd.DataFrame) -> pd.DataFrame:
    """The least-squares line of log NC1 by depth of each seed, set and epoch: columns slope, start, correlation."""
    found = [
        (*keys, *fit(its["depth"], np.log(its["nc1"])))
        for keys, its in nc1[in_line(nc1)].groupby(["seed", "set", "epoch"])
        if len(its) > 2
    ]
    lines = pd.DataFrame(found, columns=["seed", "set", "epoch", "slope", "start", "correlation"])
    return lines.sort_values("epoch", kind="stable")  # a seed may lack the first ones


def fit(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Slope, intercept and correlation of the least-squares line; the correlation is NaN where y is constant."""
    slope, start = np.polyfit(x, y, 1)
    return slope, start, slope * x.std() / (y.std() or np.nan)


def has_law(group: Group) -> bool:
    return len(fits(by_depth(group))["epoch"].unique()) > 1


def draw_law(fig: Figure, groups: list[Group]) -> None:
    """Slope and correlation of the fitted lines by epoch."""
    for part, group in rows(fig, groups):
        axes, lines = part.subplots(1, 2), fits(by_depth(group))
        for values, axis in zip(("slope", "correlation"), axes, strict=True):
            for each, look in style.colours(group.sets).items():
                line = over_seeds(lines[lines["set"] == each], ["epoch"], values).set_index("epoch")
                if line.empty:
                    continue
                fewest, most = line["count"].min(), line["count"].max()
                there = f"{fewest} to {most}" if fewest < most else f"{most}"
                label = each if fewest == len(group.folders) else f"{each} ({there} of {len(group.folders)} seeds)"
                curve(axis, line, label, style.DASHES[each], look)
            style.epoch_axis(axis, group.uneven)
            style.zero(axis)
            axis.set_xlabel("epoch")
        axes[0].set_ylabel("slope of log NC1, per layer")
        axes[1].set_ylabel("correlation of log NC1 with depth")
        axes[1].set_ylim(-1.05, 1.05)
        style.legend(part, axes[0], group.seeds(MEAN_SD))
    same_scale(fig, groups, "y")


def draw_information(fig: Figure, groups: list[Group]) -> None:
    measures(fig, groups, "information", "epoch")


def draw_settle(fig: Figure, groups: list[Group]) -> None:
    measures(fig, groups, "settling", "steps")


def measures(fig: Figure, groups: list[Group], name: str, across: str) -> None:
    """Minimality above sufficiency: what is known in lines, hollow markers where the heads themselves fell short."""
    for part, group in rows(fig, groups):
        axes = panels(part, group, 2, sharex="col", sharey="row")
        table, keys, shown = group.tables[name], ["layer", "set", across], []
        for measure, pair in zip(MEASURES, axes, strict=True):
            means = over_seeds(table, keys, measure)
            layer_curves(pair, means, group, table["seed"].nunique(), across)
            style.widen(pair[0], "y")
            if (table[measure] < 0).any():  # where the decoders cannot put out constants
                for axis in pair:
                    style.zero(axis)
            own = over_seeds(table, keys, f"{measure}_by_loss")["mean"]
            shown += own_losses(pair, means.assign(own=own), group, across)
            pair[0].set_ylabel(f"{measure} (bits)")
        if shown:
            label = "decoder's own loss" + ("" if all(shown) else f"\n({shown.count(False)} further below)")
            axes[0, 0].plot([], [], linestyle="", color="0.3", marker="o", label=label, **style.HOLLOW)
        style.legend(part, axes[0, 0], f"{group.seeds(MEAN_SD, name)}\nencoder up to")
    same_scale(fig, groups, "y")


def own_losses(axes: np.ndarray, means: pd.DataFrame, group: Group, across: str) -> list[bool]:
    """Hollow markers where the column own lies below the mean, at the markers of the curves; which of them are shown.

    Badly found heads can be far below all that is known: what is more than a quarter of the axis below it is left out.
    """
    looks = style.colours(group.layers) | {INPUT: style.INPUT}
    bottom, top = axes[0].get_ylim()
    room, lowest, shown = (top - bottom) / 4, bottom, []
    for each, axis in zip(group.sets, axes, strict=True):
        for layer, line in means[means["set"] == each].groupby("layer", sort=False):
            line = line[:: style.thin(len(line))]
            line = line[line["own"] < line["mean"] - BEATEN]
            near = line["own"] > bottom - room
            axis.plot(line[across][near], line["own"][near], linestyle="", zorder=3, **looks[layer], **style.HOLLOW)
            lowest = min([lowest, *(line["own"][near] - 0.2 * room)])  # with space for the marker
            shown += near.tolist()
    axes[0].set_ylim(lowest, top)
    return shown


def plane(part: FigureBase, group: Group) -> tuple[np.ndarray, dict[str, dict]]:
    """The panels of an information plane, minimality across and sufficiency up, and the looks of what stands in it."""
    axes = panels(part, group, sharex=True, sharey=True)[0]
    for axis in axes:
        axis.set_xlabel("minimality (bits)")
        style.few(axis)
    axes[0].set_ylabel("sufficiency (bits)")
    return axes, style.colours(group.layers) | {INPUT: style.INPUT}


def widen(axes: np.ndarray) -> None:
    for each in "xy":  # which the panels share
        style.widen(axes[0], each)


def draw_plane(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axes, looks = plane(part, group)
        for each, axis in zip(group.sets, axes, strict=True):
            points = group.of("information", each).rename(columns={"minimality": "x", "sufficiency": "y"})
            for layer, its in points.groupby("layer", sort=False):
                track(axis, its, layer, looks[layer])
        widen(axes)
        style.legend(part, axes[0], f"{group.seeds('mean of ')}\nencoder up to")
    same_scale(fig, groups, "x", "y")


def track(axis: Axes, points: pd.DataFrame, label: str, look: dict) -> None:
    """The mean over seeds of x and y at 20 epochs, with an arrow along time half-way out from the start.

    A large marker is the last epoch, a cross if a rank was short there, small ones the seeds then. Points without a
    value are left out.
    """
    points = points.dropna(subset=["x", "y"])
    if points.empty:
        return
    means = points.groupby("epoch")[["x", "y"]].mean()
    means = means.loc[spaced(means.index.tolist(), 20)]
    x, y = means.to_numpy().T
    axis.plot(x, y, color=look["color"], linewidth=0.8, alpha=0.7)
    ends = points[points["epoch"] == means.index[-1]]
    end = {"markersize": 7, "mec": "white", "mew": 0.5} | look
    if "short" in ends and ends["short"].any():
        end = {"color": look["color"]} | style.CROSS
    axis.plot(x[-1:], y[-1:], linestyle="", label=label, zorder=3, **end)
    if len(ends) > 1:
        axis.plot(ends["x"], ends["y"], markersize=2.5, linestyle="", alpha=0.6, **look)
    far = np.hypot((x - x[0]) / (np.ptp(x) or 1), (y - y[0]) / (np.ptp(y) or 1))
    half = int(np.argmax(far >= far.max() / 2))
    if half > 0:
        head = {"arrowstyle": "-|>", "color": look["color"], "linewidth": 0.8}
        axis.annotate("", (x[half], y[half]), (x[half - 1], y[half - 1]), arrowprops=head)


def draw_plane_by_epoch(fig: Figure, groups: list[Group]) -> None:
    """The layers of an epoch joined by a line, in the colour of the epoch."""
    for part, group in rows(fig, groups):
        axes, looks = plane(part, group)
        shown = spaced(group.epochs("dib"), 40)
        for each, axis in zip(group.sets, axes, strict=True):
            means = group.of("information", each).groupby(["layer", "epoch"], sort=False)[list(MEASURES)].mean()
            means = means.reset_index()
            for epoch in shown:
                joined = means[(means["epoch"] == epoch) | (means["layer"] == INPUT)]
                colour = style.of_epoch(epoch, group.last)
                axis.plot(*joined[list(MEASURES)].to_numpy().T, color=colour, linewidth=0.8, zorder=1)
            for layer, its in means[means["epoch"].isin(shown)].groupby("layer", sort=False):
                marker = looks[layer]["marker"]
                colours = style.of_epoch(its["epoch"], group.last)
                axis.scatter(its["minimality"], its["sufficiency"], c=colours, marker=marker, s=16)
                axis.scatter([], [], color="black", marker=marker, s=16, label=layer)
        widen(axes)
        colour_bar(part, axes, group.last)
        style.legend(part, axes[0], f"{group.seeds('mean of ')}\nencoder up to")
    same_scale(fig, groups, "x", "y")


def colour_bar(fig: FigureBase, axes: np.ndarray, last: int) -> None:
    bar = fig.colorbar(ScalarMappable(style.epochs(last), style.EPOCHS), ax=list(axes), label="epoch")
    bar.solids.set(rasterized=False, edgecolor="face")  # lines in a PDF, like everything else
    ticks = [0, *(each * 10**power for power in range(6) for each in (1, 2, 5))]
    bar.ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def gap(table: pd.DataFrame, keys: list[str], value: str) -> pd.Series:
    """Test - train by the keys, seed and epoch, where both are finite."""
    wide = table.pivot(index=[*keys, "seed", "epoch"], columns="set", values=value)
    if not {"train", "test"} <= set(wide):
        return pd.Series(dtype=float)
    return (wide["test"] - wide["train"]).replace([np.inf, -np.inf], np.nan).dropna()


def gaps(group: Group) -> dict[str, pd.Series]:
    """The gap of each measure of the layers that has one, also that of minimality where it cannot be drawn."""
    nc1, information = group.tables["nc1"], group.tables["information"]
    measured = {
        "NC1": gap(nc1[nc1["layer"] != INPUT], ["layer"], "nc1"),
        MINIMALITY: gap(information[information["layer"] != INPUT], ["layer"], "minimality"),
    }
    return {title: values for title, values in measured.items() if len(values)}


def unequal(group: Group) -> str:
    """Why the information of the two sets cannot be compared; nothing where it can."""
    for its in group.hparams:
        samples = its.get("dib_samples") or {}
        if not {"train", "test"} <= set(samples):
            return "the run does not tell how many samples"
        if samples["train"] != samples["test"]:
            return f"{samples['train']:,} training and {samples['test']:,} test samples"
    return ""


def has_gap(group: Group) -> bool:
    there = gaps(group)
    return "NC1" in there or (MINIMALITY in there and not unequal(group))


def draw_gap(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        loss, measured = gap(group.tables["epochs"], [], "loss"), gaps(group)
        short = group.tables["nc1"].groupby(["layer", "seed", "epoch"])["short"].any()
        axes = part.subplots(1, len(measured), squeeze=False, sharey=True)[0]
        for (title, values), axis in zip(measured.items(), axes, strict=True):
            if title == MINIMALITY and (reason := unequal(group)):
                reason = f"no minimality here:\n{reason},\nand information compares at equal N only;\n"
                axis.text(0.5, 0.5, reason + "run with --dib-size", transform=axis.transAxes, ha="center", va="center")
                axis.set_axis_off()
                continue
            for layer, look in style.colours(group.layers).items():
                if layer in values.index.get_level_values(0):
                    points = pd.DataFrame({"x": values.loc[layer], "y": loss})
                    if title == "NC1":
                        points["short"] = short.loc[layer]
                    track(axis, points.reset_index(), layer, look)
            style.few(axis)
            if title == "NC1":
                say_short(axes[0], group.tables["nc1"].query("layer in @group.layers and epoch == epoch.max()"))
            else:
                style.widen(axis, "x")
            size = values.abs()
            if size.max() > 100 * size.median() > 0:  # it spans decades, to both sides of 0
                axis.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(size.median())))
            axis.set_xlabel(f"{title}, test − train")
        axes[0].set_ylabel("cross-entropy (nats), test − train")
        style.legend(part, axes[0], f"{group.seeds('mean of ')}\nlayer")
    same_scale(fig, groups, "y")


def draw_lr_range(fig: Figure, groups: list[Group]) -> None:
    for part, group in rows(fig, groups):
        axis = part.subplots()
        table = group.tables["lr_range"]
        axis.plot(table["learning_rate"], table["loss"], ".", color="0.6", label="of a step")
        for number, (_, steps) in enumerate(table.groupby("seed", sort=False)):
            label = "smoothed" if number == 0 else None
            axis.plot(steps["learning_rate"], steps["smoothed"], color="#0072B2", label=label)
            for rate in steps.loc[steps["chosen"] == 1, "learning_rate"]:
                axis.axvline(rate, color="#D55E00", linestyle="--", label=f"chosen: {rate:.2g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats)")
        early = table[table["step"] <= table["step"].max() / 2]  # the end, where it diverges, would flatten the rest
        axis.set_ylim(top=1.3 * early["smoothed"].max())
        axis.legend(title=group.seeds())
