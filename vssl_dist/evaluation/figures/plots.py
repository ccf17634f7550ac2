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

_PANEL_SIDE_INCHES = 3.6
_PLOT_DPI = 120
CurveValues = Sequence[float] | NDArray[np.float64]
Curve = tuple[CurveValues, CurveValues]
"""The x values and the y values of a line."""


def escape_mathtext(text: str) -> str:
    """Escape text so that matplotlib draws it as it stands: a name may be half a formula.

    >>> escape_mathtext("a$b$\\n")
    'a\\\\$b\\\\$\\\\n'
    """
    return printable(text).replace("$", "\\$")


def make_empty_figure(title: str, panel_count: int = 1) -> tuple[Figure, list[Axes]]:
    """Make an empty figure with so many panels in a row."""
    # A Figure of its own, not pyplot's: nothing is registered, and no display is asked for.
    figure = Figure(
        figsize=(_PANEL_SIDE_INCHES * panel_count + 1, _PANEL_SIDE_INCHES), layout="constrained"
    )
    figure.suptitle(escape_mathtext(title))
    return figure, [
        figure.add_subplot(1, panel_count, panel_index + 1) for panel_index in range(panel_count)
    ]


def draw_lines(
    axes: Axes,
    curve_by_label: Mapping[str, Curve],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    marker: str = ".",
) -> None:
    """Draw curves, ``(x values, y values)`` by their labels.

    Args:
        axes: Where to draw.
        curve_by_label: Lines by their labels; a legend appears where there are several.
        x_label, y_label: Names of the axes.
        log_x: Whether the x axis is logarithmic.
        marker: Marker of the points, ``""`` for none.
    """
    for label, (x_values, y_values) in curve_by_label.items():
        axes.plot(x_values, y_values, marker=marker, label=escape_mathtext(label))
    axes.set(
        xlabel=escape_mathtext(x_label),
        ylabel=escape_mathtext(y_label),
        xscale="log" if log_x else "linear",
    )
    if len(curve_by_label) > 1:
        axes.legend(fontsize="small")


def set_x_ticks(axes: Axes, values: Sequence[float]) -> None:
    """Label the x axis at these values and nowhere else."""
    axes.set_xticks(list(values), labels=[f"{value:g}" for value in values])
    axes.set_xticks([], minor=True)


def render_png(figure: Figure) -> bytes:
    """Render a figure to a PNG file, the same bytes for the same figure."""
    png_buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        figure.savefig(png_buffer, format="png", dpi=_PLOT_DPI)
    return png_buffer.getvalue()
