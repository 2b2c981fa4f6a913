"""Draw the figures, with one function for each figure. gallery.py has the captions.

A group (tables.py) is a set of runs that differ only in their seed.
"""

from collections.abc import Iterator
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, ScalarFormatter

from analysis import style
from analysis.reading import INPUT, SETS
from analysis.statistics import (
    QUANTITIES,
    SUBOPTIMAL_BITS,
    add_depth,
    average_over_seeds,
    choose_log_spaced,
    compute_gap,
    compute_gaps,
    explain_unequal_sets,
    fit_lines,
    is_in_line,
)
from analysis.tables import MEAN_SD, Group

NC1 = r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit"
RANK_DEFICIENT = "rank below\nmin(d, C − 1)"


def add_subfigures(fig: Figure, groups: list[Group]) -> Iterator[tuple[FigureBase, Group]]:
    """Yield a subfigure for each group. If there are several groups, each subfigure has the group's label as title."""
    for part, group in zip(fig.subfigures(len(groups), squeeze=False)[:, 0], groups, strict=True):
        if len(groups) > 1:
            part.suptitle(style.escape_dollars(group.label), fontsize="medium", fontweight="bold")
        yield part, group


def add_panels(fig: FigureBase, group: Group, down: int = 1, of_dib: bool = False, **shared) -> np.ndarray:
    """Add panels with one column for each set. Return them as an array (down, len(group.sets)).

    of_dib: whether the titles contain the number of samples of DIB.
    """
    axes = fig.subplots(down, len(group.sets), squeeze=False, **shared)
    for axis, name in zip(axes[0], group.sets, strict=True):
        samples = group.describe_samples(name) if of_dib else ""
        axis.set_title(f"{name} set, {samples}" if samples else f"{name} set", fontsize="medium")
    return axes


def share_scale(fig: Figure, groups: list[Group], *directions: str) -> None:
    """Set equal axis limits for all panels that show the same quantity for the same data set.

    directions: "x", "y" or both.
    """
    alike: dict[tuple, list[Axes]] = {}
    for part, group in zip(fig.subfigs, groups, strict=True):
        for axis in part.axes:
            # If the panels of a row share their limits, only the first has a label.
            if axis.get_ylabel() and axis.get_label() != "<colorbar>":
                column = axis.get_subplotspec().colspan.start
                alike.setdefault((axis.get_ylabel(), column, group.hparams[0]["data"]), []).append(axis)
    for direction in directions:
        for axes in alike.values():
            limits = [getattr(axis, f"get_{direction}lim")() for axis in axes]
            for axis in axes:
                getattr(axis, f"set_{direction}lim")(min(low for low, _ in limits), max(high for _, high in limits))


def draw_curve(axis: Axes, line: pd.DataFrame, label: str | None, look: dict, log: bool = False) -> None:
    """Plot the mean over seeds against the index (epoch or steps), with a band of one standard deviation.

    look: options of axis.plot, among them color. log: whether markers are evenly spaced on a log axis. If False, every
    n-th point has a marker.
    """
    deficient = line.get("rank_deficient", pd.Series(False, line.index))
    marked = range(0, len(line), style.compute_stride(len(line)))
    if log:
        marked = line.index.get_indexer(choose_log_spaced(list(line.index), 15))
    every = [int(i) for i in marked if not deficient.iloc[i]]
    axis.plot(line.index, line["mean"], label=label, markevery=every, **look)
    draw_crosses(axis, line["mean"][deficient], look["color"])
    if (line["high"] > line["low"]).any():
        axis.fill_between(line.index, line["low"], line["high"], color=look["color"], alpha=0.2, linewidth=0)


def draw_crosses(axis: Axes, points: pd.Series, colour: object) -> None:
    """Draw crosses at points where the rank of the class means is deficient, at most about 15."""
    points = points[:: style.compute_stride(len(points))]
    axis.plot(points.index, points, linestyle="", zorder=3, color=colour, **style.CROSS)


def label_crosses(axis: Axes, nc1: pd.DataFrame, more: str = "") -> None:
    """Add a legend entry for the crosses, if there are any. more: text that is appended to it."""
    if (nc1["rank_deficient"] & nc1["nc1"].notna()).any():
        axis.plot([], [], linestyle="", color="0.3", label=RANK_DEFICIENT + more, **style.CROSS)


