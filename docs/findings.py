"""The tables of study.md: each takes the groups of runs by the name of their sweep, and says in words what is in it."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.figures import MINIMALITY, by_depth, fits, gap, gaps
from analysis.table import NOT_MEASURED, SETS, cell, digits, rank
from analysis.tables import INPUT, Group, over_seeds

Groups = dict[str, Group]
FITTED = 0.99  # of the training set right: from there on a network counts as fitted
LAW = -0.9  # correlation of log NC1 with depth
LEAST_SEEDS = 5  # of a correlation over seeds


def fitted(groups: Groups) -> pd.DataFrame:
    """How well each network fits, at the end."""
    rows = []
    for name, group in groups.items():
        ends = group.tables["epochs"].query("epoch == @group.last")
        its = {each: ends[ends["set"] == each] for each in SETS}
        rows.append(
            {
                "runs": name,
                "seeds": str(len(group.folders)),
                "epochs": str(group.last),
                "training error (%)": cell(100 * (1 - its["train"]["accuracy"])),
                "test error (%)": cell(100 * (1 - its["test"]["accuracy"])),
                "loss, train (nats)": cell(its["train"]["loss"]),
                "loss, test (nats)": cell(its["test"]["loss"]),
                f"{FITTED:.0%} right in measured epoch": epoch_text(fit_epoch(group)),
            }
        )
    return pd.DataFrame(rows)


def fit_epoch(group: Group) -> int | None:
    """The first epoch in which NC1 is measured and the mean accuracy on the training set is FITTED."""
    means = over_seeds(group.of("epochs", "train"), ["epoch"], "accuracy").set_index("epoch")["mean"]
    return next((epoch for epoch in group.epochs("nc1") if means[epoch] >= FITTED), None)


def moments(group: Group) -> list[tuple[str, int | None]]:
    """The epochs of NC1 that are compared, with their names."""
    return [("start", group.epochs("nc1")[0]), (f"{FITTED:.0%} right", fit_epoch(group)), ("end", group.last)]


def epoch_text(epoch: int | None) -> str:
    return "never" if epoch is None else str(epoch)


def geometric(values: pd.Series) -> str:
    """The geometric mean, and the factor of a standard deviation; how many there are, where NaN is left out."""
    logs = np.log(values).dropna()
    if logs.empty:
        return NOT_MEASURED
    spread = f" ×/÷ {np.exp(logs.std()):.2f}" if len(logs) > 1 else ""
    mean = np.exp(logs.mean())
    return digits(mean, 3, of=mean) + spread + (f" ({len(logs)} of {len(values)})" if len(logs) < len(values) else "")


def collapse(groups: Groups) -> pd.DataFrame:
    """NC1 of the first, the middle and the last layer before training, when fitted and at the end."""
    rows = []
    for name, group in groups.items():
        nc1, names = group.tables["nc1"], group.tables["nc1"]["layer"].unique()
        layers = [layer for layer in names if layer != INPUT]
        for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
            row = {"runs": name, "layer": layer}
            its = nc1[nc1["layer"] == layer]
            for title, epoch in moments(group):
                for each in SETS:
                    there = its[(its["epoch"] == epoch) & (its["set"] == each)]
                    row[f"{title}, {each}"] = geometric(there["nc1"]) + rank(there)
            rows.append(row)
    return pd.DataFrame(rows)


def law(groups: Groups) -> pd.DataFrame:
    """The line of log NC1 by depth: the factor from a layer to the next, and the correlation, of seeds with a line."""
    rows = []
    for name, group in groups.items():
        lines = fits(by_depth(group)).assign(factor=lambda its: np.exp(its["slope"]))
        for each in SETS:
            its = lines[lines["set"] == each]
            means = its.groupby("epoch")["correlation"].mean()
            broken = means.index[~(means <= LAW)]
            since = means.index[means.index > broken.max()] if len(broken) else means.index
            row = {"runs": name, "set": each, f"≤ {LAW} from epoch": epoch_text(since.min() if len(since) else None)}
            for title, epoch in moments(group):
                there = its[its["epoch"] == epoch]
                row[f"factor, {title}"] = geometric(there["factor"])
                row[f"correlation, {title}"] = cell(there["correlation"])
            ratios = neighbours(group, each)
            rows.append(row | {"from layer to layer, end": f"{ratios.min():.2f} to {ratios.max():.2f}"})
    return pd.DataFrame(rows)


def neighbours(group: Group, each: str) -> pd.Series:
    """NC1 at the end of each layer over that of the layer before, where a line would have the same everywhere."""
    nc1 = group.of("nc1", each).query("epoch == @group.last and layer != @INPUT")
    means = over_seeds(nc1, ["layer"], "nc1", log=True)["mean"]
    return (means / means.shift()).dropna()


def compression(groups: Groups) -> pd.DataFrame:
    """Minimality: where its mean on the training set is highest, where lowest after that, and the changes between.

    These epochs are chosen by the training set, whose own changes are therefore biased; those of the test set are not.
    """
    rows = []
    for name, layer, its in by_layer(groups):
        train, test = (its[its["set"] == each].pivot(index="seed", columns="epoch")["minimality"] for each in SETS)
        highest, first, last = train.mean().idxmax(), train.columns.min(), train.columns.max()
        lowest = train.loc[:, highest:].mean().idxmin()
        row = {"runs": name, "layer": layer, "start": bits(train[first])}
        for title, epoch in (("highest", highest), ("lowest after", lowest)):
            row[title] = f"{bits(train[epoch])} (epoch {epoch})"
        row["end"] = bits(train[last])
        settling = groups[name].of("settling", "train").query("layer == @layer").sort_values("steps")
        row["end, seed 0, × 8 steps"] = bits(settling["minimality"].tail(1)) if len(settling) else NOT_MEASURED
        row["start to end, train"] = changed(train[last] - train[first])
        row["start to end, test"] = changed(test[last] - test[first])
        row["highest to lowest, test"] = changed(test[lowest] - test[highest]) if highest < lowest else NOT_MEASURED
        row["lowest to end, test"] = changed(test[last] - test[lowest]) if lowest < last else NOT_MEASURED
        rows.append(row)
    return pd.DataFrame(rows)


def bits(values: pd.Series) -> str:
    """The mean and the standard deviation; decoders are not found to more than three decimals."""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def changed(by: pd.Series) -> str:
    """The mean change and, of several seeds, how many rose and fell."""
    return bits(by) + (f" ({(by > 0).sum()} up, {(by < 0).sum()} down)" if len(by) > 1 else "")


def by_layer(groups: Groups) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(name, layer, information) of every encoder's last layer."""
    for name, group in groups.items():
        information = group.tables["information"]
        for layer, its in information[information["layer"] != INPUT].groupby("layer", sort=False):
            yield name, layer, its


