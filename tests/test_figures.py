from itertools import combinations, pairwise

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation, Text

from analysis import gallery, style
from analysis.tables import groups
from tests.toys import measured

LAYERS = ["hidden1", "hidden2", "hidden3"]
DEEP = [f"block{i}" for i in range(1, 19)] + ["pool"]


@pytest.fixture(autouse=True)
def close():
    with plt.rc_context(style.STYLE):
        yield
    plt.close("all")


def axes(figure, sets=2):
    return [axis for axis in figure.findobj(plt.Axes) if axis.get_label() != "<colorbar>"][:sets]


def legend(figure):
    return figure.findobj(plt.matplotlib.legend.Legend)[0]


def texts(figure):
    return [text.get_text() for text in legend(figure).get_texts()]


def line(axis, label):
    return next(line for line in axis.lines if line.get_label() == label)


def luminance(colour) -> float:
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
        ("drop", ["", "", "epoch", "epoch"], ["mean of the heads (bits)", "", "largest (bits)", ""], "symlog"),
    ],
)
def test_axes_have_names_and_units(tmp_path, name, across, up, scale):
    figure = gallery.figure(name, groups([measured(tmp_path / "run", LAYERS)]))
    found = axes(figure, len(across))
    assert [axis.get_xlabel() for axis in found] == across
    assert [axis.get_ylabel() for axis in found] == up
    assert {axis.get_yscale() for axis in found} == {scale}


def test_curves_are_the_mean_in_a_band_over_seeds(tmp_path):
    """Loss is (1 + seed) / epoch on the training set: seeds 0 and 2 give 2 / epoch ± sqrt(2) / epoch."""
    figure = gallery.figure("training", groups([measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 2)]))
    loss = axes(figure)[0]
    assert line(loss, "train").get_ydata().tolist() == pytest.approx([2, 1, 2 / 3])
    band = loss.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == pytest.approx(((2 - 2**0.5) / 3, 2 + 2**0.5))
    assert legend(figure).get_title().get_text() == "mean ± sd of 2 seeds"


def test_nc1_is_the_geometric_mean_over_seeds(tmp_path):
    """50 (1 + seed) / epoch in the first layer: 50, 100 and 400."""
    found = groups([measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in (0, 1, 7)])
    mean = 50 * 16 ** (1 / 3)
    assert line(axes(gallery.figure("nc1", found))[0], "hidden1").get_ydata()[0] == pytest.approx(mean)
    assert axes(gallery.figure("depth", found))[0].containers[0].lines[0].get_ydata()[0] == pytest.approx(mean)


def test_the_input_is_a_dashed_line_where_it_was_measured(tmp_path):
    """Decoders tell 0.1 nats from it, and 0.2 more of the class; the drop is 0.01 nats, for the class 4 times that."""
    found = groups([measured(tmp_path / "run", LAYERS)])
    for name, expected in (("information", [0.1, 0.1, 0.3, 0.3]), ("drop", [0.02, 0.02, 0.04, 0.04])):
        shown = [line(axis, "input") for axis in axes(gallery.figure(name, found), 4)]
        assert [one.get_ydata()[0] for one in shown] == pytest.approx(np.array(expected) / np.log(2))
        assert {one.get_linestyle() for one in shown} == {"--"}


def test_groups_stand_in_one_figure(tmp_path):
    runs = [measured(tmp_path / "a", LAYERS), measured(tmp_path / "b", DEEP, model="ConvNeXt", data="CIFAR10")]
    figure = gallery.figure("training", groups(runs))
    assert texts(figure) == ["MLP on SZT, seed 0", "ConvNeXt on CIFAR10, seed 0", "train", "test"]
    figure = gallery.figure("nc1", groups(runs))
    assert [part.get_suptitle() for part in figure.subfigs] == ["MLP on SZT", "ConvNeXt on CIFAR10"]
    assert [len(part.legends[0].get_texts()) for part in figure.subfigs] == [3, 19]


def test_depth_says_the_factor_and_the_correlation(tmp_path):
    """NC1 halves from layer to layer: a factor of 0.5, a correlation of -1."""
    figure = gallery.figure("depth", groups([measured(tmp_path / "run", LAYERS, epochs=9)]))
    label = "epoch {}\n  train ×0.50, -1.00\n  test ×0.50, -1.00"
    assert texts(figure) == [label.format(epoch) for epoch in (1, 2, 4, 9)]
    fitted = [line for line in axes(figure)[0].lines if line.get_linestyle() == "--"]
    assert fitted[0].get_ydata().tolist() == pytest.approx([50, 25, 12.5])