def draw_layer_curves(axes: np.ndarray, means: pd.DataFrame, group: Group, seeds: int, across: str = "epoch") -> None:
    """Draw a curve for each layer on the panel of each set. across: the column on the x axis, "epoch" or "steps"."""
    looks = style.assign_looks(group.layers) | {INPUT: style.INPUT}
    width = 1 if len(group.layers) > style.MANY else None
    for name, axis in zip(group.sets, axes, strict=True):
        for layer, line in means[means["set"] == name].groupby("layer", sort=False):
            fewest = means.loc[means["layer"] == layer, "count"].min()
            label = layer if fewest == seeds or seeds == 1 else f"{layer} ({fewest} to {seeds} seeds)"
            if layer == INPUT and across == "epoch":
                draw_input(axis, line, label)
            else:
                draw_curve(axis, line.set_index(across), label, looks[layer] | {"linewidth": width})
        if across == "epoch":
            style.format_epoch_axis(axis, group.has_uneven_epochs)
        else:
            style.format_steps_axis(axis, means.loc[means["set"] == name, across])
        if axis.get_subplotspec().is_last_row():
            axis.set_xlabel(across)


def draw_input(axis: Axes, line: pd.DataFrame, label: str) -> None:
    """Draw the input as a horizontal dashed line with a band, because it is measured in one epoch only."""
    colour = style.INPUT["color"]
    axis.axhline(line["mean"].iloc[0], color=colour, linestyle="--", linewidth=1.2, label=label)
    axis.axhspan(line["low"].iloc[0], line["high"].iloc[0], color=colour, alpha=0.1, linewidth=0)
    if "rank_deficient" in line:
        draw_crosses(axis, line.set_index("epoch")["mean"][line["rank_deficient"].to_numpy()], colour)


def use_log_scale(axis: Axes, values: pd.Series) -> None:
    """Make the y axis logarithmic, if any of the values is positive."""
    if (values > 0).any():
        axis.set_yscale("log")


def use_plain_numbers(fig: Figure) -> None:
    """Use decimal tick labels on log axes of less than two decades, which have too few powers of ten."""
    for axis in fig.axes:
        low, high = axis.get_ylim()
        if axis.get_yscale() == "log" and high < 100 * low:
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())


def draw_training(fig: Figure, groups: list[Group]) -> None:
    """Draw loss and accuracy by epoch. All groups are in the same two panels."""
    axes, log = fig.subplots(1, 2), any(group.has_uneven_epochs for group in groups)
    for column, axis in zip(("loss", "accuracy"), axes, strict=True):
        for group, name, label, look in list_training_curves(groups):
            line = average_over_seeds(group.select_rows("epochs", name), ["epoch"], column).set_index("epoch")
            draw_curve(axis, line, label, look | {"linestyle": style.DASHES[name]}, log)
        if len(groups) > 1:
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


def list_training_curves(groups: list[Group]) -> list[tuple[Group, str, str | None, dict]]:
    """Return (group, set, label, look) of each curve. Each group has a colour, or if there is only one, each set."""
    if len(groups) == 1:
        return [(groups[0], name, name, look) for name, look in style.assign_looks(SETS).items()]
    curves = []
    for group, look in zip(groups, style.assign_looks(range(len(groups))).values(), strict=True):
        curves.append((group, "train", f"{style.escape_dollars(group.label)}, {group.describe_seeds(MEAN_SD)}", look))
        curves.append((group, "test", None, look))
    return curves


def draw_nc1(fig: Figure, groups: list[Group]) -> None:
    """Draw NC1 of every layer by epoch."""
    for part, group in add_subfigures(fig, groups):
        axes = add_panels(part, group, sharey=True)[0]
        table = group.tables["nc1"]
        keys = ["layer", "set", "epoch"]
        means = average_over_seeds(table, keys, "nc1", log=True)
        means["rank_deficient"] = table.groupby(keys, sort=False)["rank_deficient"].any().to_numpy()
        draw_layer_curves(axes, means, group, len(group.folders))
        label_crosses(axes[0], table)
        use_log_scale(axes[0], table["nc1"])
        axes[0].set_ylabel(NC1)
        style.add_legend(part, axes[0], f"{group.describe_seeds(MEAN_SD)}\nlayer")
    share_scale(fig, groups, "y")
    use_plain_numbers(fig)


