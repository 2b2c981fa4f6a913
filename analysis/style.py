"""How every figure looks: sizes, colours, markers, legends."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, ListedColormap
from matplotlib.figure import FigureBase
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "pdf.fonttype": 42,  # fonts embedded as text, as publishers ask
    "svg.fonttype": "path",  # a page is drawn alike where the font is missing
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
LEAST_BITS = 0.1  # of an axis
MANY = 10  # names, from which on a legend has two columns


def shades(name: str, lightest: float) -> ListedColormap:
    """A colour map from dark to light, also in grey, up to where it gets faint on paper."""
    return ListedColormap(matplotlib.colormaps[name](np.linspace(0, lightest, 256)))


LAYERS, EPOCHS = shades("viridis", 0.78), shades("inferno", 0.75)
MARKERS = "osD^v<>Pph8d"
INPUT = {"color": "black", "marker": "X"}
CROSS = {"marker": "x", "markersize": 6, "markeredgewidth": 1.5}  # NC1 of a layer whose class means lost a direction
HOLLOW = {"markersize": 4, "markerfacecolor": "white", "markeredgewidth": 0.6}
DASHES = {"train": "-", "test": "--"}


def colours(names: list) -> dict[str, dict]:
    """A colour and a marker for each name in order: the same for a layer in every figure, if all layers are named."""
    return {
        name: {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, colour) in enumerate(zip(names, LAYERS(np.linspace(0, 1, len(names))), strict=True))
    }


def epochs(last: int) -> FuncNorm:
    """The norm that gives epochs their colours: early ones, when most happens, are told apart too."""
    return FuncNorm((np.log1p, np.expm1), 0, max(2, last))


def of_epoch(epoch: ArrayLike, last: int) -> np.ndarray:
    """The colour of an epoch, or of several, of so many."""
    return EPOCHS(epochs(last)(epoch))


def plain(text: str) -> str:
    """A name from outside, in which a dollar does not begin a formula."""
    return text.replace("$", r"\$")


def thin(count: int) -> int:
    """Every how many points a marker stands, so that long lines stay lines."""
    return max(1, count // 15)


def epoch_axis(axis: Axes, log: bool) -> None:
    """Ticks at whole epochs; on a log axis, epoch 0 stands beside epoch 1."""
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


def steps(axis: Axes, there: ArrayLike) -> None:
    """A logarithmic axis with plain numbers at the steps that there are."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(FixedLocator(np.unique(there)))
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.xaxis.set_minor_locator(NullLocator())


def zero(axis: Axes) -> None:
    """A line where nothing is left."""
    axis.axhline(0, color="0.4", linewidth=0.8)


def widen(axis: Axes, each: str) -> None:
    """At least so many bits from end to end, so that rounding is not drawn as if it were something."""
    low, high = getattr(axis, f"get_{each}lim")()
    more = max(0, LEAST_BITS - (high - low)) / 2
    getattr(axis, f"set_{each}lim")(low - more, high + more)


def few(axis: Axes) -> None:
    """Ticks across that have room for long numbers."""
    axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def legend(fig: FigureBase, axis: Axes, title: str) -> None:
    """The names in one panel, beside all of them; in two columns where they are many."""
    handles, names = axis.get_legend_handles_labels()
    columns = {"ncols": 2, "columnspacing": 1} if len(names) > MANY else {}
    fig.legend(handles, names, loc="outside right center", title=title, alignment="left", **columns)
