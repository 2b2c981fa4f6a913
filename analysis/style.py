"""How every figure looks: sizes, colours, markers, legends."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

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
MANY = 10  # names, from which on a legend has two columns

# Dark to light, also in grey; without the yellow and the light greens, which are faint on paper.
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.78, 256)))
MARKERS = "osD^v<>PphX8d"
DASHES = {"train": "-", "test": "--"}


def colours(names: list) -> dict[str, dict]:
    """A colour and a marker for each name in order: the same for a layer in every figure, if all layers are named."""
    return {
        name: {"color": colour, "marker": MARKERS[i % len(MARKERS)]}
        for i, (name, colour) in enumerate(zip(names, COLOURS(np.linspace(0, 1, len(names))), strict=True))
    }


def epochs(last: int) -> LogNorm:
    """The norm that gives epochs their colours: early ones, when most happens, are told apart too."""
    return LogNorm(1, max(2, last))


def thin(count: int) -> int:
    """Every how many points a marker stands, so that long lines stay lines."""
    return max(1, count // 15)


def whole(axis: Axes) -> None:
    """Ticks at whole epochs."""
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def legend(fig: FigureBase, axis: Axes, title: str) -> None:
    """The names in one panel, beside all of them; in two columns where they are many."""
    handles, names = axis.get_legend_handles_labels()
    columns = {"ncols": 2, "columnspacing": 1} if len(names) > MANY else {}
    fig.legend(handles, names, loc="outside right center", title=title, alignment="left", **columns)
