"""Make the tables of docs/study.md from {sweep: its group of runs}. All cells are text."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.figures import MINIMALITY, add_depth, compute_gap, compute_gaps, fit_lines
from analysis.table import NOT_MEASURED, SETS, format_digits, format_mean, format_rank
from analysis.tables import INPUT, Group, average_over_seeds

Groups = dict[str, Group]
FITTED = 0.99  # the training accuracy from which a network counts as fitted
LAW = -0.9  # the correlation of log NC1 with depth from which the law of data separation counts as met
LEAST_SEEDS = 5  # for a correlation over seeds


def tabulate_fit(groups: Groups) -> pd.DataFrame:
    """Return how well each network fits at the end."""
    rows = []
    for name, group in groups.items():
        epochs = group.tables["epochs"].query("epoch == @group.last")
        ends = {each: epochs[epochs["set"] == each] for each in SETS}
        rows.append(
            {
                "runs": name,
                "seeds": str(len(group.folders)),
                "epochs": str(group.last),
                "training error (%)": format_mean(100 * (1 - ends["train"]["accuracy"])),
                "test error (%)": format_mean(100 * (1 - ends["test"]["accuracy"])),
                "loss, train (nats)": format_mean(ends["train"]["loss"]),
                "loss, test (nats)": format_mean(ends["test"]["loss"]),
                f"{FITTED:.0%} right in measured epoch": format_epoch(find_fit_epoch(group)),
            }
        )
    return pd.DataFrame(rows)


def find_fit_epoch(group: Group) -> int | None:
    """Return the first epoch in which NC1 is measured and the mean training accuracy is at least FITTED."""
    means = average_over_seeds(group.select_rows("epochs", "train"), ["epoch"], "accuracy").set_index("epoch")["mean"]
    return next((epoch for epoch in group.list_epochs("nc1") if means[epoch] >= FITTED), None)


def list_moments(group: Group) -> list[tuple[str, int | None]]:
    """Return the (name, epoch) of the epochs whose NC1 is compared."""
    return [("start", group.list_epochs("nc1")[0]), (f"{FITTED:.0%} right", find_fit_epoch(group)), ("end", group.last)]


def format_epoch(epoch: int | None) -> str:
    """Return the epoch as text."""
    return "never" if epoch is None else str(epoch)


def format_geometric(values: pd.Series) -> str:
    """Return the geometric mean and the factor of a standard deviation. NaN is left out, and the rest is counted."""
    logs = np.log(values).dropna()
    if logs.empty:
        return NOT_MEASURED
    spread = f" ×/÷ {np.exp(logs.std()):.2f}" if len(logs) > 1 else ""
    mean = np.exp(logs.mean())
    return (
        format_digits(mean, 3, of=mean)
        + spread
        + (f" ({len(logs)} of {len(values)})" if len(logs) < len(values) else "")
    )


def tabulate_collapse(groups: Groups) -> pd.DataFrame:
    """Return NC1 of the first, the middle and the last layer: before training, when fitted and at the end."""
    rows = []
    for name, group in groups.items():
        nc1 = group.tables["nc1"]
        layers = [layer for layer in nc1["layer"].unique() if layer != INPUT]
        for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
            row = {"runs": name, "layer": layer}
            of_layer = nc1[nc1["layer"] == layer]
            for title, epoch in list_moments(group):
                for each in SETS:
                    at_epoch = of_layer[(of_layer["epoch"] == epoch) & (of_layer["set"] == each)]
                    row[f"{title}, {each}"] = format_geometric(at_epoch["nc1"]) + format_rank(at_epoch)
            rows.append(row)
    return pd.DataFrame(rows)


def tabulate_law(groups: Groups) -> pd.DataFrame:
    """Return the line of log NC1 by depth: the factor from a layer to the next, and the correlation, over seeds."""
    rows = []
    for name, group in groups.items():
        lines = fit_lines(add_depth(group)).assign(factor=lambda line: np.exp(line["slope"]))
        for each in SETS:
            of_set = lines[lines["set"] == each]
            means = of_set.groupby("epoch")["correlation"].mean()
            broken = means.index[~(means <= LAW)]
            since = means.index[means.index > broken.max()] if len(broken) else means.index
            row = {"runs": name, "set": each, f"≤ {LAW} from epoch": format_epoch(since.min() if len(since) else None)}
            for title, epoch in list_moments(group):
                at_epoch = of_set[of_set["epoch"] == epoch]
                row[f"factor, {title}"] = format_geometric(at_epoch["factor"])
                row[f"correlation, {title}"] = format_mean(at_epoch["correlation"])
            ratios = compute_layer_ratios(group, each)
            rows.append(row | {"from layer to layer, end": f"{ratios.min():.2f} to {ratios.max():.2f}"})
    return pd.DataFrame(rows)


def compute_layer_ratios(group: Group, each: str) -> pd.Series:
    """Return NC1 of each layer over that of the layer before, at the end. On a line all ratios are equal."""
    nc1 = group.select_rows("nc1", each).query("epoch == @group.last and layer != @INPUT")
    means = average_over_seeds(nc1, ["layer"], "nc1", log=True)["mean"]
    return (means / means.shift()).dropna()


def tabulate_compression(groups: Groups) -> pd.DataFrame:
    """Return minimality where its mean on the training set is highest and where lowest after that, and the changes.

    These epochs are chosen by the training set, so the changes of the training set between them are biased. Those of
    the test set are not.
    """
    rows = []
    for name, layer, information in iterate_layers(groups):
        train, test = (
            information[information["set"] == each].pivot(index="seed", columns="epoch")["minimality"] for each in SETS
        )
        highest, first, last = train.mean().idxmax(), train.columns.min(), train.columns.max()
        lowest = train.loc[:, highest:].mean().idxmin()
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
    """Return the mean and the standard deviation. Probes are not exact to more than three decimals."""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def format_change(changes: pd.Series) -> str:
    """Return the mean change and, for several seeds, how many of them rose and fell."""
    counts = f" ({(changes > 0).sum()} up, {(changes < 0).sum()} down)" if len(changes) > 1 else ""
    return format_bits(changes) + counts


def iterate_layers(groups: Groups) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (sweep, layer, information) for the last layer of every encoder."""
    for name, group in groups.items():
        information = group.tables["information"]
        for layer, of_layer in information[information["layer"] != INPUT].groupby("layer", sort=False):
            yield name, layer, of_layer


