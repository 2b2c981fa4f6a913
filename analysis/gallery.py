"""All figures: which there are, what to look for in each, and how they become files."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import matplotlib

matplotlib.use("Agg")  # files only, also where there is no screen
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from analysis import figures, style
from analysis.tables import Group


@dataclass(frozen=True)
class Kind:
    """A figure: its title, what to look for in it, the function that draws it, inches a group, which groups have it."""

    title: str
    caption: str
    draw: Callable[[Figure, list[Group]], None]
    height: float
    has: Callable[[Group], bool]


KINDS = {
    "lr_range": Kind(
        "Learning-rate range test",
        "The loss while the learning rate grows. The dashed line is the rate that was taken, where the loss falls "
        "fastest; further right it turns and then diverges.",
        figures.draw_lr_range,
        3.4,
        lambda group: not group.tables["lr_range"].empty,
    ),
    "training": Kind(
        "Loss and accuracy",
        "Whether the network has fitted its training set (collapse is a matter of the epochs after that), and how far "
        "the test set stays behind.",
        figures.draw_training,
        3.6,
        lambda group: not group.tables["epochs"].empty,
    ),
    "nc1": Kind(
        "Neural collapse over epochs",
        "NC1, the scatter within the classes over that between them, of every layer: where a curve falls, the samples "
        "of a class draw together. A test curve that levels off while that of the training set goes on falling is a "
        "collapse that does not generalise. Mean and band are those of the logarithm.",
        figures.draw_nc1,
        3.4,
        lambda group: not group.tables["nc1"].empty,
    ),
    "depth": Kind(
        "Neural collapse by depth",
        "The law of data separation (He & Su, PNAS 2023): in a trained network the logarithm of NC1 falls along a "
        "straight line with depth. The legend has the factor by which NC1 changes from a layer to the next, by the "
        "dashed line fitted to the logarithm, and the correlation of the logarithm with depth: -1 is the law exactly.",
        figures.draw_depth,
        3.8,
        lambda group: not group.tables["nc1"].empty,
    ),
    "information": Kind(
        "Decodable information",
        "Minimality is what decoders can tell of which sample of its class an encoding came from, sufficiency what "
        "they can tell of the class. A layer compresses where minimality falls while sufficiency stays. The dashed "
        "line is the input itself. Both are understated where the decoders had not settled: see the last figure.",
        figures.draw_information,
        4.8,
        lambda group: not group.tables["dib"].empty,
    ),
    "plane": Kind(
        "Information plane",
        "A track for each encoder, from the first epoch along the arrow to the last, a large marker. Up is fitting, "
        "left is compression: a track that rises and then turns left compresses after it has fitted.",
        figures.draw_plane,
        3.6,
        lambda group: not group.tables["dib"].empty,
    ),
    "plane_by_epoch": Kind(
        "Information plane by epoch",
        "The picture of Shwartz-Ziv & Tishby (2017), with decodable information in place of binned mutual information: "
        "a line joins the layers of an epoch, the input and shallow layers to the right. In theirs the lines rise in "
        "the early epochs and then move left.",
        figures.draw_plane_by_epoch,
        3.8,
        lambda group: not group.tables["dib"].empty and group.hparams[0]["data"] == "SZT",
    ),
    "gap": Kind(
        "Generalisation and compression",
        "Up is the generalisation gap, test loss - train loss, across the same difference of NC1 and of minimality: a "
        "track for each layer, from the first epoch along the arrow to the last, a large marker. Tracks that keep to "
        "a rising line say that the two go together. The test set is smaller: its labelings have fewer digits and its "
        "decoders take fewer steps, which moves minimality by itself.",
        figures.draw_gap,
        3.6,
        lambda group: bool(figures.gaps(group)),
    ),
    "drop": Kind(
        "How far the decoders had settled",
        "How much the training loss of DIB's decoders still fell over the last tenth of their epochs. What is far "
        "above 0 was cut short, and its information is understated by more than that. Linear below 0.001 bits.",
        figures.draw_drop,
        4.8,
        lambda group: not group.tables["dib"].empty,
    ),
}


def pictures(groups: list[Group], formats: tuple[str, ...]) -> Iterator[tuple[str, list[bytes]]]:
    """Every figure that these runs have, by name, in these formats; a process for each core draws them."""
    with ProcessPoolExecutor() as pool:
        files = pool.map(partial(picture, groups=groups, formats=formats), names(groups))
        yield from zip(names(groups), files, strict=True)


def names(groups: list[Group]) -> list[str]:
    """The figures that any of the groups has."""
    return [name for name, kind in KINDS.items() if any(map(kind.has, groups))]


def picture(name: str, groups: list[Group], formats: tuple[str, ...]) -> list[bytes]:
    """The figure of that name as a file of each format."""
    files = [BytesIO() for _ in formats]
    with plt.rc_context(style.STYLE):
        fig = figure(name, groups)
        for file, each in zip(files, formats, strict=True):
            fig.savefig(file, format=each)
        plt.close(fig)
    return [file.getvalue() for file in files]


def figure(name: str, groups: list[Group]) -> Figure:
    """The figure of that name, of the groups that have it, laid out once for all formats."""
    kind = KINDS[name]
    groups = [group for group in groups if kind.has(group)]
    fig = plt.figure(figsize=size(kind, groups))
    fig.suptitle(kind.title if len(groups) > 1 else f"{kind.title}: {groups[0].label}")
    kind.draw(fig, groups)
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")
    return fig


def size(kind: Kind, groups: list[Group]) -> tuple[float, float]:
    """Width and height in inches: a strip for each group, but for the figure that has all in one."""
    strips = 1 if kind.draw is figures.draw_training else len(groups)
    long = any(len(group.layers) > style.MANY for group in groups)
    return style.WIDTH + 1.4 * long, 0.3 + kind.height * strips
