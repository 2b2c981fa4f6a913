import re
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text

from analysis import gallery, style
from analysis.statistics import fit_line
from analysis.tables import read_groups
from tests.toys import write_run

LAYERS = ["hidden1", "hidden2", "hidden3"]
DEEP = [f"block{i}" for i in range(1, 19)] + ["pool"]


@pytest.fixture(autouse=True)
def close():
    """Draw in the style of the project, and close all figures after each test."""
    with plt.rc_context(style.STYLE):
        yield
    plt.close("all")


def list_axes(figure, count=2):
    """Return the first panels of a figure."""
    return [axis for axis in figure.findobj(plt.Axes) if axis.get_label() != "<colorbar>"][:count]


def find_legend(figure):
    """Return the first legend of a figure."""
    return figure.findobj(plt.matplotlib.legend.Legend)[0]


def read_legend(figure):
    """Return the names in the first legend of a figure."""
    return [text.get_text() for text in find_legend(figure).get_texts()]


def find_line(axis, label):
    """Return the line of this label."""
    return next(line for line in axis.lines if line.get_label() == label)


def compute_luminance(colour) -> float:
    """Return how light a colour is, from 0 to 1."""
    return float(np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize(
    ("name", "across", "up", "scale"),
    [
        ("training", ["epoch"] * 2, ["cross-entropy (nats)", "accuracy"], "linear"),
        ("nc1", ["epoch"] * 2, [r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit", ""], "log"),
        ("depth", [""] * 2, [r"NC1: tr($\Sigma_W\,\Sigma_B^{+}$), no unit", ""], "log"),
        ("information", ["", "", "epoch", "epoch"], ["minimality (bits)", "", "sufficiency (bits)", ""], "linear"),
        ("plane", ["minimality (bits)"] * 2, ["sufficiency (bits)", ""], "linear"),
        ("plane_by_epoch", ["minimality (bits)"] * 2, ["sufficiency (bits)", ""], "linear"),
        (
            "gap",
            ["NC1, test − train", "minimality (bits), test − train"],
            ["cross-entropy (nats), test − train", ""],
            "linear",
        ),
        ("convergence", ["", "", "steps", "steps"], ["minimality (bits)", "", "sufficiency (bits)", ""], "linear"),
    ],
)
def test_axes_have_names_and_units(tmp_path, name, across, up, scale):
    figure = gallery.draw_figure(name, read_groups([write_run(tmp_path / "run", LAYERS, factors=(1, 2))]))
    found = list_axes(figure, len(across))
    assert [axis.get_xlabel() for axis in found] == across
    assert [axis.get_ylabel() for axis in found] == up
    assert {axis.get_yscale() for axis in found} == {scale}


def test_curves_are_the_mean_in_a_band_over_seeds(tmp_path):
    """Loss is (1 + seed) / epoch on the training set. Seeds 0 and 2 give 2 / epoch ± sqrt(2) / epoch."""
    figure = gallery.draw_figure(
        "training", read_groups([write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)])
    )
    loss = list_axes(figure)[0]
    assert find_line(loss, "train").get_ydata().tolist() == pytest.approx([2, 1, 2 / 3])
    assert (find_line(loss, "train").get_linestyle(), find_line(loss, "test").get_linestyle()) == ("-", "--")
    band = loss.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx(((2 - 2**0.5) / 3, 2 + 2**0.5))
    assert find_legend(figure).get_title().get_text() == "mean ± sd of 2 seeds"


def test_nc1_is_the_geometric_mean_over_seeds(tmp_path):
    """NC1 is 50 (1 + seed) / epoch in the first layer: 50, 100 and 400."""
    found = read_groups([write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 1, 7)])
    mean = 50 * 16 ** (1 / 3)
    assert find_line(list_axes(gallery.draw_figure("nc1", found))[0], "hidden1").get_ydata()[0] == pytest.approx(mean)
    assert list_axes(gallery.draw_figure("depth", found))[0].containers[1].lines[0].get_ydata()[0] == pytest.approx(
        mean
    )


@pytest.mark.parametrize("name", ["nc1", "depth"])
def test_nc1_within_two_decades_has_plain_numbers(tmp_path, name):
    """NC1 of the run is 4 to 150. With a run of a hundredth of that on the same data, the axis spans more decades."""
    runs = [write_run(tmp_path / "a", LAYERS), write_run(tmp_path / "b", LAYERS, learning_rate=0.1)]
    table = pd.read_csv(runs[1] / "nc1.csv")
    table.assign(nc1=table["nc1"] / 100).to_csv(runs[1] / "nc1.csv", index=False)
    for folders, plain in ((runs[:1], True), (runs, False)):
        figure = gallery.draw_figure(name, read_groups(folders))
        FigureCanvasAgg(figure).draw()
        for axis in list_axes(figure, 2 * len(folders))[::2]:
            shown = {tick.label1.get_text() for tick in axis.yaxis.get_major_ticks()}
            assert ({"5", "10", "20"} <= shown) == plain


def test_the_input_is_a_dashed_line(tmp_path):
    """It is measured in epoch 1. Minimality of the layers in epoch 3, 0.3 nats, holds for the input too."""
    figure = gallery.draw_figure("information", read_groups([write_run(tmp_path / "run", LAYERS)]))
    shown = [find_line(axis, "input") for axis in list_axes(figure, 4)]
    assert [one.get_ydata()[0] for one in shown] == pytest.approx(np.array([0.3, 0.3, 0.5, 0.5]) / np.log(2))
    assert {one.get_linestyle() for one in shown} == {"--"}


def find_hollow_markers(axis) -> dict[str, list]:
    """Return the points of the hollow markers, in nats, by the label of the line with the same marker."""
    solid = {one.get_marker(): one.get_label() for one in axis.lines if one.get_linestyle() == "-"} | {"X": "input"}
    return {
        solid[one.get_marker()]: [(x, y * np.log(2)) for x, y in one.get_xydata()]
        for one in axis.lines
        if str(one.get_markerfacecolor()) == "white" and len(one.get_xdata())
    }


def find_thin_lines(axis, linestyle: str) -> dict[tuple, list]:
    """Return y in nats of the lines of this style without markers, by their colours."""
    found = [one for one in axis.lines if one.get_linestyle() == linestyle and one.get_marker() == "None"]
    return {to_rgb(one.get_color()): [y * np.log(2) for y in one.get_ydata()] for one in found}


def find_ceilings(axis) -> list:
    """Return the lines in the colour of the ceiling."""
    return [one for one in axis.lines if to_rgb(one.get_color()) == to_rgb(style.CEILING["color"])]


def read_key(figure):
    """Return the names in the legend below the panels of a figure, which is there if there are controls."""
    return [text.get_text() for each in figure.subfigs[0].legends[1:] for text in each.get_texts()]


CEILING = f"ceiling of minimality: {0.69 / np.log(2):.2f} (train), {0.69 / np.log(2):.2f} (test)"


def test_controls_are_thin_lines_in_the_panels_of_sufficiency(tmp_path):
    """Information of the shuffled labels is 0.02 nats, that of held-out samples 0.15 and of the test set only."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]
    figure = gallery.draw_figure("information", read_groups(runs))
    *above, train, test = list_axes(figure, 4)
    colours = [to_rgb(find_line(train, layer).get_color()) for layer in ("input", *LAYERS)]
    for axis, linestyle, nats in ((train, ":", 0.02), (test, ":", 0.02), (test, "-.", 0.15)):
        found = find_thin_lines(axis, linestyle)
        assert list(found) == colours
        assert list(found.values()) == [pytest.approx([nats] * count) for count in (2, 3, 3, 3)]
        assert axis.get_ylim()[0] * np.log(2) < nats
    assert [find_thin_lines(axis, "-.") for axis in (*above, train)] == [{}, {}, {}]
    assert [find_thin_lines(axis, ":") for axis in above] == [{}, {}]
    assert len(train.collections) == 3  # a band for each layer; that of the input is a patch
    assert read_key(figure) == [CEILING, "shuffled labels", "held-out samples"]


def test_nothing_is_added_to_figures_of_runs_without_controls(tmp_path):
    found = read_groups([write_run(tmp_path / "run", LAYERS, controls=False, factors=(1, 2))])
    for name in ("information", "convergence", "plane", "plane_by_epoch"):
        figure = gallery.draw_figure(name, found)
        assert read_key(figure) == []
        for axis in list_axes(figure, 4):
            assert [
                one for one in axis.lines if one.get_linestyle() in (":", "-.") or one.get_marker() in ("_", "1")
            ] == []
            assert find_ceilings(axis) == []


def test_held_out_values_below_0_do_not_stretch_the_axis(tmp_path):
    run = write_run(tmp_path / "run", LAYERS)
    dib = pd.read_csv(run / "dib.csv")
    dib.loc[dib["labeling"] == "held-out", "upper"] = 5
    dib.to_csv(run / "dib.csv", index=False)
    for name, position in (("information", 3), ("plane", 1), ("plane_by_epoch", 1)):
        low, high = list_axes(gallery.draw_figure(name, read_groups([run])), 4)[position].get_ylim()
        assert -0.1 * high < low < 0


@pytest.mark.parametrize(("epochs", "is_shown"), [(3, False), (6, True)])
def test_the_ceiling_is_shown_if_it_is_near(tmp_path, epochs, is_shown):
    """It is 0.69 nats. Minimality is 0.1 to 0.3 nats, or to 0.6."""
    found = read_groups([write_run(tmp_path / "run", LAYERS, epochs=epochs)])
    panels = {
        ("information", "y"): list_axes(gallery.draw_figure("information", found)),
        ("plane", "x"): list_axes(gallery.draw_figure("plane", found)),
        ("plane_by_epoch", "x"): list_axes(gallery.draw_figure("plane_by_epoch", found)),
    }
    for (name, direction), axes in panels.items():
        for axis in axes:
            (line,) = find_ceilings(axis)
            assert getattr(line, f"get_{direction}data")() == pytest.approx([0.69 / np.log(2)] * 2), name
            low, high = getattr(axis, f"get_{direction}lim")()
            assert (high > 0.69 / np.log(2)) == is_shown, name
            assert low < 0.1 / np.log(2) < high


def test_the_spread_over_enumerations_is_a_bar_at_each_marker(tmp_path):
    """Minimality by one enumeration is 0.1 or 0.12 nats per epoch, by seed, and 0.01 and 0.02 more by the others."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, enumerations=3) for seed in (0, 2)]
    figure = gallery.draw_figure("information", read_groups(runs))
    for axis, count in zip(list_axes(figure, 4), (4, 4, 0, 0), strict=True):
        assert len(axis.containers) == count
        bars = [container.lines[2][0].get_segments() for container in axis.containers]
        for of_layer in bars[1:]:
            nats = [[(epoch, y * np.log(2)) for epoch, y in bar] for bar in of_layer]
            assert nats == [[pytest.approx((n, 0.11 * n)), pytest.approx((n, 0.11 * n + 0.02))] for n in (1, 2, 3)]
    assert read_key(figure) == [CEILING, "sd over 3 enumerations", "shuffled labels", "held-out samples"]
    alone = gallery.draw_figure("information", read_groups([write_run(tmp_path / "one", LAYERS)]))
    assert list_axes(alone)[0].containers == []


def test_bars_of_a_wide_spread_are_within_the_panel(tmp_path):
    run = write_run(tmp_path / "run", LAYERS, enumerations=2)
    dib = pd.read_csv(run / "dib.csv")
    dib.assign(upper=dib["upper"] - 0.2 * (dib["enumeration"] == 2)).to_csv(run / "dib.csv", index=False)
    axis = list_axes(gallery.draw_figure("information", read_groups([run])))[0]
    ends = [y for each in axis.containers for bar in each.lines[2][0].get_segments() for y in bar[:, 1]]
    low, high = axis.get_ylim()
    assert low < min(ends) < max(ends) < high
    assert (max(ends) - min(ends)) * np.log(2) > 0.4


def test_controls_are_marks_below_the_ends_of_the_paths(tmp_path):
    """In epoch 3 minimality is 0.3 nats and sufficiency 0.5. The input has these values too."""
    figure = gallery.draw_figure("plane", read_groups([write_run(tmp_path / "run", LAYERS)]))
    for axis, controls in zip(list_axes(figure), ({"_": 0.02}, {"_": 0.02, "1": 0.15}), strict=True):
        for layer in ("input", *LAYERS):
            colour = to_rgb(find_line(axis, layer).get_color())
            own = [one for one in axis.lines if to_rgb(one.get_color()) == colour]
            marks = {one.get_marker(): one.get_xydata() * np.log(2) for one in own if one.get_marker() in ("_", "1")}
            assert {mark: points.tolist() for mark, points in marks.items()} == {
                mark: [pytest.approx([0.3, nats])] for mark, nats in controls.items()
            }
            (joined,) = [one.get_xydata() * np.log(2) for one in own if one.get_linestyle() == ":"]
            assert joined == pytest.approx(np.array([[0.3, 0.5], [0.3, 0.02]]))
        assert axis.get_ylim()[0] * np.log(2) < 0.02
    assert read_key(figure) == [CEILING, "shuffled labels", "held-out samples"]


def test_controls_of_the_last_epoch_are_lines_in_the_plane_by_epoch(tmp_path):
    figure = gallery.draw_figure("plane_by_epoch", read_groups([write_run(tmp_path / "run", LAYERS)]))
    last = to_rgb(style.get_epoch_colour(3, 3)[:3])
    train, test = list_axes(figure)
    for axis, linestyle, nats in ((train, ":", 0.02), (test, ":", 0.02), (test, "-.", 0.15)):
        assert find_thin_lines(axis, linestyle) == {last: pytest.approx([nats] * 4)}
        assert axis.get_ylim()[0] * np.log(2) < nats
    assert find_thin_lines(train, "-.") == {}
    assert read_key(figure) == [CEILING, "shuffled labels, last epoch", "held-out samples, last epoch"]


def test_panels_of_dib_name_the_number_of_samples(tmp_path):
    runs = [
        write_run(tmp_path / f"s{seed}", LAYERS, seed, factors=(1, 2), dib_samples={"train": 3482, "test": count})
        for seed, count in ((0, 614), (1, 700))
    ]
    found = read_groups(runs)
    for name in ("information", "plane", "plane_by_epoch", "convergence"):
        titles = [axis.get_title() for axis in list_axes(gallery.draw_figure(name, found))]
        assert titles == ["train set, N = 3,482", "test set, N = 614 to 700"]
    assert [axis.get_title() for axis in list_axes(gallery.draw_figure("nc1", found))] == ["train set", "test set"]
    unknown = read_groups([write_run(tmp_path / "unknown", LAYERS, dib_samples=None)])
    assert [axis.get_title() for axis in list_axes(gallery.draw_figure("plane", unknown))] == ["train set", "test set"]


@pytest.mark.parametrize(("samples", "is_shared"), [(60, True), (615, False)])
def test_panels_of_unequal_sets_have_scales_of_their_own(tmp_path, samples, is_shared):
    """Information on the training set is a tenth of that on the test set. Groups have a common scale for each set."""
    runs = []
    for seed in (0, 2):
        flags = {"dib_samples": {"train": 60, "test": samples}, "widths": [seed + 1]}
        runs.append(write_run(tmp_path / f"s{seed}", LAYERS, seed, **flags))
        dib = pd.read_csv(runs[-1] / "dib.csv")
        dib.loc[dib["set"] == "train", "upper"] = 0.69 - 0.1 * (0.69 - dib["upper"])
        dib.assign(loss=dib["upper"]).to_csv(runs[-1] / "dib.csv", index=False)
    for name, count in (("information", 4), ("plane", 2)):
        figure = gallery.draw_figure(name, read_groups(runs))
        FigureCanvasAgg(figure).draw()
        train, test, *_ = axes = list_axes(figure, 2 * count)
        assert (train.get_ylim() == test.get_ylim()) == is_shared
        assert bool(test.get_ylabel()) != is_shared
        assert bool([text for text in test.get_yticklabels() if text.get_text()]) != is_shared
        assert [axis.get_ylim() for axis in axes[:count]] == [axis.get_ylim() for axis in axes[count:]]
        if name == "plane":
            assert (train.get_xlim() == test.get_xlim()) == is_shared


def raise_losses(run, rows: str, nats: float) -> None:
    """Set the losses in rows of dib.csv that begin like this to so much above `upper`, all others to `upper`."""
    dib = pd.read_csv(run / "dib.csv", dtype=str)
    at = dib.agg(",".join, axis=1).str.startswith(rows)
    dib["loss"] = np.where(at, dib["upper"].astype(float) + nats, dib["upper"].astype(float))
    dib.to_csv(run / "dib.csv", index=False)


def test_hollow_markers_show_what_suboptimal_probes_reached(tmp_path):
    """One of two digits is 0.01 nats off in every layer. In epoch 1 probes of the input reach less than is known."""
    figure = gallery.draw_figure("information", read_groups([write_run(tmp_path / "run", LAYERS)]))
    minimality, _, sufficiency, _ = list_axes(figure, 4)
    found = find_hollow_markers(minimality)
    assert set(found) == {"input", *LAYERS}
    for layer in LAYERS:
        assert found[layer] == [pytest.approx((epoch, 0.1 * epoch - 0.005)) for epoch in (1, 2, 3)]
    assert find_hollow_markers(sufficiency) == {"input": [pytest.approx((1, 0.3))]}
    assert to_rgb(minimality.lines[1].get_color()) == to_rgb(find_line(minimality, "hidden1").get_color())
    assert read_legend(figure) == ["input", *LAYERS, "probe's own loss"]


@pytest.mark.parametrize(("bits", "shown"), [(0.0009, []), (0.0011, ["hidden2"])])
def test_markers_are_hollow_from_a_thousandth_of_a_bit(tmp_path, bits, shown):
    run = write_run(tmp_path / "run", LAYERS)
    raise_losses(run, "2,train,hidden2,0,y", bits * np.log(2))
    figure = gallery.draw_figure("information", read_groups([run]))
    found = [find_hollow_markers(axis) for axis in list_axes(figure, 4)]
    assert [name for name in found[2] if name != "input"] == shown
    assert [{name for name in each if name != "input"} for each in (*found[:2], found[3])] == [set()] * 3


def test_probes_far_below_do_not_stretch_the_axis_and_are_counted(tmp_path):
    """Sufficiency is 0.3 to 0.5 nats. A marker 0.02 below is shown, one 50 below is not."""
    views = []
    for name, nats in (("a", 0), ("b", 0.02), ("c", 50)):
        run = write_run(tmp_path / name, LAYERS, controls=False)
        raise_losses(run, "1,train,hidden2,0,y", nats)
        figure = gallery.draw_figure("information", read_groups([run]))
        views.append(
            (
                list_axes(figure, 3)[2].get_ylim(),
                find_hollow_markers(list_axes(figure, 3)[2]).get("hidden2"),
                read_legend(figure)[-1],
            )
        )
    (own, none, _), (wider, near, plain), (same, far, counted) = views
    assert (none, near, far) == (None, [pytest.approx((1, 0.28))], None)
    assert wider[0] < 0.28 / np.log(2) < own[0]
    assert (wider[1], same) == (own[1], own)
    assert (plain, counted) == ("probe's own loss", "probe's own loss\n(1 further below)")


def test_convergence_is_drawn_by_steps(tmp_path):
    """Information is 0.04 or 0.048 nats per factor, by seed. Up to factor 2, one of two digits is 0.01 nats off."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, factors=(1, 2, 4, 8)) for seed in (0, 2)]
    runs.append(write_run(tmp_path / "without", LAYERS, 3))
    figure = gallery.draw_figure("convergence", read_groups(runs))
    found = list_axes(figure, 4)
    for axis, steps in zip(found, (270, 60, 270, 60), strict=True):
        FigureCanvasAgg(figure).draw()
        assert axis.get_xscale() == "log"
        assert axis.get_xticks().tolist() == [steps, 2 * steps, 4 * steps, 8 * steps]
        for layer in ("input", *LAYERS):
            assert find_line(axis, layer).get_xdata().tolist() == axis.get_xticks().tolist()
            assert find_line(axis, layer).get_ydata() == pytest.approx(0.044 * np.array([1, 2, 4, 8]) / np.log(2))
    assert [text.get_text() for text in found[3].get_xticklabels()] == ["60", "120", "240", "480"]
    assert find_hollow_markers(found[1])["hidden2"] == [pytest.approx((60, 0.039)), pytest.approx((120, 0.083))]
    assert find_hollow_markers(found[3]) == {}
    band = found[2].collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx(
        ((0.044 - 0.004 * 2**0.5) / np.log(2), (0.352 + 0.032 * 2**0.5) / np.log(2))
    )
    assert find_legend(figure).get_title().get_text() == "mean ± sd of 2 seeds\nepoch 3\nencoder up to"
    assert read_legend(figure) == ["input", *LAYERS, "probe's own loss"]
    assert list(find_thin_lines(found[3], "-.").values()) == [pytest.approx([0.15] * 4)] * 4
    assert read_key(figure) == [CEILING, "shuffled labels", "held-out samples"]


def test_groups_share_a_figure(tmp_path):
    runs = [write_run(tmp_path / "a", LAYERS), write_run(tmp_path / "b", DEEP, model="ConvNeXt", data="CIFAR10")]
    figure = gallery.draw_figure("training", read_groups(runs))
    assert read_legend(figure) == ["MLP on SZT, seed 0", "ConvNeXt on CIFAR10, seed 0", "train", "test"]
    figure = gallery.draw_figure("nc1", read_groups(runs))
    assert [part.get_suptitle() for part in figure.subfigs] == ["MLP on SZT", "ConvNeXt on CIFAR10"]
    assert [len(part.legends[0].get_texts()) for part in figure.subfigs] == [4, 20]
    alone = gallery.draw_figure("nc1", read_groups(runs[:1]))
    assert figure.get_figheight() == pytest.approx(2 * alone.get_figheight() - 0.3)
    assert figure.get_figwidth() > alone.get_figwidth()  # for a legend in two columns
    header = (runs[1] / "nc1.csv").read_text().splitlines()[0]
    (runs[1] / "nc1.csv").write_text(header + "\n")  # not measured there
    assert len(gallery.draw_figure("nc1", read_groups(runs)).subfigs) == 1


def test_depth_gives_the_factor_and_the_correlation(tmp_path):
    """NC1 halves from layer to layer, so the factor is 0.5 and the correlation -1."""
    figure = gallery.draw_figure("depth", read_groups([write_run(tmp_path / "run", LAYERS, epochs=9)]))
    label = "epoch {}\n  train ×0.50, -1.00\n  test ×0.50, -1.00"
    assert read_legend(figure) == [label.format(epoch) for epoch in (1, 2, 5, 9)]
    fitted = [line for line in list_axes(figure)[0].lines if line.get_linestyle() == "--"]
    assert fitted[0].get_ydata().tolist() == pytest.approx([50, 25, 12.5])


def test_depth_is_fitted_to_each_seed(tmp_path):
    """The factors of the two seeds are 0.5 and 0.25. Their geometric mean is 0.35, their deviation 0.18."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed, epochs=1) for seed in range(2)]
    rows = [f"1,{each},hidden{k},8,1,{0.25**k},1,0" for each in ("train", "test") for k in (1, 2, 3)]
    (runs[1] / "nc1.csv").write_text("epoch,set,layer,dim,rank,nc1,kept,dropped\n" + "\n".join(rows) + "\n")
    figure = gallery.draw_figure("depth", read_groups(runs))
    assert read_legend(figure) == ["epoch 1\n  train ×0.35 ± 0.18, -1.00\n  test ×0.35 ± 0.18, -1.00"]
    fitted = [line for line in list_axes(figure)[0].lines if line.get_linestyle() == "--"]
    assert fitted[0].get_ydata().tolist() == pytest.approx([(100 * 0.125**k) ** 0.5 for k in (1, 2, 3)])


def test_a_constant_nc1_has_no_correlation_with_depth():
    slope, intercept, correlation = fit_line(pd.Series([1, 2, 3]), pd.Series([2.0, 2.0, 2.0]))
    assert (slope, intercept) == pytest.approx((0, 2), abs=1e-12)
    assert np.isnan(correlation)


def test_the_law_over_epochs_shows_the_lines_by_depth(tmp_path):
    """NC1 halves from layer to layer, but in the first epoch of one seed it doubles."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in range(2)]
    text = (runs[1] / "nc1.csv").read_text().splitlines()
    for row, line_ in enumerate(text):
        if line_.startswith("1,train,hidden"):
            cells = line_.split(",")
            text[row] = ",".join([*cells[:5], str(2.0 ** int(cells[2][-1])), *cells[6:]])
    (runs[1] / "nc1.csv").write_text("\n".join(text) + "\n")
    figure = gallery.draw_figure("law", read_groups(runs))
    slopes, correlations = list_axes(figure)
    assert find_line(slopes, "train").get_ydata() == pytest.approx(np.log(2) * np.array([0, -1, -1]), abs=1e-9)
    assert find_line(slopes, "test").get_ydata() == pytest.approx([-np.log(2)] * 3)
    assert find_line(correlations, "train").get_ydata() == pytest.approx([0, -1, -1], abs=1e-9)
    assert find_line(correlations, "test").get_ydata() == pytest.approx([-1] * 3)
    (band,) = (each for each in slopes.collections if each.get_paths()[0].vertices[:, 1].max() > 0.9)
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(np.log(2) * 2**0.5)  # the deviation of two seeds
    few = write_run(tmp_path / "few", LAYERS[:2])
    assert "law" not in gallery.list_figures(read_groups([few]))  # two layers are always on a line


def test_epochs_of_the_law_are_in_order_if_a_seed_lacks_early_ones(tmp_path):
    """A seed lacks an epoch in which fewer than three layers have full rank."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in range(2)]
    path = runs[0] / "nc1.csv"
    path.write_text("".join(row for row in path.read_text().splitlines(True) if not row.startswith("1,train,hidden3")))
    slopes, _ = list_axes(gallery.draw_figure("law", read_groups(runs)))
    assert find_line(slopes, "train (1 to 2 of 2 seeds)").get_xdata().tolist() == [1, 2, 3]
    assert find_line(slopes, "test").get_xdata().tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [([0], [0]), ([3], [3]), ([0, 5, 9], [0, 1, 10]), ([3, 4, 7], [3, 5, 7]), ([21, 24, 29], [22, 24, 26, 28])],
)
def test_epoch_axes_have_ticks_within_the_measured_epochs(epochs, expected):
    axis = plt.figure().subplots()
    axis.plot(epochs, epochs)
    style.format_epoch_axis(axis, log=len(epochs) > 1)
    low, high = sorted(axis.get_xlim())
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == expected