def spearman(x: pd.Series, y: pd.Series) -> float:
    """Pearson's correlation of the ranks, where both have a value; NaN where one of them is constant."""
    both = pd.DataFrame({"x": x, "y": y}).dropna().rank()
    return both["x"].corr(both["y"])


def generalisation(groups: Groups) -> pd.DataFrame:
    """Rank correlations of minimality with how far the test set is behind.

    Over the epochs of each seed, with test - train of the loss; over seeds at the end, with that and with the test
    accuracy: of minimality, of its change since the start, and of its own test - train.
    """
    rows = []
    for name, layer, its in by_layer(groups):
        group, last = groups[name], its["epoch"].max()
        losses = gap(group.tables["epochs"], [], "loss")
        accuracies = group.of("epochs", "test").set_index(["seed", "epoch"])["accuracy"]
        own = its[its["set"] == "train"].pivot(index="seed", columns="epoch", values="minimality")
        beside = gaps(group)[MINIMALITY].loc[layer]
        row = {"runs": name, "layer": layer}
        for title, values in (("minimality", own.stack()), ("test − train", beside)):
            both = pd.DataFrame({"x": values, "y": losses}).dropna()
            over_epochs = both.groupby("seed").apply(lambda of: spearman(of["x"], of["y"]))
            row[f"{title}, loss gap: over epochs"] = cell(over_epochs)
        at_end = {"change": own[last] - own[own.columns.min()], "minimality": own[last]}
        at_end["test − train"] = beside.xs(last, level="epoch")
        enough = len(own) >= LEAST_SEEDS
        for title, values in at_end.items():
            for of, other in (("loss gap", losses), ("accuracy", accuracies)):
                rho = spearman(values, other.xs(last, level="epoch"))
                row[f"{title}, {of}: over seeds"] = f"{rho:.2f}" if enough else NOT_MEASURED
        rows.append(row)
    return pd.DataFrame(rows)


