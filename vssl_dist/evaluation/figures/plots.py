"""Pictures of results, drawn without a display and without any state of pyplot's."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from vssl_dist.text import printable

_SIDE = 3.6
_DPI = 120
Values = Sequence[float] | NDArray[np.float64]
Curve = tuple[Values, Values]
"""The x values and the y values of a line."""


def literal(text: str) -> str:
    """Escape text so that matplotlib draws it as it stands: a name may be half a formula.

    >>> literal("a$b$\\n")
    'a\\\\$b\\\\$\\\\n'
    """
    return printable(text).replace("$", "\\$")


def empty_figure(title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """Make an empty figure with so many panels in a row."""
    # A Figure of its own, not pyplot's: nothing is registered, and no display is asked for.
    figure = Figure(figsize=(_SIDE * panels + 1, _SIDE), layout="constrained")
    figure.suptitle(literal(title))
    return figure, [figure.add_subplot(1, panels, index + 1) for index in range(panels)]


def draw_lines(
    axes: Axes,
    curves: Mapping[str, Curve],
    *,
    x: str,
    y: str,
    log: bool = False,
    marker: str = ".",
) -> None:
    """Draw curves, ``(x values, y values)`` by their labels.

    Args:
        axes: Where to draw.
        curves: Lines by their labels; a legend appears where there are several.
        x, y: Names of the axes.
        log: Whether the x axis is logarithmic.
        marker: Marker of the points, ``""`` for none.
    """
    for label, (horizontal, vertical) in curves.items():
        axes.plot(horizontal, vertical, marker=marker, label=literal(label))
    axes.set(xlabel=literal(x), ylabel=literal(y), xscale="log" if log else "linear")
    if len(curves) > 1:
        axes.legend(fontsize="small")


def set_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label the x axis at these values and nowhere else."""
    axes.set_xticks(list(values), labels=[f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def png(figure: Figure) -> bytes:
    """Render a figure to a PNG file, the same bytes for the same figure."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