def test_markers_are_spaced_evenly_on_a_log_axis(tmp_path):
    """Of a hundred epochs, NC1 and DIB are measured in three."""
    run = write_run(tmp_path / "run", LAYERS, epochs=100)
    for name in ("nc1", "dib"):
        table = pd.read_csv(run / f"{name}.csv")
        table[table["epoch"].isin([1, 10, 100])].to_csv(run / f"{name}.csv", index=False)
    drawn = find_line(list_axes(gallery.draw_figure("training", read_groups([run])))[0], "train")
    epochs = drawn.get_xdata()[drawn.get_markevery()]
    assert (epochs[0], epochs[-1]) == (1, 100)
    assert sum(epochs <= 10) == pytest.approx(sum(epochs > 10), abs=3)


def test_subfigures_on_the_same_data_have_the_same_scale(tmp_path):
    runs = [
        write_run(tmp_path / name, LAYERS, seed, epochs=epochs, data=data)
        for name, seed, epochs, data in (("a", 0, 2, "SZT"), ("b", 1, 9, "SZT"), ("c", 2, 30, "MNIST"))
    ]
    (runs[1] / "hparams.json").write_text((runs[1] / "hparams.json").read_text().replace("{", '{"widths": [9], '))
    for name in ("nc1", "depth", "information", "plane", "gap"):
        views = [
            (axis.get_ylim(), axis.get_xlim()) for axis in list_axes(gallery.draw_figure(name, read_groups(runs)), 99)
        ]
        count = len(views) // 3
        assert [y for y, _ in views[:count]] == [y for y, _ in views[count : 2 * count]], name
        assert views[0][0] != views[-1][0], name
        assert (views[0][1] == views[count][1]) == (name in ("plane", "depth")), name
    figure = gallery.draw_figure("plane_by_epoch", read_groups(runs[:2]))
    bars = [axis.get_ylim() for axis in figure.findobj(plt.Axes) if axis.get_label() == "<colorbar>"]
    assert np.array(bars) == pytest.approx(np.array([(0, 2), (0, 9)]))  # epochs have no common scale


