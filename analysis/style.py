"""Set how every figure looks: sizes, colours, markers, axes and legends."""

from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, ListedColormap
from matplotlib.figure import FigureBase
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "pdf.fonttype": 42,  # fonts are embedded as text, which publishers require
    "svg.fonttype": "path",  # a page looks the same where the font is missing
    "font.size": 10,
    "legend.fontsize": "small",
    "legend.title_fontsize": "small",
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}
WIDTH = 8.4  # inches, of a figure of two panels side by side
MIN_AXIS_BITS = 0.1  # shortest range of an information axis
MANY = 10  # number of entries above which a legend has two columns


def make_colormap(name: str, lightest: float) -> ListedColormap:
    """Return a colour map that gets steadily lighter, without its lightest colours, which are hard to see on paper."""
    return ListedColormap(matplotlib.colormaps[name](np.linspace(0, lightest, 256)))


LAYERS, EPOCHS = make_colormap("viridis", 0.78), make_colormap("inferno", 0.75)
MARKERS = "osD^v<>Pph8d"
INPUT = {"color": "black", "marker": "X"}
CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5}  # layers whose class means have a deficient rank
HOLLOW = {"markersize": 4, "markerfacecolor": "white", "markeredgewidth": 0.6}
DASHES = {"train": "-", "test": "--"}
CONTROLS = {  # by the columns of the table information
    "shuffled": {"label": "shuffled labels", "linestyle": ":", "marker": "_"},
    "held_out": {"label": "held-out samples", "linestyle": "-.", "marker": "1"},
}
THIN = {"linewidth": 0.8, "zorder": 1.5}  # below the curves
CEILING = {"color": "0.6", **THIN}
BARS = {"linestyle": "", "elinewidth": 0.8, "capsize": 2.5, "zorder": 3}  # of axis.errorbar
BAR = {  # of their legend entry
    "marker": Path([(-0.4, -1), (0.4, -1), (0, -1), (0, 1), (-0.4, 1), (0.4, 1)]),
    "markersize": 10,
    "markerfacecolor": "none",
    "markeredgewidth": 0.8,
}


def assign_looks(names: Sequence) -> dict[str, dict]:
    """Return a colour and a marker for each name in order.

    If `names` are all layers of a network, a layer has the same colour and marker in every figure.
    """
    return {
        name: {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, colour) in enumerate(zip(names, LAYERS(np.linspace(0, 1, len(names))), strict=True))
    }


def make_epoch_norm(last: int) -> FuncNorm:
    """Return the norm of the colours of epochs. It is logarithmic, so that the colours of early epochs differ."""
    return FuncNorm((np.log1p, np.expm1), 0, max(2, last))


def get_epoch_colour(epoch: ArrayLike, last: int) -> np.ndarray:
    """Return the colour of one epoch or the colours of several."""
    return EPOCHS(make_epoch_norm(last)(epoch))


def escape_dollars(text: str) -> str:
    """Return a text in which dollars do not start a formula."""
    return text.replace("$", r"\$")


def compute_stride(count: int) -> int:
    """Return the distance between the markers of a line with `count` points, so that long lines stay visible."""
    return max(1, count // 15)


def format_epoch_axis(axis: Axes, log: bool) -> None:
    """Put the ticks at whole epochs. On a log axis, epoch 0 is next to epoch 1."""
    if log:
        axis.set_xscale("symlog", linthresh=1, linscale=0.4)
        low, high = axis.get_xlim()
        whole = MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]).tick_values(low, high)
        for ticks in ([10**power for power in range(7)], [n * 10**p for p in range(7) for n in (1, 2, 3, 5, 7)], whole):
            axis.xaxis.set_major_locator(FixedLocator([0, *ticks]))
            if sum(low <= tick <= high for tick in (0, *ticks)) > 2:
                break
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_locator(NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))


def format_steps_axis(axis: Axes, steps: ArrayLike) -> None:
    """Make the axis logarithmic, with plain numbers at the given steps."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(np.unique(steps)))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_locator(NullLocator())


def draw_zero_line(axis: Axes) -> None:
    """Draw a horizontal line at 0."""
    axis.axhline(0, color="0.4", linewidth=0.8)


def widen_axis(axis: Axes, direction: str) -> None:
    """Make the x or y axis at least MIN_AXIS_BITS long, so that rounding errors do not look like information."""
    low, high = getattr(axis, f"get_{direction}lim")()
    more = max(0, MIN_AXIS_BITS - (high - low)) / 2
    getattr(axis, f"set_{direction}lim")(low - more, high + more)


def extend_axis(axis: Axes, direction: str, values: Iterable[float]) -> None:
    """Make the x or y axis longer, if necessary, so that it shows these values, with a margin at both ends."""
    limits, values = getattr(axis, f"get_{direction}lim")(), list(values)
    low, high = min([*limits, *values]), max([*limits, *values])
    if (low, high) != limits:
        margin = 0.05 * (high - low)
        getattr(axis, f"set_{direction}lim")(low - margin, high + margin)


def limit_ticks(axis: Axes) -> None:
    """Reduce the number of ticks on the x axis, to leave room for long numbers."""
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def add_legend(fig: FigureBase, axis: Axes, title: str) -> None:
    """Add the names of one panel beside all panels, in two columns if there are many."""
    handles, names = axis.get_legend_handles_labels()
    columns = {"ncols": 2, "columnspacing": 1} if len(names) > MANY else {}
    fig.legend(handles, names, loc="outside right center", title=title, alignment="left", **columns)


def add_key(fig: FigureBase, entries: list[Artist]) -> None:
    """Add a legend with these entries below all panels, if there are any."""
    if entries:
        fig.legend(handles=entries, loc="outside lower center", ncols=len(entries))
