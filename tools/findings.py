"""Make the tables of docs/study.md.

Each function tabulate_... takes {name of a sweep: its group} and returns a table of texts.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.reading import INPUT, SETS
from analysis.statistics import (
    QUANTITIES,
    add_depth,
    average_over_seeds,
    compute_gap,
    compute_geometric_mean,
    compute_layer_ratios,
    compute_spearman,
    find_extreme_epochs,
    find_law_epoch,
    fit_lines,
    pivot_by_epoch,
)
from analysis.table import NOT_MEASURED, format_digits, format_mean, format_rank
from analysis.tables import Group

Groups = dict[str, Group]
FITTED = 0.99  # the training accuracy from which on a network is fitted
LAW = -0.9  # the law of data separation holds up to this correlation of log NC1 with depth
MIN_SEEDS = 5  # for a correlation over seeds


def tabulate_fit(groups: Groups) -> pd.DataFrame:
    """Return errors and losses of each network after the last epoch."""
    rows = []
    for name, group in groups.items():
        epochs = group.tables["epochs"].query("epoch == @group.last")
        train, test = (epochs[epochs["set"] == name] for name in SETS)
        rows.append(
            {
                "runs": name,
                "seeds": str(len(group.folders)),
                "epochs": str(group.last),
                "training error (%)": format_mean(100 * (1 - train["accuracy"])),
                "test error (%)": format_mean(100 * (1 - test["accuracy"])),
                "loss, train (nats)": format_mean(train["loss"]),
                "loss, test (nats)": format_mean(test["loss"]),
                f"first measured epoch with {FITTED:.0%} training accuracy": format_epoch(find_fit_epoch(group)),
            }
        )
    return pd.DataFrame(rows)


def find_fit_epoch(group: Group) -> int | None:
    """Return the first epoch in which NC1 is measured and the mean training accuracy is at least FITTED."""
    means = average_over_seeds(group.select_rows("epochs", "train"), ["epoch"], "accuracy").set_index("epoch")["mean"]
    return next((epoch for epoch in group.list_epochs("nc1") if means[epoch] >= FITTED), None)


def list_compared_epochs(group: Group) -> list[tuple[str, int | None]]:
    """Return the epochs at which NC1 is compared, [(name, epoch), ...]."""
    return [("start", group.list_epochs("nc1")[0]), (f"{FITTED:.0%} right", find_fit_epoch(group)), ("end", group.last)]


def format_epoch(epoch: int | None) -> str:
    """Return the epoch as text, or "never" if it is None."""
    return "never" if epoch is None else str(epoch)


def format_geometric(values: pd.Series) -> str:
    """Format the geometric mean and the geometric standard deviation.

    NaN values are ignored. If there are any, the number of the other values is appended.
    """
    mean, factor, count = compute_geometric_mean(values)
    if count == 0:
        return NOT_MEASURED
    text = format_digits(mean, 3, of=mean)
    if count > 1:
        text += f" ×/÷ {factor:.2f}"
    return text if count == len(values) else f"{text} ({count} of {len(values)})"


def tabulate_collapse(groups: Groups) -> pd.DataFrame:
    """Return NC1 of the first, the middle and the last layer: before training, when fitted and at the end."""
    rows = []
    for name, group in groups.items():
        nc1 = group.tables["nc1"]
        layers = [layer for layer in nc1["layer"].unique() if layer != INPUT]
        for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
            row = {"runs": name, "layer": layer}
            of_layer = nc1[nc1["layer"] == layer]
            for title, epoch in list_compared_epochs(group):
                for set_name in SETS:
                    at_epoch = of_layer[(of_layer["epoch"] == epoch) & (of_layer["set"] == set_name)]
                    row[f"{title}, {set_name}"] = format_geometric(at_epoch["nc1"]) + format_rank(at_epoch)
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_law(groups: Groups) -> pd.DataFrame:
    """Return factor per layer and correlation of the line of log NC1 by depth, over seeds."""
    rows = []
    for name, group in groups.items():
        lines = fit_lines(add_depth(group.tables["nc1"], group.layers))
        for set_name in SETS:
            of_set = lines[lines["set"] == set_name]
            row = {"runs": name, "set": set_name, f"≤ {LAW} from epoch": format_epoch(find_law_epoch(of_set, LAW))}
            for title, epoch in list_compared_epochs(group):
                at_epoch = of_set[of_set["epoch"] == epoch]
                row[f"factor, {title}"] = format_geometric(np.exp(at_epoch["slope"]))
                row[f"correlation, {title}"] = format_mean(at_epoch["correlation"])
            ratios = compute_layer_ratios(group.select_rows("nc1", set_name).query("epoch == @group.last"))
            row["ratio of NC1 between consecutive layers, end"] = f"{ratios.min():.2f} to {ratios.max():.2f}"
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_compression(groups: Groups) -> pd.DataFrame:
    """Return minimality at the start, at its maximum, at its minimum after that and at the end, and the changes.

    Maximum and minimum are those of the mean on the training set. The changes between them are therefore biased on the
    training set, but not on the test set.
    """
    rows = []
    for name, layer, information in iterate_layers(groups):
        train, test = (pivot_by_epoch(information[information["set"] == each], "minimality") for each in SETS)
        first, last = train.columns.min(), train.columns.max()
        highest, lowest = find_extreme_epochs(train)
        row = {"runs": name, "layer": layer, "start": format_bits(train[first])}
        for title, epoch in (("highest", highest), ("lowest after", lowest)):
            row[title] = f"{format_bits(train[epoch])} (epoch {epoch})"
        row["end"] = format_bits(train[last])
        by_steps = (
            groups[name].select_rows("convergence_information", "train").query("layer == @layer").sort_values("steps")
        )
        row["end, seed 0, × 8 steps"] = format_bits(by_steps["minimality"].tail(1)) if len(by_steps) else NOT_MEASURED
        row["start to end, train"] = format_change(train[last] - train[first])
        row["start to end, test"] = format_change(test[last] - test[first])
        row["highest to lowest, test"] = (
            format_change(test[lowest] - test[highest]) if highest < lowest else NOT_MEASURED
        )
        row["lowest to end, test"] = format_change(test[last] - test[lowest]) if lowest < last else NOT_MEASURED
        rows.append(row)
    return pd.DataFrame(rows)


def format_bits(values: pd.Series) -> str:
    """Format mean and standard deviation with three decimals, which is the accuracy of the probes."""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def format_change(changes: pd.Series) -> str:
    """Format the mean change and, for several seeds, the numbers of seeds that rise and fall."""
    counts = f" ({(changes > 0).sum()} up, {(changes < 0).sum()} down)" if len(changes) > 1 else ""
    return format_bits(changes) + counts


def iterate_layers(groups: Groups) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (sweep, layer, rows of the table information) for the last layer of every encoder."""
    for name, group in groups.items():
        information = group.tables["information"]
        for layer, of_layer in information[information["layer"] != INPUT].groupby("layer", sort=False):
            yield name, layer, of_layer