def test_an_nc1_that_is_not_there_is_a_gap_and_is_said(tmp_path):
    runs = [measured(tmp_path / f"s{seed}", LAYERS, seed) for seed in range(2)]
    path = runs[0] / "nc1.csv"
    path.write_text(path.read_text().replace("1,train,hidden2,8,1,25.0", "1,train,hidden2,8,0,nan"))
    assert texts(gallery.figure("nc1", groups(runs))) == ["hidden1", "hidden2 (from 1)", "hidden3"]
    alone = gallery.figure("nc1", groups(runs[:1]))
    y = line(axes(alone)[0], "hidden2 (from 0)").get_ydata()
    assert np.isnan(y).tolist() == [True, False, False]
    assert texts(gallery.figure("depth", groups(runs[:1])))[0] == "epoch 1\n  test ×0.50, -1.00"  # two layers: no line


def test_gaps_are_those_of_each_epoch(tmp_path):
    """NC1 is 50, 25 and 12.5 / epoch, the loss 1 / epoch on the training set, both 1.5 times that on the test set."""
    figure = gallery.figure("gap", groups([measured(tmp_path / "run", LAYERS)]))
    tracks = [line for line in axes(figure)[0].lines if len(line.get_xdata()) == 3]
    assert tracks[0].get_xdata().tolist() == pytest.approx([25, 12.5, 25 / 3])
    assert tracks[0].get_ydata().tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    ends = [line for line in axes(figure)[0].lines if line.get_label() == "hidden3"]
    assert ends[0].get_xydata().tolist() == [pytest.approx([12.5 / 6, 0.5 / 3])]


def test_the_arrow_of_time_points_from_early_to_late(tmp_path):
    """Minimality is 0.1 nats in epoch 1, 0.5 in epoch 5: half-way out is epoch 3."""
    figure = gallery.figure("plane", groups([measured(tmp_path / "run", LAYERS, epochs=5)]))
    arrow = next(text for text in axes(figure)[0].texts if isinstance(text, Annotation))
    assert (arrow.xy[0], arrow.xyann[0]) == pytest.approx((0.3 / np.log(2), 0.2 / np.log(2)))


def test_lines_of_an_epoch_join_the_layers_behind_the_input(tmp_path):
    figure = gallery.figure("plane_by_epoch", groups([measured(tmp_path / "run", LAYERS, epochs=5)]))
    by_epoch = axes(figure)[0].lines
    told = np.array([[1, 1, 1, 1], [1, 2, 2, 2], [1, 3, 3, 3], [1, 4, 4, 4], [1, 5, 5, 5]])
    assert np.array([line.get_xdata() for line in by_epoch]) == pytest.approx(0.1 * told / np.log(2))
    assert not gallery.KINDS["plane_by_epoch"].has(groups([measured(tmp_path / "b", LAYERS, data="MNIST")])[0])


def test_a_layer_has_one_colour_in_every_figure(tmp_path):
    """Also where DIB splits at some of the layers alone."""
    run = measured(tmp_path / "run", DEEP)
    kept = [row for row in (run / "dib.csv").read_text().splitlines() if "block" not in row or "block9," in row]
    (run / "dib.csv").write_text("\n".join(kept) + "\n")
    found = groups([run])
    colours = {
        to_rgb(line(axis, "block9").get_color())
        for name in ("nc1", "information", "plane", "gap", "drop")
        for axis in axes(gallery.figure(name, found), 2)
    }
    assert len(colours) == 1


def test_colours_are_told_apart_in_grey_and_on_paper():
    looks = style.colours(DEEP).values()
    grey = [luminance(look["color"]) for look in looks]
    assert all(a < b for a, b in pairwise(grey))
    assert grey[-1] < 0.7
    assert len({(look["marker"], round(g, 1)) for look, g in zip(looks, grey, strict=True)}) == len(DEEP)


@pytest.mark.parametrize("name", [name for name in gallery.KINDS if name != "lr_range"])
def test_no_text_of_nineteen_layers_overlaps_or_leaves_the_figure(tmp_path, monkeypatch, name):
    run = measured(tmp_path / "run", DEEP, data="SZT" if name == "plane_by_epoch" else "CIFAR10", epochs=12)
    figure = gallery.figure(name, groups([run]))
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), draw(self, renderer)))
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text() and text.get_visible()]
    assert len(boxes) > 15
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, one), (b, other) in combinations(boxes, 2):
        assert not one.shrunk(0.98, 0.98).overlaps(other.shrunk(0.98, 0.98)), (a, b)


def test_the_range_test(tmp_path):
    run = measured(tmp_path / "run", LAYERS)
    (run / "lr_range.csv").write_text(
        "step,learning_rate,loss,smoothed,chosen\n0,1e-6,2.3,2.3,0\n1,1e-4,2.2,2.25,0\n2,1e-2,1.5,1.9,1\n3,1,9,5,0\n"
    )
    figure = gallery.figure("lr_range", groups([run]))
    (axis,) = axes(figure)
    assert axis.get_xscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("learning rate", "cross-entropy (nats)")
    assert texts(figure) == ["of a step", "smoothed", "chosen: 0.01"]
    assert axis.get_ylim()[1] < 5
