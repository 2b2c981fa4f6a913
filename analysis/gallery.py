"""List all figures with their captions, and render them as files."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO

import matplotlib.style
from matplotlib.figure import Figure

from analysis import figures, style
from analysis.tables import SUBOPTIMAL_BITS, Group


@dataclass(frozen=True)
class Kind:
    """A kind of figure.

    Attributes:
        title: of the figure.
        caption: what it shows and how to read it.
        draw: draws it.
        has: whether a group has it.
        height: in inches, of a strip.
        strips: whether each group has a strip of its own.
    """

    title: str
    caption: str
    draw: Callable[[Figure, list[Group]], None]
    has: Callable[[Group], bool]
    height: float
    strips: bool = True


def has_rows(table: str) -> Callable[[Group], bool]:
    """Return a function that says whether this table of a group has rows."""
    return lambda group: not group.tables[table].empty


KINDS = {
    "lr_range": Kind(
        title="Learning-rate range test",
        caption=(
            "The loss while the learning rate grows. The dashed line is the chosen rate, at which the loss falls "
            "fastest. At higher rates the loss rises and then diverges."
        ),
        draw=figures.draw_lr_range,
        has=has_rows("lr_range"),
        height=3.4,
    ),
    "training": Kind(
        title="Loss and accuracy",
        caption=(
            "Loss and accuracy on both sets. They show in which epoch the network has fitted its training set, and how "
            "far the test set stays behind. Neural collapse is expected in the epochs after that."
        ),
        draw=figures.draw_training,
        has=has_rows("epochs"),
        height=3.6,
        strips=False,
    ),
    "nc1": Kind(
        title="Neural collapse over epochs",
        caption=(
            "NC1, the scatter within the classes relative to that between them, of every layer. Where a curve falls, "
            "the samples of a class come closer together. If the test curve levels off while the training curve still "
            "falls, the collapse does not generalise. The dashed line is the input. A cross marks a layer whose class "
            "means have a rank below min(d, C - 1) for at least one seed. Its NC1 leaves out the directions that they "
            "lost and the scatter along them. It is lower, but this is not collapse. In nc1.csv, kept is the smallest "
            "singular value that counts, and dropped the largest that does not. Mean and band over seeds are those of "
            "the logarithm."
        ),
        draw=figures.draw_nc1,
        has=has_rows("nc1"),
        height=3.4,
    ),
    "depth": Kind(
        title="Neural collapse by depth",
        caption=(
            "The law of data separation (He & Su, PNAS 2023) says that in a trained network the logarithm of NC1 falls "
            "along a straight line with depth. The dashed line is fitted to the logarithm. The legend gives the factor "
            "by which it changes NC1 from one layer to the next, and the correlation with depth. At -1 the law is "
            "exact. With several seeds, the mean of their lines is shown. The input (a star, at depth 0) and crosses "
            "are not in the fit. A cross marks a layer whose class means have a rank below min(d, C - 1) for at least "
            "one seed. Its NC1 leaves out the directions that they lost. It is lower, but this is not collapse."
        ),
        draw=figures.draw_depth,
        has=has_rows("nc1"),
        height=3.8,
    ),
    "law": Kind(
        title="The law of data separation over epochs",
        caption=(
            "The lines of the figure by depth, one for each epoch: the slope of the logarithm of NC1, and its "
            "correlation with depth. A slope of -0.7 halves NC1 from one layer to the next. Where the correlation is "
            "close to -1, all layers contribute equally. If it is not so in epoch 0, the law is a result of training. "
            "Layers of short rank and the input are not in the lines. The band is the standard deviation over seeds."
        ),
        draw=figures.draw_law,
        has=figures.has_law,
        height=3.4,
    ),
    "information": Kind(
        title="Decodable information",
        caption=(
            "Minimality is the information about which sample of its class an encoding came from, sufficiency that "
            "about the class, as far as decoders can use it. A layer compresses where minimality falls while "
            "sufficiency stays. The dashed line is the input. Lines are the information known to be decodable. A "
            "hollow marker is what the layer's own probes (decoders trained on its frozen encodings) reached, if over "
            f"{SUBOPTIMAL_BITS:g} bits less: probes known suboptimal, not information that the network lost. The "
            "legend counts markers too far below to be shown. Lines are below 0 only if decoders cannot output "
            "constants (a last layer without bias)."
        ),
        draw=figures.draw_information,
        has=has_rows("dib"),
        height=4.8,
    ),
    "plane": Kind(
        title="Information plane",
        caption=(
            "A track for each encoder, through epochs spaced evenly on a log scale. The arrow points from early to "
            "late epochs, and the large marker is the last one. Small markers around it are the seeds. An encoder that "
            "moves up fits, and one that moves left compresses. A track that first rises and then turns left "
            "compresses after it has fitted."
        ),
        draw=figures.draw_plane,
        has=has_rows("dib"),
        height=3.6,
    ),
    "plane_by_epoch": Kind(
        title="Information plane by epoch",
        caption=(
            "The figure of Shwartz-Ziv & Tishby (2017), with decodable information in place of binned mutual "
            "information. A line joins the layers of an epoch, with the input and shallow layers to the right. In "
            "their figure the lines rise in the early epochs and then move left."
        ),
        draw=figures.draw_plane_by_epoch,
        has=lambda group: has_rows("dib")(group) and group.hparams[0]["data"] == "SZT",
        height=3.8,
    ),
    "gap": Kind(
        title="Generalisation and compression",
        caption=(
            "The vertical axis is the generalisation gap, test loss - train loss. The horizontal axes are the same "
            "difference of NC1 and of minimality. There is a track for each layer, as in the information plane. If the "
            "tracks follow a rising line, the two gaps grow together. Minimality is information about the samples at "
            "hand, which grows as their number decreases. It is compared only if both sets were measured on the same "
            "number of samples. An axis of NC1 that spans decades is linear between its ticks next to 0. A track of "
            "NC1 ends in a cross if the class means of the layer have a rank below min(d, C - 1) on either set. Their "
            "NC1 leaves out the directions that were lost."
        ),
        draw=figures.draw_gap,
        has=figures.has_gap,
        height=3.6,
    ),
    "convergence": Kind(
        title="Convergence of decodable information",
        caption=(
            "The information that is known to be decodable after the last epoch, by probes that were trained for more "
            "and more steps. Where a curve is flat, more steps find nothing more: choose --dib-epochs accordingly. "
            "Where it still rises, the other figures understate the information. As there, a hollow marker is a probe "
            "that is known suboptimal: the network did not lose the information. Markers far below are left out, and "
            "the legend gives their number."
        ),
        draw=figures.draw_convergence,
        has=has_rows("convergence_information"),
        height=4.8,
    ),
}


def render_figures(groups: list[Group], formats: tuple[str, ...]) -> Iterator[tuple[str, list[bytes]]]:
    """Yield (name, a file for each format) of every figure that the groups have. One process per core renders them."""
    names = list_figures(groups)
    with ProcessPoolExecutor() as pool:
        yield from zip(names, pool.map(partial(render_figure, groups=groups, formats=formats), names), strict=True)


def list_figures(groups: list[Group]) -> list[str]:
    """Return the names of the figures that at least one of the groups has."""
    return [name for name, kind in KINDS.items() if any(map(kind.has, groups))]


def render_figure(name: str, groups: list[Group], formats: tuple[str, ...]) -> list[bytes]:
    """Return the figure of that name as a file for each format."""
    files = [BytesIO() for _ in formats]
    with matplotlib.style.context(style.STYLE, after_reset=True):  # a matplotlibrc is ignored
        fig = draw_figure(name, groups)
        for file, each in zip(files, formats, strict=True):
            fig.savefig(file, format=each)
    return [file.getvalue() for file in files]


def draw_figure(name: str, groups: list[Group]) -> Figure:
    """Return the figure of that name with the groups that have it. Its layout is the same in all formats."""
    kind = KINDS[name]
    groups = [group for group in groups if kind.has(group)]
    fig = Figure(figsize=compute_size(kind, groups))
    fig.suptitle(kind.title if len(groups) > 1 else f"{kind.title}: {style.escape_dollars(groups[0].label)}")
    kind.draw(fig, groups)
    fig.get_layout_engine().execute(fig)
    fig.set_layout_engine("none")
    return fig


def compute_size(kind: Kind, groups: list[Group]) -> tuple[float, float]:
    """Return width and height of a figure in inches."""
    long = any(len(group.layers) > style.MANY for group in groups)
    return style.WIDTH + 1.4 * long, 0.3 + kind.height * (len(groups) if kind.strips else 1)