def draw_depth(fig: Figure, groups: list[Group]) -> None:
    """Draw NC1 by the depth of the layer in several epochs, with a fitted line for each."""
    for part, group in add_subfigures(fig, groups):
        axes = add_panels(part, group, sharey=True)[0]
        table, shown = add_depth(group.tables["nc1"], group.layers), group.choose_epochs("nc1")
        layers, star = table[table["layer"] != INPUT], style.INPUT | {"marker": "*", "markersize": 7}
        for name, axis in zip(group.sets, axes, strict=True):
            draw_depth_points(axis, table[(table["set"] == name) & (table["layer"] == INPUT)], star)
        for epoch, marker in zip(shown, cycle(style.MARKERS), strict=False):
            look = {"color": style.get_epoch_colour(epoch, group.last), "marker": marker}
            texts = [f"epoch {epoch}"]
            for name, axis in zip(group.sets, axes, strict=True):
                points = layers[(layers["set"] == name) & (layers["epoch"] == epoch)]
                draw_depth_points(axis, points, look)
                texts += draw_depth_line(axis, points, name, look)
            axes[0].plot([], [], linestyle="", label="\n".join(texts), **look)
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
    deficient = nc1.groupby("depth")["rank_deficient"].any().reindex(means.index)
    full = means[~deficient]
    bars = [full["mean"] - full["low"], full["high"] - full["mean"]]
    axis.errorbar(full.index, full["mean"], bars, linestyle="", elinewidth=1, **look)
    draw_crosses(axis, means["mean"][deficient], look["color"])


def draw_depth_line(axis: Axes, nc1: pd.DataFrame, set_name: str, look: dict) -> list[str]:
    """Draw the mean of the lines fitted for each seed. Return its legend text in a list, empty if there is no line."""
    lines = fit_lines(nc1)
    if lines.empty:
        return []
    depth = nc1.loc[is_in_line(nc1), "depth"].drop_duplicates().sort_values()
    fitted = np.exp(lines["intercept"].mean() + lines["slope"].mean() * depth)
    axis.plot(depth, fitted, color=look["color"], linewidth=1, linestyle="--")
    spread = f" ± {np.exp(lines['slope']).std():.2f}" if len(lines) > 1 else ""
    return [f"  {set_name} ×{np.exp(lines['slope'].mean()):.2f}{spread}, {lines['correlation'].mean():.2f}"]


def has_law(group: Group) -> bool:
    """Return whether lines of log NC1 by depth can be fitted in several epochs."""
    return fit_lines(add_depth(group.tables["nc1"], group.layers))["epoch"].nunique() > 1


def draw_law(fig: Figure, groups: list[Group]) -> None:
    """Draw slope and correlation of the fitted lines by epoch."""
    for part, group in add_subfigures(fig, groups):
        axes, lines = part.subplots(1, 2), fit_lines(add_depth(group.tables["nc1"], group.layers))
        for column, axis in zip(("slope", "correlation"), axes, strict=True):
            for name, look in style.assign_looks(group.sets).items():
                line = average_over_seeds(lines[lines["set"] == name], ["epoch"], column).set_index("epoch")
                if line.empty:
                    continue
                fewest, most = line["count"].min(), line["count"].max()
                count = f"{fewest} to {most}" if fewest < most else f"{most}"
                label = name if fewest == len(group.folders) else f"{name} ({count} of {len(group.folders)} seeds)"
                draw_curve(axis, line, label, look | {"linestyle": style.DASHES[name]})
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
    draw_quantities(fig, groups, "information", "epoch")


def draw_convergence(fig: Figure, groups: list[Group]) -> None:
    """Draw minimality and sufficiency after one epoch by the steps of the probes."""
    draw_quantities(fig, groups, "convergence_information", "steps")


