"""Compute statistics from the tables of runs: averages over seeds, fitted lines, differences, decodable information.

The functions return new tables or numbers. They do not change their arguments.
"""

import math

import numpy as np
import pandas as pd

from analysis.reading import INPUT, SETS
from layerwise import schema

QUANTITIES = {"minimality": "ceiling", "sufficiency": "label_entropy"}  # and the columns of their ceilings
CEILING_BITS = 0.01  # a value is at its ceiling if it is at most this far below
SUBOPTIMAL_BITS = schema.SUBOPTIMAL / math.log(2)


def average_over_seeds(table: pd.DataFrame, keys: list[str], value: str, log: bool = False) -> pd.DataFrame:
    """Return mean and standard deviation over seeds of the finite values of a column, for each combination of keys.

    The result has the columns `keys`, mean, low and high (one standard deviation below and above the mean), and count
    (the number of finite values). The standard deviation has ddof=1, and is 0 for one seed.

    log: whether to compute mean and standard deviation of the logarithm, and to return their exponentials.
    """
    values = table[value].astype(float).replace([np.inf, -np.inf], np.nan)
    if log:
        values = np.log(values.where(values > 0))
    over = table.assign(value=values).groupby(keys, sort=False)["value"].agg(["mean", "std", "count"]).reset_index()
    std = over.pop("std").fillna(0)
    over["low"], over["high"] = over["mean"] - std, over["mean"] + std
    if log:
        over[["mean", "low", "high"]] = np.exp(over[["mean", "low", "high"]])
    return over


def choose_log_spaced(epochs: list[int], count: int) -> list[int]:
    """Return at most `count` of these sorted epochs, evenly spaced on a scale of log(1 + epoch).

    The first and the last are included. Fewer epochs are returned if two positions have the same nearest epoch.
    """
    if not epochs:
        return []
    places = np.log1p(epochs)
    wanted = np.linspace(places[0], places[-1], count)
    return [epochs[i] for i in sorted({int(np.abs(places - place).argmin()) for place in wanted})]


def compute_geometric_mean(values: pd.Series) -> tuple[float, float, int]:
    """Return geometric mean, geometric standard deviation (ddof=1) and number of the values that are not NaN."""
    logs = np.log(values).dropna()
    return np.exp(logs.mean()), np.exp(logs.std()), len(logs)


def compute_spearman(x: pd.Series, y: pd.Series) -> float:
    """Return Spearman's rank correlation of the pairs without NaN. It is NaN if x or y is constant."""
    pairs = pd.DataFrame({"x": x, "y": y}).dropna().rank()
    return pairs["x"].corr(pairs["y"])


