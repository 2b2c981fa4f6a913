"""List all figures with their captions, and render them as files."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import matplotlib.style
from matplotlib.figure import Figure

from analysis import figures, style
from analysis.statistics import SUBOPTIMAL_BITS, find_ceilings
from analysis.tables import Group


@dataclass(frozen=True)
class FigureKind:
    """A kind of figure.

    Attributes:
        title: the title of the figure and of its caption.
        caption: a text about what the figure shows and how to read it.
        draw: a function that draws the figure of these groups.
        is_available: a function that returns whether a group has data for this figure.
        height: the height of a subfigure in inches.
        one_per_group: whether each group has a separate subfigure.
        controls: a text about the marks of the controls, which is added to the caption if there are any.
    """

    title: str
    caption: str
    draw: Callable[[Figure, list[Group]], None]
    is_available: Callable[[Group], bool]
    height: float
    one_per_group: bool = True
    controls: str = ""


def has_rows(table: str) -> Callable[[Group], bool]:
    """Return a function that returns whether the given table of a group has rows."""
    return lambda group: not group.tables[table].empty


# What the controls mean, for the captions of all figures that show them.
CONTROLS = (
    " The value of shuffled labels (the original labels in a random order) is what decoders memorise at this number of "
    "samples N. Sufficiency counts only where it is higher. The value of held-out samples is what the probes of the "
    "training set can use on the test set. Below 0 it is cut off. The ceiling of minimality is the mean entropy of its "
    "labelings. It may be outside the panel."
)

KINDS = {
    "lr_range": FigureKind(
        title="Learning-rate range test",
        caption=(
            "Loss at each step of the range test, in which the learning rate grows. The dashed line marks the chosen "
            "rate, at which the loss falls fastest. At higher rates the loss rises and then diverges."
        ),
        draw=figures.draw_lr_range,
        is_available=has_rows("lr_range"),
        height=3.4,
    ),
    "training": FigureKind(
        title="Loss and accuracy",
        caption=(
            "Loss and accuracy on both sets. The curves show when the network fits the training set, and how large the "
            "difference to the test set is. Neural collapse is expected after the network fits."
        ),
        draw=figures.draw_training,
        is_available=has_rows("epochs"),
        height=3.6,
        one_per_group=False,
    ),
    "nc1": FigureKind(
        title="Neural collapse over epochs",
        caption=(
            "NC1 of every layer. NC1 is the scatter within the classes relative to the scatter between the classes. "
            "Where a curve falls, the samples of a class come closer together. If the test curve levels off while the "
            "training curve still falls, the collapse does not generalise. The dashed line is the input. A cross marks "
            "a layer whose class means have a rank below min(d, C - 1) for at least one seed. The missing directions "
            "are not included in NC1. This lowers NC1, but is not collapse. In nc1.csv, kept is the "
            "smallest singular value that counts towards the rank, and dropped is the largest one that does not. With "
            "several seeds, mean and standard deviation are computed on a log scale."
        ),
        draw=figures.draw_nc1,
        is_available=has_rows("nc1"),
        height=3.4,
    ),
    "depth": FigureKind(
        title="Neural collapse by depth",
        caption=(
            "According to the law of data separation (He & Su, PNAS 2023), log NC1 of a trained network decreases "
            "linearly with depth. The dashed line is fitted to log NC1. The legend gives the factor per layer of the "
            "fitted line, and the correlation of log NC1 with depth. A correlation of -1 means that the law holds "
            "exactly. With several seeds, the mean of their lines is shown. The input (star) and layers with crosses "
            "are not included in the fit. A cross marks a layer whose class means have a rank below min(d, C - 1) for "
            "at least one seed. NC1 does not include the missing directions. This lowers it, but is not "
            "collapse."
        ),
        draw=figures.draw_depth,
        is_available=has_rows("nc1"),
        height=3.8,
    ),
    "law": FigureKind(
        title="The law of data separation over epochs",
        caption=(
            "Slope of the line fitted to log NC1 by depth, and the correlation with depth, in every epoch (see "
            "Neural collapse by depth). A slope of -0.7 halves NC1 from one layer to the next. A correlation "
            "close to -1 means that all layers reduce NC1 by the same factor. If the correlation is not close to -1 in "
            "epoch 0, the law is a result of training. The input and layers whose class means have a rank below "
            "min(d, C - 1) are not included. The band is the standard deviation over seeds."
        ),
        draw=figures.draw_law,
        is_available=figures.has_law,
        height=3.4,
    ),
    "information": FigureKind(
        title="Decodable information",
        caption=(
            "Minimality is the decodable information about which sample of its class was encoded. Sufficiency is the "
            "decodable information about the class. Where minimality falls and sufficiency does not, the encoder is "
            "said to compress. Lines are the best known lower bounds. The dashed line is the input. A hollow marker is "
            "the information found by the layer's own probes (decoders trained on its frozen encodings), if it is more "
            f"than {SUBOPTIMAL_BITS:g} bits below the line. These probes are known suboptimal; the network did not "
            "lose information. Markers far below the line are counted in the legend. Values below 0 can occur if the "
            "last layer has no bias, because it then cannot output class frequencies."
        ),
        draw=figures.draw_information,
        is_available=has_rows("dib"),
        height=4.8,
        controls=(
            "Thin lines without markers are controls of the layer of the same colour: dotted for shuffled labels, "
            "dash-dotted for held-out samples. The grey line is the ceiling of minimality." + CONTROLS
        ),
    ),
    "plane": FigureKind(
        title="Information plane",
        caption=(
            "The path of each encoder, through epochs that are evenly spaced on a log scale. The arrow shows the "
            "direction of time. The large marker is the mean at the last epoch, and the small markers are the seeds. "
            "Upward movement means that decoders can use more information about the class. Movement to the left means "
            "that they can memorise less about the samples."
        ),
        draw=figures.draw_plane,
        is_available=has_rows("dib"),
        height=3.6,
        controls=(
            "A dotted line joins the last point of a path to its controls: a dash for shuffled labels, a star of three "
            "rays for held-out samples. The grey line is the ceiling of minimality." + CONTROLS
        ),
    ),
    "plane_by_epoch": FigureKind(
        title="Information plane by epoch",
        caption=(
            "The figure of Shwartz-Ziv & Tishby (2017), with decodable information instead of binned mutual "
            "information. A line joins the layers of an epoch, with the input and shallow layers to the right. In "
            "their figure the lines rise in the early epochs and then move left."
        ),
        draw=figures.draw_plane_by_epoch,
        is_available=lambda group: has_rows("dib")(group) and group.hparams[0]["data"] == "SZT",
        height=3.8,
        controls=(
            "Thin lines without markers join the controls of all layers in the last epoch: dotted for shuffled labels, "
            "dash-dotted for held-out samples. The grey line is the ceiling of minimality." + CONTROLS
        ),
    ),
    "gap": FigureKind(
        title="Generalisation and compression",
        caption=(
            "The vertical axis is the generalisation gap, test loss - train loss. The horizontal axes are test NC1 - "
            "train NC1 and test minimality - train minimality. Each layer has a path, as in the information plane. If "
            "the paths follow a rising line, the two differences grow together. Minimality depends on the number of "
            "samples. It is shown only if it was measured on the same number of samples of both sets. If NC1 "
            "differences span several decades, the axis is symmetric-logarithmic: linear near 0 and logarithmic "
            "elsewhere. A path ends in a cross if the class means of the layer have a rank below min(d, C - 1) on "
            "either set. NC1 then does not include the missing directions."
        ),
        draw=figures.draw_gap,
        is_available=figures.has_gap,
        height=3.6,
    ),
    "convergence": FigureKind(
        title="Convergence of decodable information",
        caption=(
            "Decodable information after the epoch in the legend, for probes that are trained for 1, 2, 4 and 8 times "
            "the steps. Where a curve is flat, the probes have converged, and --dib-epochs is large enough. Where a "
            "curve still rises, the values in the other figures are too low. Hollow markers are probes that are known "
            "suboptimal. Markers far below the line are omitted. The legend gives their number."
        ),
        draw=figures.draw_convergence,
        is_available=has_rows("convergence_information"),
        height=4.8,
        controls=(
            "Thin lines without markers are controls, as in Decodable information. If the curve of the shuffled labels "
            "rises with the steps, the decoders memorise more."
        ),
    ),
}


def write_caption(name: str, groups: list[Group]) -> str:
    """Return the caption of a figure of these groups."""
    kind, parts = KINDS[name], [KINDS[name].caption]
    if kind.controls and any(group.has_controls for group in groups):
        parts.append(kind.controls)
    if kind.controls:
        parts += describe_ceilings(groups)
    return " ".join(parts)


def describe_ceilings(groups: list[Group]) -> list[str]:
    """Return a sentence for each quantity that is at its ceiling in all layers and epochs of a group."""
    return [
        f"{group.label}: {quantity} on the {set_name} set is at its ceiling of {ceiling:.2f} bits in every layer and "
        "epoch, so it shows no difference between them; more samples (--dib-size) are needed."
        for group in groups
        for quantity, set_name, ceiling in find_ceilings(group.tables["information"])
    ]


def render_figures(groups: list[Group], formats: tuple[str, ...]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield (name, files) of every available figure, with a file for each format. Processes render them in parallel."""
    names = list_figures(groups)
    with ProcessPoolExecutor() as pool:
        yield from zip(names, pool.map(partial(render_figure, groups=groups, formats=formats), names), strict=True)