def draw_quantities(fig: Figure, groups: list[Group], name: str, across: str) -> None:
    """Draw minimality (upper panels) and sufficiency (lower panels) of a table, with their controls.

    Lines use `upper`. Hollow markers use the loss of probes that are known suboptimal.
    """
    for part, group in add_subfigures(fig, groups):
        axes = add_panels(part, group, 2, of_dib=True, sharex="col", sharey="row" if group.has_equal_sets else False)
        table, keys, shown = group.tables[name], ["layer", "set", across], []
        for quantity, pair in zip(QUANTITIES, axes, strict=True):
            means = average_over_seeds(table, keys, quantity)
            draw_layer_curves(pair, means, group, table["seed"].nunique(), across)
            for axis in pair:
                style.widen_axis(axis, "y")
            # negative values occur only for decoders that cannot output class frequencies
            if (table[quantity] < 0).any():
                for axis in pair:
                    style.draw_zero_line(axis)
            if quantity == "minimality":
                entries = draw_ceiling(pair, table, group, "y")
                entries += draw_deviations(pair, means, table, group, across)
            else:
                entries += draw_controls(pair, table, group, across)
            by_loss = average_over_seeds(table, keys, f"{quantity}_by_loss")["mean"]
            shown += draw_hollow_markers(pair, means.assign(by_loss=by_loss), group, across)
            label_vertical_axes(pair, group, f"{quantity} (bits)")
        if shown:
            label = "probe's own loss" + ("" if all(shown) else f"\n({shown.count(False)} further below)")
            axes[0, 0].plot([], [], linestyle="", color="0.3", marker="o", label=label, **style.HOLLOW)
        epochs = [] if across == "epoch" else [f"epoch {epoch}" for epoch in group.list_epochs("convergence")]
        title = "\n".join([group.describe_seeds(MEAN_SD, name), *epochs, "encoder up to"])
        style.add_legend(part, axes[0, 0], title)
        style.add_key(part, entries)
    share_scale(fig, groups, "y")


def label_vertical_axes(axes: np.ndarray, group: Group, label: str) -> None:
    """Label the y axis of the first panel, or of all panels if they have scales of their own."""
    for axis in axes[:1] if group.has_equal_sets else axes:
        axis.set_ylabel(label)


def draw_ceiling(axes: np.ndarray, table: pd.DataFrame, group: Group, direction: str) -> list[Artist]:
    """Draw a line at the ceiling of minimality in the panel of each set. Return its legend entry.

    Without controls there is no line. The axis is not made longer by more than a quarter, because low values would be
    hard to see.

    table: information by epoch or by steps. direction: that of the axis of minimality, "x" or "y".
    """
    ceilings = table.groupby("set")["ceiling"].mean().dropna()
    if table["shuffled"].isna().all() or ceilings.empty:
        return []
    for name, axis in zip(group.sets, axes, strict=True):
        if name in ceilings:
            low, high = getattr(axis, f"get_{direction}lim")()
            if ceilings[name] < high + (high - low) / 4:
                style.extend_axis(axis, direction, [ceilings[name]])
            {"x": axis.axvline, "y": axis.axhline}[direction](ceilings[name], **style.CEILING)
    values = ", ".join(f"{ceilings[name]:.2f} ({name})" for name in group.sets if name in ceilings)
    return [Line2D([], [], label=f"ceiling of minimality: {values}", **style.CEILING)]


def draw_deviations(
    axes: np.ndarray, means: pd.DataFrame, table: pd.DataFrame, group: Group, across: str
) -> list[Artist]:
    """Draw the standard deviation of minimality over enumerations as bars at markers. Return their legend entry.

    means: mean minimality over seeds. table: information, whose column `deviation` is averaged over seeds.
    """
    deviations = average_over_seeds(table, ["layer", "set", across], "deviation")["mean"]
    if deviations.isna().all():
        return []
    looks = style.assign_looks(group.layers) | {INPUT: style.INPUT}
    for name, axis in zip(group.sets, axes, strict=True):
        rows = means.assign(deviation=deviations)[means["set"] == name]
        for layer, line in rows.groupby("layer", sort=False):
            line = line[:: style.compute_stride(len(line))]
            axis.errorbar(line[across], line["mean"], line["deviation"], color=looks[layer]["color"], **style.BARS)
            ends = pd.concat([line["mean"] - line["deviation"], line["mean"] + line["deviation"]])
            style.extend_axis(axis, "y", ends.dropna())
    return [Line2D([], [], linestyle="", color="0.3", label=f"sd over {group.enumerations} enumerations", **style.BAR)]