def architectures(groups: Groups) -> pd.DataFrame:
    """The deepest layer at which DIB splits each network (without DIB, the last layer) at the end, beside its gaps."""
    rows = []
    for name, group in groups.items():
        nc1, information = group.tables["nc1"], group.tables["information"]
        layer = [*group.layers, *information["layer"]][-1]
        first, its = (by_set(nc1, layer, epoch, "nc1") for epoch in (nc1["epoch"].min(), group.last))
        told = by_set(information, layer, group.last, "minimality")
        row = {"runs": name, "layer": layer, "d": str(nc1.loc[nc1["layer"] == layer, "dim"].iloc[0])}
        row |= {"NC1, train": geometric(its["train"]), "NC1, test over train": geometric(its["test"] / its["train"])}
        row["the same, start"] = geometric(first["test"] / first["train"])
        row["minimality, train"] = bits(told["train"]) if len(told) else NOT_MEASURED
        row["minimality, test − train"] = bits(told["test"] - told["train"]) if len(told) else NOT_MEASURED
        for values, unit in (("loss", "nats"), ("accuracy", "%")):
            ends = gap(group.tables["epochs"], [], values).xs(group.last, level="epoch")
            row[f"{values}, test − train ({unit})"] = cell(100 * ends if values == "accuracy" else ends)
        rows.append(row)
    return pd.DataFrame(rows)


def by_set(table: pd.DataFrame, layer: str, epoch: int, value: str) -> pd.DataFrame:
    """The values of a layer in an epoch: seeds down, sets across."""
    return table.query("layer == @layer and epoch == @epoch").pivot(index="seed", columns="set", values=value)


def heads(groups: Groups) -> pd.DataFrame:
    """What heads trained in different ways say of the same networks: their training sets, epochs and seeds in common.

    The epoch between start and end is that in which the first group's minimality is least. Of tuned heads what is
    known, of the thesis's what they reached themselves.
    """
    few = min(len(group.folders) for group in groups.values())
    common = sorted(set.intersection(*(set(group.epochs("information")) for group in groups.values())))
    rows, lowest = [], {}
    for name, layer, its in by_layer(groups):
        end = "_by_loss" if groups[name].hparams[0].get("heads") == "thesis" else ""
        its = its[(its["set"] == "train") & (its["seed"] < few) & its["epoch"].isin(common)]
        row = {"runs": name, "layer": layer}
        for measure in ("minimality", "sufficiency"):
            values = its.pivot(index="seed", columns="epoch", values=measure + end)
            lowest.setdefault(layer, values.mean().idxmin())
            row |= {f"{measure}, epoch {common[0]}": bits(values[common[0]])}
            if measure == "minimality":
                row["between"] = f"{bits(values[lowest[layer]])} (epoch {lowest[layer]})"
            row[f"{measure}, epoch {common[-1]}"] = bits(values[common[-1]])
        rows.append(row)
    return pd.DataFrame(rows)


def settled(groups: Groups) -> pd.DataFrame:
    """Minimality (bits) of the training set with more steps, at the end, of seed 0."""
    rows = []
    for name, group in groups.items():
        for layer, its in group.of("settling", "train").groupby("layer", sort=False):
            its = its.sort_values("steps")
            row = {"runs": name, "encoder up to": layer, "steps": str(its["steps"].iloc[0])}
            for steps, known in zip(its["steps"], its["minimality"], strict=True):
                row[f"× {steps // its['steps'].iloc[0]}"] = f"{known:.3f}"
            rows.append(row)
    return pd.DataFrame(rows)