def tabulate_generalisation(groups: Groups) -> pd.DataFrame:
    """Return rank correlations of minimality with the loss gap (test - train) and the test accuracy.

    Over the epochs of each seed, minimality and its gap are correlated with the loss gap. Over seeds in the last epoch,
    minimality, its change since the start and its gap are correlated with the loss gap and the test accuracy.
    """
    rows = []
    for name, layer, information in iterate_layers(groups):
        group, last = groups[name], information["epoch"].max()
        losses = compute_gap(group.tables["epochs"], [], "loss")
        accuracies = group.select_rows("epochs", "test").set_index(["seed", "epoch"])["accuracy"]
        minimality = pivot_by_epoch(information[information["set"] == "train"], "minimality")
        gap = compute_gap(information, [], "minimality")
        row = {"runs": name, "layer": layer}
        for title, values in (("minimality", minimality.stack()), ("test − train", gap)):
            both = pd.DataFrame({"x": values, "y": losses}).dropna()
            over_epochs = both.groupby("seed").apply(lambda seed: compute_spearman(seed["x"], seed["y"]))
            row[f"{title}, loss gap: over epochs"] = format_mean(over_epochs)
        at_end = {"change": minimality[last] - minimality[minimality.columns.min()], "minimality": minimality[last]}
        at_end["test − train"] = gap.xs(last, level="epoch")
        has_enough_seeds = len(minimality) >= MIN_SEEDS
        for title, values in at_end.items():
            for other_title, other in (("loss gap", losses), ("accuracy", accuracies)):
                rho = compute_spearman(values, other.xs(last, level="epoch"))
                row[f"{title}, {other_title}: over seeds"] = f"{rho:.2f}" if has_enough_seeds else NOT_MEASURED
        rows.append(row)
    return pd.DataFrame(rows)


