"""Tables for a terminal, a pipe or a log, in which no name and no figure is ever cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vssl_dist.console import bars
from vssl_dist.text import printable

Line = tuple[str, Mapping[str, str]]
"""The name of a line and its figures by their names."""
_MOST_COLUMNS = 9
"""More figures than this become rows: a long row is hard to read on any screen."""


class _Grid(NamedTuple):
    """The cells of a table: its corner, heads of columns, and rows that begin with a name."""

    corner: str
    heads: list[str]
    rows: list[list[str]]

    def widths(self) -> list[int]:
        """Return the terminal cells that each column takes with its padding and one border."""
        columns = zip([self.corner, *self.heads], *self.rows, strict=True)
        return [max(map(cell_len, column)) + 3 for column in columns]

    def split_to_fit(self, width: int) -> list[_Grid] | None:
        """Split the columns over as many grids as fit the width; None if one is too wide alone."""
        name_width, *widths = self.widths()
        left, groups = 0, list[list[int]]()
        for number, column_width in enumerate(widths):
            if name_width + column_width + 1 > width:
                return None
            if not groups or column_width > left:
                groups.append([])
                left = width - name_width - 1
            groups[-1].append(number)
            left -= column_width
        return [self._with_columns(group) for group in groups]

    def _with_columns(self, columns: Sequence[int]) -> _Grid:
        rows = [[row[0], *(row[1 + number] for number in columns)] for row in self.rows]
        return _Grid(self.corner, [self.heads[number] for number in columns], rows)

    def table(self) -> Table:
        table = Table()
        table.add_column(Text(self.corner), no_wrap=True)
        for head in self.heads:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def tables(title: str, lines: Sequence[Line], width: int) -> list[Table]:
    """Make tables with a row per line and a column per figure, or the other way round if better.

    They are several where one would be too wide, and none where not even one figure fits beside
    its name.  Whatever bytes a name has, it is one line that any terminal shows.

    Args:
        title: What the figures are, for the corner.
        lines: What to show; a figure that a line lacks is a dash.
        width: Cells of the screen.
    """
    title, lines = _made_printable(title, lines)
    figures = list(dict.fromkeys(figure for _, row in lines for figure in row))
    names = [name for name, _ in lines]
    cells = [[row.get(figure, "-") for figure in figures] for _, row in lines]
    upright = _Grid(title, figures, [[n, *row] for n, row in zip(names, cells, strict=True)])
    turned = _Grid(title, names, [[f, *(row[i] for row in cells)] for i, f in enumerate(figures)])
    preferred = [turned, upright] if len(figures) > _MOST_COLUMNS else [upright, turned]
    fitting = [grids for grid in preferred if (grids := grid.split_to_fit(width)) is not None]
    return [grid.table() for grid in min(fitting, key=len, default=[])]


def _made_printable(title: str, lines: Sequence[Line]) -> tuple[str, list[Line]]:
    harmless = [
        (printable(name), {printable(figure): printable(value) for figure, value in row.items()})
        for name, row in lines
    ]
    return printable(title), [(name, row) for name, row in harmless]


def show(title: str, lines: Sequence[Line], console: Console | None = None) -> None:
    """Print `tables`, or a plain line per figure where the screen is too narrow for them."""
    screen = console or bars.screen()
    fitting = tables(title, lines, screen.width)
    for table in fitting:
        screen.print(table)
    if fitting:
        return
    title, lines = _made_printable(title, lines)
    text_lines = [title]
    for name, row in lines:
        text_lines += [name, *(f"  {figure}: {value}" for figure, value in row.items())]
    # Not broken: a line that is too long is the terminal's own affair, and whole in a log.
    screen.print(Text("\n".join(text_lines)), soft_wrap=True)