def test_a_missing_nc1_is_a_gap_and_is_counted_in_the_legend(tmp_path):
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in range(2)]
    path = runs[0] / "nc1.csv"
    path.write_text(path.read_text().replace("1,train,hidden2,8,1,25.0,1,0", "1,train,hidden2,8,0,nan,nan,1"))
    assert read_legend(gallery.draw_figure("nc1", read_groups(runs))) == [
        "input",
        "hidden1",
        "hidden2 (1 to 2 seeds)",
        "hidden3",
    ]
    alone = gallery.draw_figure("nc1", read_groups(runs[:1]))
    y = find_line(list_axes(alone)[0], "hidden2").get_ydata()
    assert np.isnan(y).tolist() == [True, False, False]
    assert (
        read_legend(gallery.draw_figure("depth", read_groups(runs[:1])))[0] == "epoch 1\n  test ×0.50, -1.00"
    )  # two layers: no line


def lose_ranks(run: Path, rows: str) -> None:
    """Set the rank of the class means to 1 in these rows and to 2 in all others, of three classes."""
    hparams, path = run / "hparams.json", run / "nc1.csv"
    hparams.write_text(hparams.read_text().replace('"num_classes": 2', '"num_classes": 3'))
    text = re.sub(r"(\w+,\d+),1,", r"\1,2,", path.read_text())
    path.write_text(re.sub(rf"^({rows},\d+),2,", r"\1,1,", text, flags=re.MULTILINE))