def draw_controls(axes: np.ndarray, table: pd.DataFrame, group: Group, across: str) -> list[Artist]:
    """Draw the information about shuffled labels and held-out samples in the panels of sufficiency.

    Return the legend entries. Values below 0, which held-out samples may have, do not make the axis longer.
    """
    looks, entries = style.assign_looks(group.layers) | {INPUT: style.INPUT}, {}
    for name, axis in zip(group.sets, axes, strict=True):
        for column, look in style.CONTROLS.items():
            means = average_over_seeds(table[table["set"] == name], ["layer", across], column).dropna(subset="mean")
            if means.empty:
                continue
            thin = {"linestyle": look["linestyle"], **style.THIN}
            for layer, line in means.groupby("layer", sort=False):
                if len(line) == 1:  # such as the input
                    axis.axhline(line["mean"].iloc[0], color=looks[layer]["color"], **thin)
                else:
                    axis.plot(line[across], line["mean"], color=looks[layer]["color"], **thin)
            if means["mean"].min() < 0:
                style.draw_zero_line(axis)
            style.extend_axis(axis, "y", means["mean"].clip(lower=0))
            entries[column] = Line2D([], [], color="0.3", label=look["label"], **thin)
    return list(entries.values())


def draw_hollow_markers(axes: np.ndarray, means: pd.DataFrame, group: Group, across: str) -> list[bool]:
    """Draw hollow markers where the column by_loss is below mean. Return for each of them whether it is shown.

    They are drawn where the curves have markers. Markers that are below the axis by more than a quarter of its length
    are omitted.
    """
    looks = style.assign_looks(group.layers) | {INPUT: style.INPUT}
    shown = []
    for name, axis, (bottom, top) in zip(group.sets, axes, [axis.get_ylim() for axis in axes], strict=True):
        room, lowest = (top - bottom) / 4, axis.get_ylim()[0]
        for layer, line in means[means["set"] == name].groupby("layer", sort=False):
            line = line[:: style.compute_stride(len(line))]
            line = line[line["by_loss"] < line["mean"] - SUBOPTIMAL_BITS]
            near = line["by_loss"] > bottom - room
            axis.plot(line[across][near], line["by_loss"][near], linestyle="", zorder=3, **looks[layer], **style.HOLLOW)
            lowest = min([lowest, *(line["by_loss"][near] - 0.2 * room)])  # with space for the marker
            shown += near.tolist()
        axis.set_ylim(lowest, top)
    return shown


def add_plane_panels(part: FigureBase, group: Group) -> tuple[np.ndarray, dict[str, dict]]:
    """Add the panels of an information plane. Return them with the looks of the layers."""
    axes = add_panels(part, group, of_dib=True, sharex=group.has_equal_sets, sharey=group.has_equal_sets)[0]
    for axis in axes:
        axis.set_xlabel("minimality (bits)")
        style.limit_ticks(axis)
    label_vertical_axes(axes, group, "sufficiency (bits)")
    return axes, style.assign_looks(group.layers) | {INPUT: style.INPUT}


def widen_axes(axes: np.ndarray) -> None:
    """Widen both axes of the panels of an information plane."""
    for axis in axes:
        for direction in "xy":
            style.widen_axis(axis, direction)


def draw_plane(fig: Figure, groups: list[Group]) -> None:
    """Draw the path of each layer over the epochs in the plane of minimality and sufficiency."""
    for part, group in add_subfigures(fig, groups):
        axes, looks = add_plane_panels(part, group)
        for name, axis in zip(group.sets, axes, strict=True):
            points = group.select_rows("information", name).rename(columns={"minimality": "x", "sufficiency": "y"})
            for layer, of_layer in points.groupby("layer", sort=False):
                draw_path(axis, of_layer, layer, looks[layer])
        widen_axes(axes)
        entries = draw_ceiling(axes, group.tables["information"], group, "x")
        entries += draw_control_marks(axes, group, looks)
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nencoder up to")
        style.add_key(part, entries)
    share_scale(fig, groups, "x", "y")


