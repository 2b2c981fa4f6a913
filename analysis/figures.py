"""Draw the figures of one or several groups of runs: a function for each figure. gallery.py has their captions."""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

from analysis import style
from analysis.tables import INPUT, MEAN_SD, SUBOPTIMAL_BITS, Group, average_over_seeds, choose_log_spaced

NC1 = r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit"
SHORT = "rank below\nmin(d, C − 1)"
MEASURES = ("minimality", "sufficiency")
MINIMALITY = "minimality (bits)"


def add_strips(fig: Figure, groups: list[Group]) -> Iterator[tuple[FigureBase, Group]]:
    """Yield a strip of the figure for each group. If there are several, each has the label of its group as title."""
    for part, group in zip(fig.subfigures(len(groups), squeeze=False)[:, 0], groups, strict=True):
        if len(groups) > 1:
            part.suptitle(style.escape_dollars(group.label), fontsize="medium", fontweight="bold")
        yield part, group


def add_panels(fig: FigureBase, group: Group, down: int = 1, **shared) -> np.ndarray:
    """Return a column of panels for each set, as an array (down, sets)."""
    axes = fig.subplots(down, len(group.sets), squeeze=False, **shared)
    for axis, name in zip(axes[0], group.sets, strict=True):
        axis.set_title(f"{name} set", fontsize="medium")
    return axes


def share_scale(fig: Figure, groups: list[Group], *along: str) -> None:
    """Give panels of the same quantity on the same data the same scale in all strips, so that they can be compared.

    along: the axes that get the same scale, "x" or "y".
    """
    alike: dict[tuple, list[Axes]] = {}
    for part, group in zip(fig.subfigs, groups, strict=True):
        for axis in part.axes:
            if axis.get_ylabel() and axis.get_label() != "<colorbar>":  # each row of panels shares one
                alike.setdefault((axis.get_ylabel(), group.hparams[0]["data"]), []).append(axis)
    for direction in along:
        for axes in alike.values():
            limits = [getattr(axis, f"get_{direction}lim")() for axis in axes]
            for axis in axes:
                getattr(axis, f"set_{direction}lim")(min(low for low, _ in limits), max(high for _, high in limits))


def draw_curve(
    axis: Axes,
    line: pd.DataFrame,
    label: str | None,
    dash: str,
    look: dict,
    width: float | None = None,
    log: bool = False,
) -> None:
    """Draw the mean over seeds by the index (epoch or steps), in a band of one standard deviation.

    log: whether markers are spaced evenly on a log axis, or by the number of points.
    """
    short = line.get("short", pd.Series(False, line.index))
    marked = range(0, len(line), style.compute_stride(len(line)))
    if log:
        marked = line.index.get_indexer(choose_log_spaced(list(line.index), 15))
    every = [int(i) for i in marked if not short.iloc[i]]
    axis.plot(line.index, line["mean"], label=label, markevery=every, linestyle=dash, linewidth=width, **look)
    draw_crosses(axis, line["mean"][short], look)
    if (line["high"] > line["low"]).any():
        axis.fill_between(line.index, line["low"], line["high"], color=look["color"], alpha=0.2, linewidth=0)


def draw_crosses(axis: Axes, short: pd.Series, look: dict) -> None:
    """Draw NC1 of layers of short rank by the index, or some of the points if there are many."""
    short = short[:: style.compute_stride(len(short))]
    axis.plot(short.index, short, linestyle="", zorder=3, color=look["color"], **style.CROSS)


def label_crosses(axis: Axes, nc1: pd.DataFrame, more: str = "") -> None:
    """Explain the crosses in the legend, if there are any. `more` is added to the explanation."""
    if (nc1["short"] & nc1["nc1"].notna()).any():
        axis.plot([], [], linestyle="", color="0.3", label=SHORT + more, **style.CROSS)