def find_crosses(axis: plt.Axes) -> dict[tuple, list]:
    """Return the points of the crosses by their colours. Crosses without points only stand in a legend."""
    found = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    return {to_rgb(one.get_color()): np.transpose(one.get_data()).tolist() for one in found}


def test_layers_of_deficient_rank_are_crosses(tmp_path):
    """It is hidden2 in the first two epochs on the training set, where NC1 is 25 and 12.5, for one of two seeds."""
    runs = [write_run(tmp_path / f"s{seed}", LAYERS, seed=seed) for seed in (0, 1)]
    assert read_legend(gallery.draw_figure("nc1", read_groups(runs))) == ["input", *LAYERS]  # no crosses
    lose_ranks(runs[0], "[12],train,hidden2")
    lose_ranks(runs[1], "none")
    figure = gallery.draw_figure("nc1", read_groups(runs))
    assert read_legend(figure) == ["input", *LAYERS, "rank below\nmin(d, C − 1)"]
    first, second = list_axes(figure)
    curve = find_line(first, "hidden2")
    assert find_crosses(first) == {
        to_rgb(curve.get_color()): [[1, pytest.approx(25 * 2**0.5)], [2, pytest.approx(12.5 * 2**0.5)]]
    }
    assert curve.get_markevery() == [2]
    assert find_crosses(second) == {}
    lose_ranks(runs[1], "1,test,input")
    assert find_crosses(list_axes(gallery.draw_figure("nc1", read_groups(runs)))[1]) == {
        (0, 0, 0): [[1, pytest.approx(150 * 2**0.5)]]
    }


