"""Pictures of results, drawn without a display and without any state of pyplot's."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vssl_dist.text import printable

_SIDE = 3.6
_DPI = 120
Curve = tuple[Sequence[float], Sequence[float]]


def literal(text: str) -> str:
    """Text that matplotlib draws as it stands: names of others may be half a formula.

    >>> literal("a$b$\\n")
    'a\\\\$b\\\\$\\\\n'
    """
    return printable(text).replace("$", "\\$")


def page(title: str, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with so many panels in a row."""
    figure = Figure(figsize=(_SIDE * panels + 1, _SIDE), layout="constrained")
    figure.suptitle(literal(title))
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def lines(
    axes: Axes, curves: Mapping[str, Any], *, x: str, y: str, log: bool = False, marker: str = "."
) -> None:
    """Draw curves, ``(x values, y values)`` by their labels.

    Args:
        axes: Where to draw.
        curves: What to draw; a legend appears where there are several.
        x, y: Names of the axes.
        log: Whether the x axis is logarithmic.
        marker: Of the points, ``""`` for none.
    """
    for label, (horizontal, vertical) in curves.items():
        axes.plot(horizontal, vertical, marker=marker, label=literal(label))
    axes.set(xlabel=literal(x), ylabel=literal(y), xscale="log" if log else "linear")
    if len(curves) > 1:
        axes.legend(fontsize="small")


def ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label the x axis at these values and nowhere else."""
    axes.set_xticks(list(values), labels=[f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes for the same figure."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