def draw_layer_curves(axes: np.ndarray, means: pd.DataFrame, group: Group, seeds: int, across: str = "epoch") -> None:
    """Draw a curve for each layer on the panel of each set.

    By epoch the input is a dashed line, because it is measured in one epoch only.
    """
    looks = style.assign_looks(group.layers) | {INPUT: style.INPUT}
    width = 1 if len(group.layers) > style.MANY else None
    for name, axis in zip(group.sets, axes, strict=True):
        for layer, line in means[means["set"] == name].groupby("layer", sort=False):
            fewest = means.loc[means["layer"] == layer, "count"].min()
            label = layer if fewest == seeds or seeds == 1 else f"{layer} ({fewest} to {seeds} seeds)"
            if layer == INPUT and across == "epoch":
                axis.axhline(line["mean"].iloc[0], color="black", linestyle="--", linewidth=1.2, label=label)
                axis.axhspan(line["low"].iloc[0], line["high"].iloc[0], color="black", alpha=0.1, linewidth=0)
                if "short" in line:
                    draw_crosses(axis, line.set_index("epoch")["mean"][line["short"].to_numpy()], looks[INPUT])
            else:
                draw_curve(axis, line.set_index(across), label, "-", looks[layer], width)
        if across == "epoch":
            style.format_epoch_axis(axis, group.has_uneven_epochs)
        else:
            style.format_steps_axis(axis, means.loc[means["set"] == name, across])
        axis.set_xlabel(across)
        axis.label_outer()


def use_log_scale(axis: Axes, values: pd.Series) -> None:
    """Make the y axis logarithmic, if any of the values is positive."""
    if (values > 0).any():
        axis.set_yscale("log")


def use_plain_numbers(fig: Figure) -> None:
    """Put plain numbers at the ticks of log axes of less than two decades, where at most one tick is a power of ten."""
    for axis in fig.axes:
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log" and high < 100 * low:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())


def draw_training(fig: Figure, groups: list[Group]) -> None:
    """Draw loss and accuracy by epoch, of all groups in one pair of panels."""
    axes, log = fig.subplots(1, 2), any(group.has_uneven_epochs for group in groups)
    for values, axis in zip(("loss", "accuracy"), axes, strict=True):
        if len(groups) == 1:
            for name, look in style.assign_looks(["train", "test"]).items():
                line = average_over_seeds(groups[0].select_rows("epochs", name), ["epoch"], values).set_index("epoch")
                draw_curve(axis, line, name, style.DASHES[name], look, log=log)
        else:
            for group, look in zip(groups, style.assign_looks(range(len(groups))).values(), strict=True):
                title = f"{style.escape_dollars(group.label)}, {group.describe_seeds(MEAN_SD)}"
                for name, label in (("train", title), ("test", None)):
                    line = average_over_seeds(group.select_rows("epochs", name), ["epoch"], values).set_index("epoch")
                    draw_curve(axis, line, label, style.DASHES[name], look, log=log)
            for name, dash in style.DASHES.items():
                axis.plot([], [], color="black", linestyle=dash, label=name)
        axis.set_xlabel("epoch")
        style.format_epoch_axis(axis, log)
    axes[0].set_ylabel("cross-entropy (nats)")
    axes[1].set_ylabel("accuracy")
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    handles, names = axes[0].get_legend_handles_labels()
    title = groups[0].describe_seeds(MEAN_SD) if len(groups) == 1 else None
    fig.legend(handles, names, loc="outside lower center", ncols=2, title=title)


def draw_nc1(fig: Figure, groups: list[Group]) -> None:
    """Draw NC1 of every layer by epoch."""
    for part, group in add_strips(fig, groups):
        axes = add_panels(part, group, sharey=True)[0]
        table = group.tables["nc1"]
        keys = ["layer", "set", "epoch"]
        means = average_over_seeds(table, keys, "nc1", log=True)
        means["short"] = table.groupby(keys, sort=False)["short"].any().to_numpy()
        draw_layer_curves(axes, means, group, len(group.folders))
        label_crosses(axes[0], table)
        use_log_scale(axes[0], table["nc1"])
        axes[0].set_ylabel(NC1)
        style.add_legend(part, axes[0], f"{group.describe_seeds(MEAN_SD)}\nlayer")
    share_scale(fig, groups, "y")
    use_plain_numbers(fig)