def test_layers_of_deficient_rank_are_not_in_the_line_by_depth(tmp_path):
    """NC1 halves from layer to layer, except in hidden2, which lost a direction and most of NC1 with it."""
    run = write_run(tmp_path / "run", DEEP[:4], epochs=1)
    path = run / "nc1.csv"
    path.write_text(path.read_text().replace("block2,8,1,25.0", "block2,8,1,0.25"))
    lose_ranks(run, "1,train,block2")
    figure = gallery.draw_figure("depth", read_groups([run]))
    assert read_legend(figure) == [
        "epoch 1\n  train ×0.50, -1.00\n  test ×0.50, -1.00",
        "rank below\nmin(d, C − 1),\nnot in the line",
    ]
    (points,) = find_crosses(list_axes(figure)[0]).values()
    assert points == [[2, 0.25]]
    assert len(list_axes(figure)[0].containers[1].lines[0].get_ydata()) == 3
    assert find_crosses(list_axes(figure)[1]) == {}


def test_the_input_is_at_depth_0(tmp_path):
    first, second = list_axes(
        gallery.draw_figure("depth", read_groups([write_run(tmp_path / "run", LAYERS, epochs=9)]))
    )
    for axis, value in ((first, 100), (second, 150)):
        (star,) = [line for line in axis.lines if line.get_marker() == "*"]
        assert star.get_xydata().tolist() == [[0, pytest.approx(value)]]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["input", *LAYERS]
    assert first.get_xticks().tolist() == [0, 1, 2, 3]