def tabulate_architectures(groups: Groups) -> pd.DataFrame:
    """Return NC1, minimality and the gaps after the last epoch, for the deepest split of each network.

    If DIB was not measured, the last layer is used.
    """
    rows = []
    for name, group in groups.items():
        nc1, information = group.tables["nc1"], group.tables["information"]
        layer = [*group.layers, *information["layer"]][-1]
        first, end = (pivot_by_set(nc1, layer, epoch, "nc1") for epoch in (nc1["epoch"].min(), group.last))
        minimality = pivot_by_set(information, layer, group.last, "minimality")
        row = {"runs": name, "layer": layer, "d": str(nc1.loc[nc1["layer"] == layer, "dim"].iloc[0])}
        row["NC1, train"] = format_geometric(end["train"])
        row["NC1, test over train"] = format_geometric(end["test"] / end["train"])
        row["NC1, test over train, at the start"] = format_geometric(first["test"] / first["train"])
        row["minimality, train"] = format_bits(minimality["train"]) if len(minimality) else NOT_MEASURED
        difference = format_bits(minimality["test"] - minimality["train"]) if len(minimality) else NOT_MEASURED
        row["minimality, test − train"] = difference
        for values, unit in (("loss", "nats"), ("accuracy", "%")):
            ends = compute_gap(group.tables["epochs"], [], values).xs(group.last, level="epoch")
            row[f"{values}, test − train ({unit})"] = format_mean(100 * ends if values == "accuracy" else ends)
        rows.append(row)
    return pd.DataFrame(rows)


def pivot_by_set(table: pd.DataFrame, layer: str, epoch: int, value: str) -> pd.DataFrame:
    """Return the values of a layer in an epoch, with a row for each seed and a column for each set."""
    return table.query("layer == @layer and epoch == @epoch").pivot(index="seed", columns="set", values=value)


def tabulate_probes(groups: Groups) -> pd.DataFrame:
    """Return information by probes that are trained in different ways on the same networks.

    It is that of the training set, in the epochs and seeds that all groups have. The column `between` is the epoch of
    lowest minimality in the first group. Information is computed from `upper` for Tuned() probes, and from `loss` for
    Thesis() probes.
    """
    seeds = min(len(group.folders) for group in groups.values())
    common = sorted(set.intersection(*(set(group.list_epochs("information")) for group in groups.values())))
    rows, lowest = [], {}
    for name, layer, information in iterate_layers(groups):
        end = "_by_loss" if groups[name].hparams[0].get("probes") == "thesis" else ""
        is_shown = (information["set"] == "train") & (information["seed"] < seeds) & information["epoch"].isin(common)
        row = {"runs": name, "layer": layer}
        for quantity in QUANTITIES:
            values = pivot_by_epoch(information[is_shown], quantity + end)
            lowest.setdefault(layer, values.mean().idxmin())
            row[f"{quantity}, epoch {common[0]}"] = format_bits(values[common[0]])
            if quantity == "minimality":
                row["between"] = f"{format_bits(values[lowest[layer]])} (epoch {lowest[layer]})"
            row[f"{quantity}, epoch {common[-1]}"] = format_bits(values[common[-1]])
        rows.append(row)
    return pd.DataFrame(rows)


def tabulate_convergence(groups: Groups) -> pd.DataFrame:
    """Return minimality (bits) on the training set after the last epoch, by the steps of the probes."""
    rows = []
    for name, group in groups.items():
        for layer, of_layer in group.select_rows("convergence_information", "train").groupby("layer", sort=False):
            of_layer = of_layer.sort_values("steps")
            fewest = of_layer["steps"].iloc[0]
            row = {"runs": name, "encoder up to": layer, "steps": str(fewest)}
            for steps, minimality in zip(of_layer["steps"], of_layer["minimality"], strict=True):
                row[f"× {steps // fewest}"] = f"{minimality:.3f}"
            rows.append(row)
    return pd.DataFrame(rows)