def draw_depth(fig: Figure, groups: list[Group]) -> None:
    """Draw NC1 by the depth of the layer in several epochs, with a fitted line for each."""
    for part, group in add_strips(fig, groups):
        axes = add_panels(part, group, sharey=True)[0]
        table, shown = add_depth(group), group.choose_epochs("nc1")
        layers, star = table[table["layer"] != INPUT], style.INPUT | {"marker": "*", "markersize": 7}
        for name, axis in zip(group.sets, axes, strict=True):
            draw_depth_points(axis, table[(table["set"] == name) & (table["layer"] == INPUT)], star)
        for epoch, marker in zip(shown, cycle(style.MARKERS), strict=False):
            look = {"color": style.get_epoch_colour(epoch, group.last), "marker": marker}
            fits = []
            for name, axis in zip(group.sets, axes, strict=True):
                points = layers[(layers["set"] == name) & (layers["epoch"] == epoch)]
                draw_depth_points(axis, points, look)
                fits += draw_depth_line(axis, points, name, look)
            axes[0].plot([], [], linestyle="", label="\n".join([f"epoch {epoch}", *fits]), **look)
        label_crosses(axes[0], table[(table["layer"] == INPUT) | table["epoch"].isin(shown)], ",\nnot in the line")
        ticks = table.drop_duplicates("depth")
        for axis in axes:
            axis.set_xticks(ticks["depth"], ticks["layer"], rotation=0 if len(ticks) <= 4 else 90)
        use_log_scale(axes[0], table["nc1"])
        axes[0].set_ylabel(NC1)
        style.add_legend(part, axes[0], f"{group.describe_seeds(MEAN_SD)}\nfactor per layer,\ncorrelation")
    share_scale(fig, groups, "y")
    use_plain_numbers(fig)


def draw_depth_points(axis: Axes, nc1: pd.DataFrame, look: dict) -> None:
    """Draw NC1 of one epoch by depth."""
    means = average_over_seeds(nc1, ["depth"], "nc1", log=True).set_index("depth")
    short = nc1.groupby("depth")["short"].any().reindex(means.index)
    full = means[~short]
    bars = [full["mean"] - full["low"], full["high"] - full["mean"]]
    axis.errorbar(full.index, full["mean"], bars, linestyle="", elinewidth=1, **look)
    draw_crosses(axis, means["mean"][short], look)


def draw_depth_line(axis: Axes, nc1: pd.DataFrame, set_name: str, look: dict) -> list[str]:
    """Draw the mean of the lines that are fitted to the seeds. Return a text about it, or nothing without a line."""
    lines = fit_lines(nc1)
    if lines.empty:
        return []
    depth = nc1.loc[is_in_line(nc1), "depth"].drop_duplicates().sort_values()
    fitted = np.exp(lines["start"].mean() + lines["slope"].mean() * depth)
    axis.plot(depth, fitted, color=look["color"], linewidth=1, linestyle="--")
    spread = f" ± {np.exp(lines['slope']).std():.2f}" if len(lines) > 1 else ""
    return [f"  {set_name} ×{np.exp(lines['slope'].mean()):.2f}{spread}, {lines['correlation'].mean():.2f}"]


def add_depth(group: Group) -> pd.DataFrame:
    """Return nc1 with a column depth. It is 0 for the input. Layers where NC1 is not measured count as well."""
    depths = {layer: depth for depth, layer in enumerate([INPUT, *group.layers])}
    table = group.tables["nc1"]
    return table.assign(depth=table["layer"].map(depths))


def is_in_line(nc1: pd.DataFrame) -> pd.Series:
    """Return whether the line of log NC1 by depth is fitted to a row: to layers of full rank, without the input."""
    return nc1["nc1"].between(0, np.inf, inclusive="neither") & ~nc1["short"] & (nc1["layer"] != INPUT)


def fit_lines(nc1: pd.DataFrame) -> pd.DataFrame:
    """Return slope, start and correlation of the line of log NC1 by depth for each seed, set and epoch."""
    found = [
        (*keys, *fit_line(points["depth"], np.log(points["nc1"])))
        for keys, points in nc1[is_in_line(nc1)].groupby(["seed", "set", "epoch"])
        if len(points) > 2
    ]
    lines = pd.DataFrame(found, columns=["seed", "set", "epoch", "slope", "start", "correlation"])
    return lines.sort_values("epoch", kind="stable")  # a seed may lack the first ones