def test_a_path_of_deficient_rank_ends_in_a_cross(tmp_path):
    run = write_run(tmp_path / "run", LAYERS)
    lose_ranks(run, "3,test,hidden2")
    figure = gallery.draw_figure("gap", read_groups([run]))
    first, second = list_axes(figure)
    assert [find_line(first, name).get_marker() == "x" for name in LAYERS] == [False, True, False]
    assert [find_line(second, name).get_marker() == "x" for name in LAYERS] == [False] * 3  # minimality
    assert read_legend(figure)[-1] == "rank below\nmin(d, C − 1)"


def test_gaps_are_drawn_for_each_epoch(tmp_path):
    """On the training set NC1 is 50, 25, 12.5 / epoch and the loss 1 / epoch, on the test set 1.5 times that."""
    figure = gallery.draw_figure("gap", read_groups([write_run(tmp_path / "run", LAYERS)]))
    tracks = [line for line in list_axes(figure)[0].lines if len(line.get_xdata()) == 3]
    assert tracks[0].get_xdata().tolist() == pytest.approx([25, 12.5, 25 / 3])
    assert tracks[0].get_ydata().tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    ends = [line for line in list_axes(figure)[0].lines if line.get_label() == "hidden3"]
    assert ends[0].get_xydata().tolist() == [pytest.approx([12.5 / 6, 0.5 / 3])]


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        ({"train": 3481, "test": 615}, "3,481 training and 615 test samples"),
        (None, "the number of samples is not recorded"),
        ({"train": 9}, "the number of samples is not recorded"),
    ],
)
def test_minimality_of_unequal_sets_is_not_compared(tmp_path, samples, reason):
    """This depends on each group. A group that has no NC1 either is not in the figure."""
    runs = [write_run(tmp_path / "a", LAYERS, dib_samples=samples), write_run(tmp_path / "b", LAYERS, widths=[9])]
    figure = gallery.draw_figure("gap", read_groups(runs))
    first, second, third, fourth = list_axes(figure, 4)
    (reason_text,) = second.texts
    assert reason_text.get_text().splitlines()[1] == reason + "."
    assert "--dib-size" in reason_text.get_text()
    assert (len(second.lines), second.axison) == (0, False)
    assert all(find_line(axis, "hidden3") for axis in (first, third, fourth))
    for run in runs:
        (run / "nc1.csv").write_text("epoch,set,layer,dim,rank,nc1,kept,dropped\n")
    assert [gallery.KINDS["gap"].is_available(group) for group in read_groups(runs)] == [False, True]


