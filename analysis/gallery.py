"""All figures: which there are, what to look for in each, and how they become files."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import matplotlib.style
from matplotlib.figure import Figure

from analysis import figures, style
from analysis.tables import Group


@dataclass(frozen=True)
class Kind:
    """A figure: its title, what to look for in it, the function that draws it, which groups have it.

    height: inches of a strip; strips: whether each group has one, or all are in one.
    """

    title: str
    caption: str
    draw: Callable[[Figure, list[Group]], None]
    has: Callable[[Group], bool]
    height: float
    strips: bool = True


def measured(table: str) -> Callable[[Group], bool]:
    return lambda group: not group.tables[table].empty


KINDS = {
    "lr_range": Kind(
        title="Learning-rate range test",
        caption=(
            "The loss while the learning rate grows. The dashed line is the rate that was taken, where the loss falls "
            "fastest; further right it turns and then diverges."
        ),
        draw=figures.draw_lr_range,
        has=measured("lr_range"),
        height=3.4,
    ),
    "training": Kind(
        title="Loss and accuracy",
        caption=(
            "Whether the network has fitted its training set (collapse is a matter of the epochs after that), and how "
            "far the test set stays behind."
        ),
        draw=figures.draw_training,
        has=measured("epochs"),
        height=3.6,
        strips=False,
    ),
    "nc1": Kind(
        title="Neural collapse over epochs",
        caption=(
            "NC1, the scatter within the classes over that between them, of every layer: where a curve falls, the "
            "samples of a class draw together. A test curve that levels off while that of the training set goes on "
            "falling is a collapse that does not generalise. The dashed line is the input. A cross is a layer whose "
            "class means have a rank below min(d, C - 1), of some seed: directions that they lost, and the scatter "
            "along them, are not in NC1, which is lower for it and would read as collapse (nc1.csv has what they "
            "kept and dropped). Mean and band over seeds are those of the logarithm."
        ),
        draw=figures.draw_nc1,
        has=measured("nc1"),
        height=3.4,
    ),
    "depth": Kind(
        title="Neural collapse by depth",
        caption=(
            "The law of data separation (He & Su, PNAS 2023): in a trained network the logarithm of NC1 falls along a "
            "straight line with depth. The dashed line is fitted to the logarithm; the legend has the factor by which "
            "NC1 changes from a layer to the next along it, and the correlation with depth, of which -1 is the law "
            "exactly. Of several seeds each is fitted, and the mean of the fits shown. Not in the line are the input "
            "(star), at depth 0, and crosses: layers whose class means have a rank below min(d, C - 1), of some seed. "
            "Directions that they lost are not in their NC1, which is lower for it and would read as collapse."
        ),
        draw=figures.draw_depth,
        has=measured("nc1"),
        height=3.8,
    ),
    "law": Kind(
        title="The law of data separation over epochs",
        caption=(
            "The lines of the figure by depth, one for each epoch: the slope of the logarithm of NC1, of which -0.7 "
            "halves it from a layer to the next, and its correlation with depth. Where the correlation comes to -1, "
            "every layer does an equal share; the law is a matter of training if it is not there in epoch 0. Layers of "
            "short rank and the input are not in the lines. The band is the standard deviation over seeds."
        ),
        draw=figures.draw_law,
        has=figures.has_law,
        height=3.4,
    ),
    "information": Kind(
        title="Decodable information",
        caption=(
            "Minimality is what decoders can tell of which sample of its class an encoding came from, sufficiency what "
            "they can tell of the class. A layer compresses where minimality falls while sufficiency stays. The dashed "
            "line is the input itself. Lines are what is known to be decodable; a hollow marker below one is what the "
            "layer's own decoders reached, where that is over 0.001 bits less: a decoder that was not found, not "
            "information that the network lost. Those far below are left out, and counted in the legend. Lines are "
            "below 0 only where decoders cannot put out constants (a last layer without bias)."
        ),
        draw=figures.draw_information,
        has=measured("dib"),
        height=4.8,
    ),
    "plane": Kind(
        title="Information plane",
        caption=(
            "A track for each encoder through epochs spaced evenly on a log scale, along the arrow to the last, a "
            "large marker, around which small ones are the seeds. Up is fitting, left is compression: a track that "
            "rises and then turns left compresses after it has fitted."
        ),
        draw=figures.draw_plane,
        has=measured("dib"),
        height=3.6,
    ),
    "plane_by_epoch": Kind(
        title="Information plane by epoch",
        caption=(
            "The picture of Shwartz-Ziv & Tishby (2017), with decodable information in place of binned mutual "
            "information: a line joins the layers of an epoch, the input and shallow layers to the right. In theirs "
            "the lines rise in the early epochs and then move left."
        ),
        draw=figures.draw_plane_by_epoch,
        has=lambda group: measured("dib")(group) and group.hparams[0]["data"] == "SZT",
        height=3.8,
    ),
    "gap": Kind(
        title="Generalisation and compression",
        caption=(
            "Up is the generalisation gap, test loss - train loss, across the same difference of NC1 and of "
            "minimality: a track for each layer, as in the information plane. Tracks that keep to a rising line say "
            "that the two go together. Minimality is information about the samples at hand, which grows as they get "
            "fewer: it is compared only where both sets were measured on the same number of samples. An axis of NC1 "
            "that spans decades is linear between its ticks next to 0. A track of NC1 ends in a cross where the class "
            "means of the layer have a rank below min(d, C - 1), on either set: their NC1 lacks what they lost."
        ),
        draw=figures.draw_gap,
        has=figures.has_gap,
        height=3.6,
    ),
    "settle": Kind(
        title="Information by the decoders' steps",
        caption=(
            "What is known after the last epoch by decoders that were trained for more and more steps. Where a curve "
            "is flat, more steps find nothing more: choose --dib-epochs by it. What still rises is understated in the "
            "other figures. A hollow marker is, as there, a decoder that was not found, not information that the "
            "network lost; those far below are left out, and counted in the legend."
        ),
        draw=figures.draw_settle,
        has=measured("settling"),
        height=4.8,
    ),
}


def pictures(groups: list[Group], formats: tuple[str, ...]) -> Iterator[tuple[str, list[bytes]]]:
    """Every figure that these runs have, by name, in these formats; a process for each core draws them."""
    found = names(groups)
    with ProcessPoolExecutor() as pool:
        yield from zip(found, pool.map(partial(picture, groups=groups, formats=formats), found), strict=True)


def names(groups: list[Group]) -> list[str]:
    """The figures that any of the groups has."""
    return [name for name, kind in KINDS.items() if any(map(kind.has, groups))]


def picture(name: str, groups: list[Group], formats: tuple[str, ...]) -> list[bytes]:
    """The figure of that name as a file of each format."""
    files = [BytesIO() for _ in formats]
    with matplotlib.style.context(style.STYLE, after_reset=True):  # whatever a matplotlibrc says
        fig = figure(name, groups)
        for file, each in zip(files, formats, strict=True):
            fig.savefig(file, format=each)
    return [file.getvalue() for file in files]


def figure(name: str, groups: list[Group]) -> Figure:
    """The figure of that name, of the groups that have it, laid out once for all formats."""
    kind = KINDS[name]
    groups = [group for group in groups if kind.has(group)]
    fig = Figure(figsize=size(kind, groups))
    fig.suptitle(kind.title if len(groups) > 1 else f"{kind.title}: {style.plain(groups[0].label)}")
    kind.draw(fig, groups)
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")
    return fig


def size(kind: Kind, groups: list[Group]) -> tuple[float, float]:
    """Width and height in inches."""
    long = any(len(group.layers) > style.MANY for group in groups)
    return style.WIDTH + 1.4 * long, 0.3 + kind.height * (len(groups) if kind.strips else 1)