def fit_line(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Return slope, intercept and correlation of the least-squares line. The correlation is NaN if y is constant."""
    slope, start = np.polyfit(x, y, 1)
    return slope, start, slope * x.std() / (y.std() or np.nan)


def has_law(group: Group) -> bool:
    """Return whether lines of log NC1 by depth can be fitted in several epochs."""
    return len(fit_lines(add_depth(group))["epoch"].unique()) > 1


def draw_law(fig: Figure, groups: list[Group]) -> None:
    """Draw slope and correlation of the fitted lines by epoch."""
    for part, group in add_strips(fig, groups):
        axes, lines = part.subplots(1, 2), fit_lines(add_depth(group))
        for values, axis in zip(("slope", "correlation"), axes, strict=True):
            for name, look in style.assign_looks(group.sets).items():
                line = average_over_seeds(lines[lines["set"] == name], ["epoch"], values).set_index("epoch")
                if line.empty:
                    continue
                fewest, most = line["count"].min(), line["count"].max()
                count = f"{fewest} to {most}" if fewest < most else f"{most}"
                label = name if fewest == len(group.folders) else f"{name} ({count} of {len(group.folders)} seeds)"
                draw_curve(axis, line, label, style.DASHES[name], look)
            style.format_epoch_axis(axis, group.has_uneven_epochs)
            style.draw_zero_line(axis)
            axis.set_xlabel("epoch")
        axes[0].set_ylabel("slope of log NC1, per layer")
        axes[1].set_ylabel("correlation of log NC1 with depth")
        axes[1].set_ylim(-1.05, 1.05)
        style.add_legend(part, axes[0], group.describe_seeds(MEAN_SD))
    share_scale(fig, groups, "y")


def draw_information(fig: Figure, groups: list[Group]) -> None:
    """Draw minimality and sufficiency by epoch."""
    draw_measures(fig, groups, "information", "epoch")


def draw_convergence(fig: Figure, groups: list[Group]) -> None:
    """Draw minimality and sufficiency after the last epoch by the steps of the probes."""
    draw_measures(fig, groups, "convergence_information", "steps")


def draw_measures(fig: Figure, groups: list[Group], name: str, across: str) -> None:
    """Draw minimality above sufficiency: lines of what is known, and hollow markers of probes known suboptimal."""
    for part, group in add_strips(fig, groups):
        axes = add_panels(part, group, 2, sharex="col", sharey="row")
        table, keys, shown = group.tables[name], ["layer", "set", across], []
        for measure, pair in zip(MEASURES, axes, strict=True):
            means = average_over_seeds(table, keys, measure)
            draw_layer_curves(pair, means, group, table["seed"].nunique(), across)
            style.widen_axis(pair[0], "y")
            if (table[measure] < 0).any():  # decoders that cannot output constants
                for axis in pair:
                    style.draw_zero_line(axis)
            own = average_over_seeds(table, keys, f"{measure}_by_loss")["mean"]
            shown += draw_own_losses(pair, means.assign(own=own), group, across)
            pair[0].set_ylabel(f"{measure} (bits)")
        if shown:
            label = "probe's own loss" + ("" if all(shown) else f"\n({shown.count(False)} further below)")
            axes[0, 0].plot([], [], linestyle="", color="0.3", marker="o", label=label, **style.HOLLOW)
        style.add_legend(part, axes[0, 0], f"{group.describe_seeds(MEAN_SD, name)}\nencoder up to")
    share_scale(fig, groups, "y")


def draw_own_losses(axes: np.ndarray, means: pd.DataFrame, group: Group, across: str) -> list[bool]:
    """Draw hollow markers where the column own is below the mean. Return for each whether it is shown.

    They are at the markers of the curves. A marker that is more than a quarter of the axis below it is not shown, since
    some probes are far below everything that is known.
    """
    looks = style.assign_looks(group.layers) | {INPUT: style.INPUT}
    bottom, top = axes[0].get_ylim()
    room, lowest, shown = (top - bottom) / 4, bottom, []
    for name, axis in zip(group.sets, axes, strict=True):
        for layer, line in means[means["set"] == name].groupby("layer", sort=False):
            line = line[:: style.compute_stride(len(line))]
            line = line[line["own"] < line["mean"] - SUBOPTIMAL_BITS]
            near = line["own"] > bottom - room
            axis.plot(line[across][near], line["own"][near], linestyle="", zorder=3, **looks[layer], **style.HOLLOW)
            lowest = min([lowest, *(line["own"][near] - 0.2 * room)])  # with space for the marker
            shown += near.tolist()
    axes[0].set_ylim(lowest, top)
    return shown


def add_plane_panels(part: FigureBase, group: Group) -> tuple[np.ndarray, dict[str, dict]]:
    """Return the panels of an information plane, minimality across and sufficiency up, and the looks of the layers."""
    axes = add_panels(part, group, sharex=True, sharey=True)[0]
    for axis in axes:
        axis.set_xlabel("minimality (bits)")
        style.limit_ticks(axis)
    axes[0].set_ylabel("sufficiency (bits)")
    return axes, style.assign_looks(group.layers) | {INPUT: style.INPUT}


def widen_axes(axes: np.ndarray) -> None:
    """Widen both axes of an information plane, which its panels share."""
    for direction in "xy":
        style.widen_axis(axes[0], direction)


def draw_plane(fig: Figure, groups: list[Group]) -> None:
    """Draw a track of each layer in the plane of minimality and sufficiency."""
    for part, group in add_strips(fig, groups):
        axes, looks = add_plane_panels(part, group)
        for name, axis in zip(group.sets, axes, strict=True):
            points = group.select_rows("information", name).rename(columns={"minimality": "x", "sufficiency": "y"})
            for layer, track in points.groupby("layer", sort=False):
                draw_track(axis, track, layer, looks[layer])
        widen_axes(axes)
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nencoder up to")
    share_scale(fig, groups, "x", "y")


def draw_track(axis: Axes, points: pd.DataFrame, label: str, look: dict) -> None:
    """Draw the mean over seeds of x and y at 20 epochs, with an arrow along time half-way out from the start.

    The last epoch is a large marker, or a cross if a rank is short there. Small markers are the seeds in that epoch.
    Points without a value are left out.
    """
    points = points.dropna(subset=["x", "y"])
    if points.empty:
        return
    means = points.groupby("epoch")[["x", "y"]].mean()
    means = means.loc[choose_log_spaced(means.index.tolist(), 20)]
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
        arrow = {"arrowstyle": "-|>", "color": look["color"], "linewidth": 0.8}
        axis.annotate("", (x[half], y[half]), (x[half - 1], y[half - 1]), arrowprops=arrow)


def draw_plane_by_epoch(fig: Figure, groups: list[Group]) -> None:
    """Draw a line through the layers of each epoch, in the colour of the epoch."""
    for part, group in add_strips(fig, groups):
        axes, looks = add_plane_panels(part, group)
        shown = choose_log_spaced(group.list_epochs("dib"), 40)
        for name, axis in zip(group.sets, axes, strict=True):
            rows = group.select_rows("information", name)
            means = rows.groupby(["layer", "epoch"], sort=False)[list(MEASURES)].mean().reset_index()
            for epoch in shown:
                joined = means[(means["epoch"] == epoch) | (means["layer"] == INPUT)]
                colour = style.get_epoch_colour(epoch, group.last)
                axis.plot(*joined[list(MEASURES)].to_numpy().T, color=colour, linewidth=0.8, zorder=1)
            for layer, points in means[means["epoch"].isin(shown)].groupby("layer", sort=False):
                marker = looks[layer]["marker"]
                colours = style.get_epoch_colour(points["epoch"], group.last)
                axis.scatter(points["minimality"], points["sufficiency"], c=colours, marker=marker, s=16)
                axis.scatter([], [], color="black", marker=marker, s=16, label=layer)
        widen_axes(axes)
        add_colour_bar(part, axes, group.last)
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nencoder up to")
    share_scale(fig, groups, "x", "y")


def add_colour_bar(fig: FigureBase, axes: np.ndarray, last: int) -> None:
    """Add the colours of the epochs beside the panels."""
    bar = fig.colorbar(ScalarMappable(style.make_epoch_norm(last), style.EPOCHS), ax=list(axes), label="epoch")
    bar.solids.set(rasterized=False, edgecolor="face")  # vector graphics in a PDF, like the rest
    ticks = [0, *(digit * 10**power for power in range(6) for digit in (1, 2, 5))]
    bar.ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def compute_gap(table: pd.DataFrame, keys: list[str], value: str) -> pd.Series:
    """Return test - train of a value by the keys, seed and epoch, where both are finite."""
    wide = table.pivot(index=[*keys, "seed", "epoch"], columns="set", values=value)
    if not {"train", "test"} <= set(wide):
        return pd.Series(dtype=float)
    return (wide["test"] - wide["train"]).replace([np.inf, -np.inf], np.nan).dropna()


def compute_gaps(group: Group) -> dict[str, pd.Series]:
    """Return {measure: gap} of NC1 and minimality of the layers. A measure without values of both sets is left out."""
    nc1, information = group.tables["nc1"], group.tables["information"]
    measured = {
        "NC1": compute_gap(nc1[nc1["layer"] != INPUT], ["layer"], "nc1"),
        MINIMALITY: compute_gap(information[information["layer"] != INPUT], ["layer"], "minimality"),
    }
    return {title: values for title, values in measured.items() if len(values)}


def explain_unequal_sets(group: Group) -> str:
    """Return why the information of the two sets cannot be compared, or nothing if it can."""
    for flags in group.hparams:
        samples = flags.get("dib_samples") or {}
        if not {"train", "test"} <= set(samples):
            return "the number of samples is not recorded"
        if samples["train"] != samples["test"]:
            return f"{samples['train']:,} training and {samples['test']:,} test samples"
    return ""


def has_gap(group: Group) -> bool:
    """Return whether NC1 or minimality can be compared between the sets."""
    found = compute_gaps(group)
    return "NC1" in found or (MINIMALITY in found and not explain_unequal_sets(group))


def draw_gap(fig: Figure, groups: list[Group]) -> None:
    """Draw a track of each layer in the plane of the gap of a measure and the gap of the loss."""
    for part, group in add_strips(fig, groups):
        loss, measured = compute_gap(group.tables["epochs"], [], "loss"), compute_gaps(group)
        short = group.tables["nc1"].groupby(["layer", "seed", "epoch"])["short"].any()
        axes = part.subplots(1, len(measured), squeeze=False, sharey=True)[0]
        for (title, values), axis in zip(measured.items(), axes, strict=True):
            if title == MINIMALITY and (reason := explain_unequal_sets(group)):
                text = f"minimality is not compared:\n{reason}.\nChoose equal numbers of samples\nwith --dib-size."
                axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")
                axis.set_axis_off()
                continue
            for layer, look in style.assign_looks(group.layers).items():
                if layer in values.index.get_level_values(0):
                    points = pd.DataFrame({"x": values.loc[layer], "y": loss})
                    if title == "NC1":
                        points["short"] = short.loc[layer]
                    draw_track(axis, points.reset_index(), layer, look)
            style.limit_ticks(axis)
            if title == "NC1":
                label_crosses(axes[0], group.tables["nc1"].query("layer in @group.layers and epoch == epoch.max()"))
            else:
                style.widen_axis(axis, "x")
            size = values.abs()
            if size.max() > 100 * size.median() > 0:  # it spans decades on both sides of 0
                axis.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(size.median())))
            axis.set_xlabel(f"{title}, test − train")
        axes[0].set_ylabel("cross-entropy (nats), test − train")
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nlayer")
    share_scale(fig, groups, "y")


def draw_lr_range(fig: Figure, groups: list[Group]) -> None:
    """Draw the loss of the learning-rate range test by learning rate."""
    for part, group in add_strips(fig, groups):
        axis = part.subplots()
        table = group.tables["lr_range"]
        axis.plot(table["learning_rate"], table["loss"], ".", color="0.6", label="each step")
        for number, (_, steps) in enumerate(table.groupby("seed", sort=False)):
            label = "smoothed" if number == 0 else None
            axis.plot(steps["learning_rate"], steps["smoothed"], color="#0072B2", label=label)
            for rate in steps.loc[steps["chosen"] == 1, "learning_rate"]:
                axis.axvline(rate, color="#D55E00", linestyle="--", label=f"chosen: {rate:.2g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats)")
        early = table[table["step"] <= table["step"].max() / 2]  # the diverging end would flatten the rest
        axis.set_ylim(top=1.3 * early["smoothed"].max())
        axis.legend(title=group.describe_seeds())