def test_a_path_of_many_epochs_is_thinned_and_spans_decades_on_a_log_axis(tmp_path):
    """The gap of NC1 is 25 / epoch: 25 to 0.125, half of them below 0.25."""
    figure = gallery.draw_figure("gap", read_groups([write_run(tmp_path / "run", LAYERS, epochs=200)]))
    first, second = list_axes(figure)
    track = first.lines[0].get_xdata()
    assert 15 < len(track) <= 20
    assert (track[0], track[-1]) == pytest.approx((25, 25 / 200))
    assert (first.get_xscale(), second.get_xscale()) == ("symlog", "linear")


def test_seeds_are_markers_around_their_mean(tmp_path):
    """Loss is (1 + seed) / 3, on the test set 0.5 / 3 more for both seeds. The gap of NC1 grows with the seed."""
    figure = gallery.draw_figure(
        "gap", read_groups([write_run(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)])
    )
    (small,) = [
        line for line in list_axes(figure)[0].lines if line.get_markersize() == 2.5 and line.get_marker() == "o"
    ]
    assert small.get_xdata().tolist() == pytest.approx([25 / 3, 25])
    assert small.get_ydata().tolist() == pytest.approx([0.5 / 3] * 2)
    assert find_line(list_axes(figure)[0], "hidden1").get_xdata().tolist() == pytest.approx([50 / 3])


def test_the_arrow_of_time_points_from_early_to_late(tmp_path):
    """Minimality is 0.1 nats in epoch 1 and 0.5 in epoch 5, so epoch 3 is half-way out."""
    figure = gallery.draw_figure("plane", read_groups([write_run(tmp_path / "run", LAYERS, epochs=5)]))
    arrow = next(text for text in list_axes(figure)[0].texts if isinstance(text, Annotation))
    assert (arrow.xy[0], arrow.xyann[0]) == pytest.approx((0.3 / np.log(2), 0.2 / np.log(2)))


def test_the_line_of_an_epoch_joins_the_input_and_the_layers(tmp_path):
    figure = gallery.draw_figure("plane_by_epoch", read_groups([write_run(tmp_path / "run", LAYERS, epochs=5)]))
    by_epoch = list_axes(figure)[0].lines[:5]
    expected = np.array([[5, 1, 1, 1], [5, 2, 2, 2], [5, 3, 3, 3], [5, 4, 4, 4], [5, 5, 5, 5]])
    assert np.array([line.get_xdata() for line in by_epoch]) == pytest.approx(0.1 * expected / np.log(2))
    assert not gallery.KINDS["plane_by_epoch"].is_available(
        read_groups([write_run(tmp_path / "b", LAYERS, data="MNIST")])[0]
    )


def test_a_layer_has_one_colour_and_marker_in_every_figure(tmp_path):
    """This holds even if DIB splits at some layers only. Epochs have other colours."""
    run = write_run(tmp_path / "run", DEEP, factors=(1, 2))
    rows = [row for row in (run / "dib.csv").read_text().splitlines() if "block" not in row or "block9," in row]
    (run / "dib.csv").write_text("\n".join(rows) + "\n")
    found = read_groups([run])
    lines = [
        find_line(axis, "block9")
        for name in ("nc1", "information", "plane", "gap", "convergence")
        for axis in list_axes(gallery.draw_figure(name, found), 2)
    ]
    assert len({(to_rgb(one.get_color()), one.get_marker()) for one in lines}) == 1
    figure = gallery.draw_figure("plane_by_epoch", found)
    shown = dict(zip(read_legend(figure), find_legend(figure).legend_handles, strict=True))
    marker = plt.matplotlib.markers.MarkerStyle(lines[0].get_marker())
    path = marker.get_path().transformed(marker.get_transform())
    assert np.array_equal(shown["block9"].get_paths()[0].vertices, path.vertices)
    assert not np.allclose(style.get_epoch_colour(1, 9)[:3], to_rgb(lines[0].get_color()))


