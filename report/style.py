"""How every picture looks: the same colours for the same things, no frames, nothing cut off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lobra.common.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours (2008), which colour-blind readers tell apart too; without their yellow,
# which is too light for a line on white.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY, BLACK = "#CC79A7", "#E69F00", "#56B4E9", "#000000"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # a curve has its own as well as its own colour
#: What is ours or measured, and what that is compared with.
OURS, COMPARED = BLUE, "#8C8C8C"
#: A bar's or panel's ground: time in which nothing is computed.
GROUND = "#E8E8E8"
#: From light (little) to dark (much), as dark to the colour-blind: matplotlib's cividis, reversed.
SCALE = "cividis_r"

STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.4",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "0.92",
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "lines.linewidth": 1.5,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 150,
}


def draw(path: Path, picture: Callable[[], Figure], format: str | None = None) -> Path:
    """Make a picture in this style, write it in the format, by default of the suffix; return it."""
    import matplotlib

    with matplotlib.rc_context(STYLE), atomic_path(path) as draft:
        picture().savefig(draft, format=format or path.suffix[1:])
    return path


def make_figure(width_in: float, height_in: float) -> Figure:
    """Return an empty figure of a size in inches, in which nothing overlaps."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width_in, height_in), layout="constrained")


def make_axes(width_in: float = 8.0, height_in: float = 4.2) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = make_figure(width_in, height_in)
    return figure, figure.add_subplot()


def curve(number: int) -> dict[str, Any]:
    """Return the colour and the marker of a picture's curve; those of the first seven differ."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
    }


def explain(figure: Figure) -> None:
    """Explain above a figure, once, what its panels show."""
    shown: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(list(shown.values()), list(shown), loc="outside upper left", ncols=3)


def lie_down(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of a picture of horizontal bars, the first on top, with lines across only."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def whole_numbers(axes: Axes) -> None:
    """Count steps along an axis in whole numbers, with room at both ends."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
    axes.margins(x=0.03)


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at most three to a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    first, last = sorted(axis.get_view_interval())
    narrow = last / first < 150
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def shortened(name: str, longest: int) -> str:
    """Return a name of at most so many characters, with its middle left out."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return f"{name[: kept - kept // 2]}…{name[len(name) - kept // 2 :]}"