def average_last(group: Group, set_name: str) -> pd.DataFrame:
    """Return the mean information over seeds in the last measured epoch, with a row for each layer, in order of depth.

    The controls are also in a column each, which is left out if it has no values.
    """
    rows = group.select_last("information")
    columns = [*QUANTITIES, *style.CONTROLS]
    means = rows[rows["set"] == set_name].groupby("layer", sort=False)[columns].mean()
    return means.dropna(axis=1, how="all")


def draw_control_marks(axes: np.ndarray, group: Group, looks: dict[str, dict]) -> list[Artist]:
    """Draw marks at the controls of sufficiency in the last epoch, joined to the end of the path of each layer.

    Return the legend entries. Values below 0 do not make the axis longer.
    """
    entries = {}
    for name, axis in zip(group.sets, axes, strict=True):
        means = average_last(group, name)
        controls = [column for column in style.CONTROLS if column in means]
        for layer, row in means.iterrows() if controls else ():
            thin = {"color": looks[layer]["color"], **style.THIN}
            lowest = row[["sufficiency", *controls]].min()
            axis.plot([row["minimality"]] * 2, [row["sufficiency"], lowest], linestyle=":", **thin)
            for column in controls:
                axis.plot(row["minimality"], row[column], marker=style.CONTROLS[column]["marker"], markersize=6, **thin)
        for column in controls:
            look = style.CONTROLS[column] | {"linestyle": "", "color": "0.3", "markersize": 6}
            entries[column] = Line2D([], [], **look)
            style.extend_axis(axis, "y", means[column].dropna().clip(lower=0))
    return list(entries.values())


