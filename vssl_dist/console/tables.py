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
"""What a line is about, and its figures by their names."""
_WIDEST = 9
"""More figures than this are rows: a long row is hard to read on any screen."""


class _Grid(NamedTuple):
    """What stands where: the corner, the heads of the columns, and rows that begin with a name."""

    corner: str
    heads: list[str]
    rows: list[list[str]]

    def widths(self) -> list[int]:
        """Cells of a terminal that each column takes with its padding and one border."""
        columns = zip([self.corner, *self.heads], *self.rows, strict=True)
        return [max(map(cell_len, column)) + 3 for column in columns]

    def parts(self, width: int) -> list[_Grid] | None:
        """The grid, or several with some of the columns each, that fit; None: not even one does."""
        name, *widths = self.widths()
        left, groups = 0, list[list[int]]()
        for number, taken in enumerate(widths):
            if name + taken + 1 > width:
                return None
            if not groups or taken > left:
                groups.append([])
                left = width - name - 1
            groups[-1].append(number)
            left -= taken
        return [self._some(group) for group in groups]

    def _some(self, columns: Sequence[int]) -> _Grid:
        rows = [[row[0], *(row[1 + number] for number in columns)] for row in self.rows]
        return _Grid(self.corner, [self.heads[number] for number in columns], rows)

    def table(self) -> Table:
        shown = Table()
        shown.add_column(Text(self.corner), no_wrap=True)
        for head in self.heads:
            shown.add_column(Text(head), justify="right", no_wrap=True)
        for row in self.rows:
            shown.add_row(*map(Text, row))
        return shown


def tables(title: str, lines: Sequence[Line], width: int) -> list[Table]:
    """A row per line and a column per figure, or the other way round where that fits better.

    Whatever bytes a name has, it is one line that any terminal shows.

    Several tables where one would be too wide, none where not even one figure fits beside its
    name.

    Args:
        title: What the figures are, for the corner.
        lines: What to show; a figure that a line lacks is a dash.
        width: Of the screen.
    """
    title, lines = _harmless(title, lines)
    figures = list(dict.fromkeys(figure for _, row in lines for figure in row))
    names = [name for name, _ in lines]
    cells = [[row.get(figure, "-") for figure in figures] for _, row in lines]
    upright = _Grid(title, figures, [[n, *row] for n, row in zip(names, cells, strict=True)])
    turned = _Grid(title, names, [[f, *(row[i] for row in cells)] for i, f in enumerate(figures)])
    preferred = [turned, upright] if len(figures) > _WIDEST else [upright, turned]
    found = [parts for grid in preferred if (parts := grid.parts(width)) is not None]
    return [part.table() for part in min(found, key=len, default=[])]


def _harmless(title: str, lines: Sequence[Line]) -> tuple[str, list[Line]]:
    words = [
        (printable(name), {printable(figure): printable(value) for figure, value in row.items()})
        for name, row in lines
    ]
    return printable(title), [(name, row) for name, row in words]


def show(title: str, lines: Sequence[Line], console: Console | None = None) -> None:
    """Print `tables`, or a plain line per figure where the screen is too narrow for them."""
    screen = console or bars.screen()
    fitting = tables(title, lines, screen.width)
    for table in fitting:
        screen.print(table)
    if fitting:
        return
    title, lines = _harmless(title, lines)
    said = [title]
    for name, row in lines:
        said += [name, *(f"  {figure}: {value}" for figure, value in row.items())]
    # Not broken: a line that is too long is the terminal's own affair, and whole in a log.
    screen.print(Text("\n".join(said)), soft_wrap=True)