def list_figures(groups: list[Group]) -> list[str]:
    """Return the names of the figures that are available for at least one of the groups."""
    return [name for name, kind in KINDS.items() if any(map(kind.is_available, groups))]


def render_figure(name: str, groups: list[Group], formats: tuple[str, ...]) -> list[bytes]:
    """Return the figure of that name as a file for each format."""
    files = [BytesIO() for _ in formats]
    with matplotlib.style.context(style.STYLE, after_reset=True):  # a matplotlibrc is ignored
        fig = draw_figure(name, groups)
        for file, each in zip(files, formats, strict=True):
            fig.savefig(file, format=each)
    return [file.getvalue() for file in files]


def draw_figure(name: str, groups: list[Group]) -> Figure:
    """Return the figure of that name with the groups for which it is available.

    The layout is computed once, so that it is the same in all formats.
    """
    kind = KINDS[name]
    groups = [group for group in groups if kind.is_available(group)]
    fig = Figure(figsize=compute_size(kind, groups))
    fig.suptitle(kind.title if len(groups) > 1 else f"{kind.title}: {style.escape_dollars(groups[0].label)}")
    kind.draw(fig, groups)
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")
    return fig


def compute_size(kind: FigureKind, groups: list[Group]) -> tuple[float, float]:
    """Return width and height of a figure in inches."""
    has_wide_legend = any(len(group.layers) > style.MANY for group in groups)
    width = style.WIDTH + 1.4 if has_wide_legend else style.WIDTH
    return width, 0.3 + kind.height * (len(groups) if kind.one_per_group else 1)