def draw_path(axis: Axes, points: pd.DataFrame, label: str, look: dict) -> None:
    """Draw the path of the mean over seeds of x and y through at most 20 epochs.

    An arrow shows its direction, at the first epoch with half of the largest distance from the start. The last epoch
    has a large marker, or a cross if the rank is deficient for a seed, and small markers for the seeds. Points without
    a value are left out.
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
    if "rank_deficient" in ends and ends["rank_deficient"].any():
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
    for part, group in add_subfigures(fig, groups):
        axes, looks = add_plane_panels(part, group)
        shown = choose_log_spaced(group.list_epochs("dib"), 40)
        for name, axis in zip(group.sets, axes, strict=True):
            rows = group.select_rows("information", name)
            means = rows.groupby(["layer", "epoch"], sort=False)[list(QUANTITIES)].mean().reset_index()
            for epoch in shown:
                joined = means[(means["epoch"] == epoch) | (means["layer"] == INPUT)]
                colour = style.get_epoch_colour(epoch, group.last)
                axis.plot(*joined[list(QUANTITIES)].to_numpy().T, color=colour, linewidth=0.8, zorder=1)
            for layer, points in means[means["epoch"].isin(shown)].groupby("layer", sort=False):
                marker = looks[layer]["marker"]
                colours = style.get_epoch_colour(points["epoch"], group.last)
                axis.scatter(points["minimality"], points["sufficiency"], c=colours, marker=marker, s=16)
                axis.scatter([], [], color="black", marker=marker, s=16, label=layer)
        widen_axes(axes)
        entries = draw_ceiling(axes, group.tables["information"], group, "x")
        entries += draw_control_lines(axes, group)
        add_colour_bar(part, axes, group.last)
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nencoder up to")
        style.add_key(part, entries)
    share_scale(fig, groups, "x", "y")


def draw_control_lines(axes: np.ndarray, group: Group) -> list[Artist]:
    """Draw lines through the controls of the layers in the last epoch. Return the legend entries."""
    entries = {}
    for name, axis in zip(group.sets, axes, strict=True):
        means = average_last(group, name)
        for column, look in style.CONTROLS.items():
            if column in means:
                thin = {"linestyle": look["linestyle"], "color": style.get_epoch_colour(group.last, group.last)}
                axis.plot(means["minimality"], means[column], **thin, **style.THIN)
                style.extend_axis(axis, "y", means[column].dropna().clip(lower=0))
                entries[column] = Line2D([], [], label=f"{look['label']}, last epoch", **thin, **style.THIN)
    return list(entries.values())


def add_colour_bar(fig: FigureBase, axes: np.ndarray, last: int) -> None:
    """Add the colours of the epochs beside the panels."""
    bar = fig.colorbar(ScalarMappable(style.make_epoch_norm(last), style.EPOCHS), ax=list(axes), label="epoch")
    bar.solids.set(rasterized=False, edgecolor="face")  # vector graphics in a PDF, like the rest
    ticks = [0, *(digit * 10**power for power in range(6) for digit in (1, 2, 5))]
    bar.ax.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if tick <= last]))
    bar.ax.yaxis.set_major_formatter(ScalarFormatter())
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


def has_gap(group: Group) -> bool:
    """Return whether NC1 or minimality can be compared between the sets."""
    gaps = compute_gaps(group.tables["nc1"], group.tables["information"])
    return "NC1" in gaps or ("minimality" in gaps and not explain_unequal_sets(group.hparams))


def draw_gap(fig: Figure, groups: list[Group]) -> None:
    """Draw the path of each layer in the plane of the gap of NC1 or minimality and the gap of the loss."""
    for part, group in add_subfigures(fig, groups):
        gaps = compute_gaps(group.tables["nc1"], group.tables["information"])
        axes = part.subplots(1, len(gaps), squeeze=False, sharey=True)[0]
        for (name, values), axis in zip(gaps.items(), axes, strict=True):
            reason = explain_unequal_sets(group.hparams)
            if name == "minimality" and reason:
                text = f"minimality cannot be compared:\n{reason}.\nUse --dib-size to measure\nboth sets at equal size."
                axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center")
                axis.set_axis_off()
                continue
            draw_gap_paths(axis, group, name, values)
            style.limit_ticks(axis)
            if name == "NC1":
                axis.set_xlabel("NC1, test − train")
                label_crosses(axes[0], group.tables["nc1"].query("layer in @group.layers and epoch == epoch.max()"))
            else:
                axis.set_xlabel("minimality (bits), test − train")
                style.widen_axis(axis, "x")
            size = values.abs()
            if size.max() > 100 * size.median() > 0:  # values differ by orders of magnitude
                axis.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(size.median())))
        axes[0].set_ylabel("cross-entropy (nats), test − train")
        style.add_legend(part, axes[0], f"{group.describe_seeds('mean of ')}\nlayer")
    share_scale(fig, groups, "y")


def draw_gap_paths(axis: Axes, group: Group, name: str, gaps: pd.Series) -> None:
    """Draw the path of each layer. name: "NC1" or "minimality", whose gaps are given."""
    losses = compute_gap(group.tables["epochs"], [], "loss")
    deficient = group.tables["nc1"].groupby(["layer", "seed", "epoch"])["rank_deficient"].any()
    for layer, look in style.assign_looks(group.layers).items():
        if layer in gaps.index.get_level_values(0):
            points = pd.DataFrame({"x": gaps.loc[layer], "y": losses})
            if name == "NC1":
                points["rank_deficient"] = deficient.loc[layer]
            draw_path(axis, points.reset_index(), layer, look)


def draw_lr_range(fig: Figure, groups: list[Group]) -> None:
    """Draw the loss of the learning-rate range test by learning rate."""
    for part, group in add_subfigures(fig, groups):
        axis = part.subplots()
        table = group.tables["lr_range"]
        axis.plot(table["learning_rate"], table["loss"], ".", color="0.6", label="each step")
        for number, (_, steps) in enumerate(table.groupby("seed", sort=False)):
            label = "smoothed" if number == 0 else None
            axis.plot(steps["learning_rate"], steps["smoothed"], color="#0072B2", label=label)
            for rate in steps.loc[steps["chosen"] == 1, "learning_rate"]:
                axis.axvline(rate, color="#D55E00", linestyle="--", label=f"chosen: {rate:.2g}")
        axis.set(xscale="log", xlabel="learning rate", ylabel="cross-entropy (nats)")
        early = table[table["step"] <= table["step"].max() / 2]  # the large losses at the end are cut off
        axis.set_ylim(top=1.3 * early["smoothed"].max())
        axis.legend(title=group.describe_seeds())