def test_every_layer_of_a_deep_network_is_in_the_plane_by_epoch(tmp_path):
    figure = gallery.draw_figure("plane_by_epoch", read_groups([write_run(tmp_path / "run", DEEP)]))
    assert read_legend(figure) == ["input", *DEEP]


@pytest.mark.parametrize(
    ("table", "name"),
    [
        *(("nc1", name) for name in ("nc1", "depth", "gap")),
        *(("epochs", name) for name in ("training", "gap")),
        *(("dib", name) for name in ("information", "plane", "plane_by_epoch", "gap")),
        ("convergence", "convergence"),
    ],
)
def test_values_that_are_not_numbers_are_left_out(tmp_path, table, name):
    """They are NC1 of a dead layer, a test loss that overflowed, and labelings that were not measured."""
    run = write_run(tmp_path / "run", LAYERS, factors=(1, 2))
    text = (run / f"{table}.csv").read_text()
    if table == "nc1":
        text = re.sub(r"(hidden3,8),1,.*", r"\1,0,nan,nan,1", text)
    elif table == "epochs":
        text = re.sub(r"(\d,test),[^,]*", r"\1,inf", text)
    else:
        text = "".join(row for row in text.splitlines(True) if not re.search(r",0,[01],", row))
    (run / f"{table}.csv").write_text(text)
    FigureCanvasAgg(gallery.draw_figure(name, read_groups([run]))).draw()


def test_dollars_in_names_are_not_formulas(tmp_path):
    runs = [write_run(tmp_path / name, LAYERS, widths=[name] * 40) for name in ("$a", "$b$")]
    for name in ("training", "nc1"):
        FigureCanvasAgg(gallery.draw_figure(name, read_groups(runs))).draw()


def test_colours_differ_in_grey_and_are_dark_enough_for_paper():
    looks = style.assign_looks(DEEP).values()
    grey = [compute_luminance(look["color"]) for look in looks]
    assert all(a < b for a, b in pairwise(grey))
    assert grey[-1] < 0.7
    epochs = [compute_luminance(colour[:3]) for colour in style.get_epoch_colour(np.array([1, 5, 22, 100]), 100)]
    assert all(a + 0.1 < b for a, b in pairwise(epochs))
    assert epochs[-1] < 0.7
    assert len({(look["marker"], round(g, 1)) for look, g in zip(looks, grey, strict=True)}) == len(DEEP)


@pytest.mark.parametrize(
    ("name", "layers", "samples"),
    [
        *((name, DEEP, 60) for name in gallery.KINDS if name != "lr_range"),
        *((name, LAYERS, 60) for name in ("gap", "plane", "convergence")),
        *(("gap", layers, 12345) for layers in (DEEP, LAYERS)),  # test samples, too many to compare
    ],
)
def test_no_text_overlaps_or_leaves_the_figure(tmp_path, monkeypatch, name, layers, samples):
    """Figures have as many layers as ConvNeXt, or few and long numbers at the ticks, and suboptimal probes."""
    flags = {"data": "SZT" if name == "plane_by_epoch" else "CIFAR10", "dib_samples": {"train": 60, "test": samples}}
    run = write_run(tmp_path / "run", layers, epochs=12, factors=(1, 2, 4, 8), enumerations=3, **flags)
    dib = pd.read_csv(run / "dib.csv")
    dib["upper"] = 0.69 - np.where(dib["set"] == "test", np.arange(len(dib)) // 3 % 22 / 1000 - 0.007, 0.001)
    dib["loss"] = dib["upper"] + np.arange(len(dib)) % 7
    dib.to_csv(run / "dib.csv", index=False)
    figure = gallery.draw_figure(name, read_groups([run]))
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), draw(self, renderer)))
    FigureCanvasAgg(figure).draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text() and text.get_visible()]
    assert len(boxes) > 15
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, one), (b, other) in combinations(boxes, 2):
        assert not one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98)), (a, b)


def test_the_range_test_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", LAYERS)
    (run / "lr_range.csv").write_text(
        "step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n1,1e-4,2.2,2.25,0\n2,1e-2,1.5,1.9,1\n3,1,9,5,0\n"
    )
    figure = gallery.draw_figure("lr_range", read_groups([run]))
    (axis,) = list_axes(figure)
    assert axis.get_xscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("learning rate", "cross-entropy (nats)")
    assert read_legend(figure) == ["each step", "smoothed", "chosen: 0.01"]
    assert axis.get_ylim()[1] < 5


def test_rounding_errors_do_not_look_like_information(tmp_path):
    """Curves that differ by 1e-12 nats are drawn on axes of a tenth of a bit."""
    run = write_run(tmp_path / "run", LAYERS)
    table = pd.read_csv(run / "dib.csv")
    table["loss"] = table["upper"] = 0.3 + 1e-12 * table["epoch"]
    table.to_csv(run / "dib.csv", index=False)
    found = read_groups([run])
    low, high = list_axes(gallery.draw_figure("information", found))[0].get_ylim()
    assert 0.0999 < high - low < 0.12
    plane = list_axes(gallery.draw_figure("plane", found))[0]
    for low, high in (plane.get_xlim(), plane.get_ylim()):
        assert 0.0999 < high - low < 0.12
    low, high = list_axes(gallery.draw_figure("gap", found))[1].get_xlim()
    assert 0.0999 < high - low < 0.12