def compute_spearman(x: pd.Series, y: pd.Series) -> float:
    """Return Pearson's correlation of the ranks, where both have a value. It is NaN if one of them is constant."""
    both = pd.DataFrame({"x": x, "y": y}).dropna().rank()
    return both["x"].corr(both["y"])


def tabulate_generalisation(groups: Groups) -> pd.DataFrame:
    """Return rank correlations of minimality with the gap between training and test set.

    Over the epochs of each seed: with test - train of the loss. Over seeds at the end: of minimality, of its change
    since the start and of its own test - train, with that gap and with the test accuracy.
    """
    rows = []
    for name, layer, information in iterate_layers(groups):
        group, last = groups[name], information["epoch"].max()
        losses = compute_gap(group.tables["epochs"], [], "loss")
        accuracies = group.select_rows("epochs", "test").set_index(["seed", "epoch"])["accuracy"]
        on_train = information[information["set"] == "train"]
        own = on_train.pivot(index="seed", columns="epoch", values="minimality")
        own_gap = compute_gaps(group)[MINIMALITY].loc[layer]
        row = {"runs": name, "layer": layer}
        for title, values in (("minimality", own.stack()), ("test − train", own_gap)):
            both = pd.DataFrame({"x": values, "y": losses}).dropna()
            over_epochs = both.groupby("seed").apply(lambda seed: compute_spearman(seed["x"], seed["y"]))
            row[f"{title}, loss gap: over epochs"] = format_mean(over_epochs)
        at_end = {"change": own[last] - own[own.columns.min()], "minimality": own[last]}
        at_end["test − train"] = own_gap.xs(last, level="epoch")
        enough = len(own) >= LEAST_SEEDS
        for title, values in at_end.items():
            for other_title, other in (("loss gap", losses), ("accuracy", accuracies)):
                rho = compute_spearman(values, other.xs(last, level="epoch"))
                row[f"{title}, {other_title}: over seeds"] = f"{rho:.2f}" if enough else NOT_MEASURED
        rows.append(row)
    return pd.DataFrame(rows)


def tabulate_architectures(groups: Groups) -> pd.DataFrame:
    """Return NC1 and minimality at the end, beside the gaps, for the deepest split of each network.

    Without DIB it is the last layer.
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
        row["the same, start"] = format_geometric(first["test"] / first["train"])
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
    """Return what probes that are trained in different ways find in the same networks.

    They are compared on their training sets, in the epochs and seeds that all groups have. The epoch between start and
    end is that of the least minimality in the first group. Tuned probes are shown by `upper`, probes of the thesis by
    their own loss.
    """
    few = min(len(group.folders) for group in groups.values())
    common = sorted(set.intersection(*(set(group.list_epochs("information")) for group in groups.values())))
    rows, lowest = [], {}
    for name, layer, information in iterate_layers(groups):
        end = "_by_loss" if groups[name].hparams[0].get("probes") == "thesis" else ""
        is_shown = (information["set"] == "train") & (information["seed"] < few) & information["epoch"].isin(common)
        row = {"runs": name, "layer": layer}
        for measure in ("minimality", "sufficiency"):
            values = information[is_shown].pivot(index="seed", columns="epoch", values=measure + end)
            lowest.setdefault(layer, values.mean().idxmin())
            row[f"{measure}, epoch {common[0]}"] = format_bits(values[common[0]])
            if measure == "minimality":
                row["between"] = f"{format_bits(values[lowest[layer]])} (epoch {lowest[layer]})"
            row[f"{measure}, epoch {common[-1]}"] = format_bits(values[common[-1]])
        rows.append(row)
    return pd.DataFrame(rows)


def tabulate_convergence(groups: Groups) -> pd.DataFrame:
    """Return minimality (bits) on the training set at the end, with more and more steps, of seed 0."""
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