def pivot_by_epoch(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Return the values of a column of one set and layer, with a row for each seed and a column for each epoch."""
    return table.pivot(index="seed", columns="epoch", values=value)


def find_extreme_epochs(values: pd.DataFrame) -> tuple[int, int]:
    """Return the epoch of the highest mean over seeds, and the epoch of the lowest mean from there on.

    values: a row for each seed and a column for each epoch.
    """
    means = values.mean()
    highest = means.idxmax()
    return highest, means.loc[highest:].idxmin()


def add_depth(nc1: pd.DataFrame, layers: list[str]) -> pd.DataFrame:
    """Return the table with a column `depth`: the position of the layer in `layers`, from 1, and 0 for the input."""
    depths = {layer: depth for depth, layer in enumerate([INPUT, *layers])}
    return nc1.assign(depth=nc1["layer"].map(depths))


def is_in_line(nc1: pd.DataFrame) -> pd.Series:
    """Return a mask of the rows to which lines are fitted: layers of full rank with positive, finite NC1."""
    return nc1["nc1"].between(0, np.inf, inclusive="neither") & ~nc1["rank_deficient"] & (nc1["layer"] != INPUT)


def fit_lines(nc1: pd.DataFrame) -> pd.DataFrame:
    """Return slope, intercept and correlation of the line of log NC1 by depth for each seed, set and epoch.

    A line is fitted to at least three layers.
    """
    rows = []
    for keys, points in nc1[is_in_line(nc1)].groupby(["seed", "set", "epoch"]):
        if len(points) > 2:
            rows.append((*keys, *fit_line(points["depth"], np.log(points["nc1"]))))
    lines = pd.DataFrame(rows, columns=["seed", "set", "epoch", "slope", "intercept", "correlation"])
    return lines.sort_values("epoch", kind="stable")  # the first epochs may be missing for a seed


def fit_line(x: pd.Series, y: pd.Series) -> tuple[float, float, float]:
    """Return slope, intercept and correlation of the least-squares line. The correlation is NaN if y is constant."""
    slope, intercept = np.polyfit(x, y, 1)
    return slope, intercept, slope * x.std() / (y.std() or np.nan)


def find_law_epoch(lines: pd.DataFrame, limit: float) -> int | None:
    """Return the first epoch from which on the mean correlation of all epochs is at most the limit, or None."""
    means = lines.groupby("epoch")["correlation"].mean()
    above = means.index[~(means <= limit)]
    epochs = means.index[means.index > above.max()] if len(above) else means.index
    return epochs.min() if len(epochs) else None


def compute_layer_ratios(nc1: pd.DataFrame) -> pd.Series:
    """Return the ratio of the mean NC1 of each layer to that of the previous layer, for one set and epoch."""
    means = average_over_seeds(nc1[nc1["layer"] != INPUT], ["layer"], "nc1", log=True)["mean"]
    return (means / means.shift()).dropna()


def update_input_upper(dib: pd.DataFrame) -> pd.DataFrame:
    """Replace `upper` of the input by the minimum of `upper` of the same labeling over all epochs and splits.

    It is an upper bound for the input too: an encoder followed by its probe is a decoder of the input, and the input
    does not change over the epochs. Held-out rows are not changed: they are losses, not bounds.
    """
    least = dib.groupby(["seed", "set", "enumeration", "labeling"])["upper"].transform("min")
    is_kept = (dib["layer"] != INPUT) | (dib["labeling"] == schema.HELD_OUT)
    return dib.assign(upper=dib["upper"].where(is_kept, least))


def is_digit(dib: pd.DataFrame) -> pd.Series:
    """Return a mask of the rows of digits."""
    return ~dib["labeling"].isin([schema.LABELS, schema.SHUFFLED, schema.HELD_OUT])


def compute_information(dib: pd.DataFrame, *across: str) -> pd.DataFrame:
    """Return minimality and sufficiency in bits for every seed, set, layer and value of `across`, in order of depth.

    across: "epoch", "steps" or nothing.

    The columns are the means of entropy - upper over these labelings:
        minimality: the digits of all enumerations.
        sufficiency: the original labels.
        shuffled: the labels in a random order.
        held_out: the labels of the test set, by the probe of the training set. It may be negative.

    minimality_by_loss and sufficiency_by_loss are computed with `loss` instead of `upper`. `ceiling` is the mean
    entropy of the digits, and `label_entropy` that of the original labels: no minimality and no sufficiency is higher.
    `deviation` is the standard deviation (ddof=1) of minimality over the enumerations, and NaN if there is only one.
    """
    keys = ["seed", *across, "set", "layer"]
    labeling = dib["labeling"]
    rows = {"sufficiency": schema.LABELS, "shuffled": schema.SHUFFLED, "held_out": schema.HELD_OUT}
    chosen = {"minimality": is_digit(dib), **{name: labeling == word for name, word in rows.items()}}
    bits = {column: (dib["entropy"] - dib[column]) / math.log(2) for column in ("upper", "loss")}
    values = dib[[*keys, "enumeration"]].copy()
    for name, of_labeling in chosen.items():
        values[name] = bits["upper"].where(of_labeling)
    for name, ceiling in QUANTITIES.items():
        values[f"{name}_by_loss"] = bits["loss"].where(chosen[name])
        values[ceiling] = (dib["entropy"] / math.log(2)).where(chosen[name])
    of_enumerations = values.groupby([*keys, "enumeration"], sort=False)["minimality"].mean()
    means = values.drop(columns="enumeration").groupby(keys, sort=False).mean()
    return means.assign(deviation=of_enumerations.groupby(keys, sort=False).std()).reset_index()


def find_ceilings(information: pd.DataFrame) -> list[tuple[str, str, float]]:
    """Return (quantity, set, ceiling) of the quantities that are at their ceiling in all layers, epochs and seeds."""
    found = []
    for quantity, ceiling in QUANTITIES.items():
        for set_name, rows in information.groupby("set", sort=False):
            below = (rows[ceiling] - rows[quantity]).dropna()
            if len(below) and below.max() <= CEILING_BITS:
                found.append((quantity, set_name, rows[ceiling].mean()))
    return found


def compute_suboptimal_share(dib: pd.DataFrame) -> pd.Series:
    """Return the share of known suboptimal probes by set. A probe whose loss is NaN counts as one.

    Held-out rows do not count, because their probes are not trained on these samples.
    """
    dib = dib[dib["labeling"] != schema.HELD_OUT]
    is_optimal = dib["loss"] - dib["upper"] <= schema.SUBOPTIMAL
    return 1 - is_optimal.groupby(dib["set"]).mean()


def compute_linear_gaps(dib: pd.DataFrame, hparams: list[dict]) -> pd.Series:
    """Return loss - lower (nats) of each linear probe: an upper bound on the distance of its loss from the optimum.

    hparams: the flags of each run, of which `linear_splits` names the splits whose probes are linear.
    """
    linear = {(flags["seed"], split) for flags in hparams for split in flags.get("linear_splits") or []}
    is_linear = np.array([pair in linear for pair in zip(dib["seed"], dib["layer"], strict=True)], dtype=bool)
    rows = dib[is_linear & (dib["labeling"] != schema.HELD_OUT)]
    return rows["loss"] - rows["lower"]


def compute_gap(table: pd.DataFrame, keys: list[str], value: str) -> pd.Series:
    """Return the difference test - train of a column for each combination of keys, seed and epoch.

    Differences that are not finite are left out. If a set is missing, the result is empty.
    """
    wide = table.pivot(index=[*keys, "seed", "epoch"], columns="set", values=value)
    if not set(SETS) <= set(wide):
        return pd.Series(dtype=float)
    return (wide["test"] - wide["train"]).replace([np.inf, -np.inf], np.nan).dropna()


def compute_gaps(nc1: pd.DataFrame, information: pd.DataFrame) -> dict[str, pd.Series]:
    """Return the differences test - train of "NC1" and "minimality" of the layers, without those that are empty."""
    gaps = {
        "NC1": compute_gap(nc1[nc1["layer"] != INPUT], ["layer"], "nc1"),
        "minimality": compute_gap(information[information["layer"] != INPUT], ["layer"], "minimality"),
    }
    return {name: values for name, values in gaps.items() if len(values)}


def explain_unequal_sets(hparams: list[dict]) -> str:
    """Return why minimality cannot be compared between the sets of these runs, or an empty string if it can."""
    for flags in hparams:
        samples = flags.get("dib_samples") or {}
        if not set(SETS) <= set(samples):
            return "the number of samples is not recorded"
        if samples["train"] != samples["test"]:
            return f"{samples['train']:,} training and {samples['test']:,} test samples"
    return ""
