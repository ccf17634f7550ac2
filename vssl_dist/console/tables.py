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

TableLine = tuple[str, Mapping[str, str]]
"""The name of a line and its figures by their names."""
_MAX_FIGURE_COLUMNS = 9
"""More figures than this become rows: a long row is hard to read on any screen."""


class _CellGrid(NamedTuple):
    """The cells of a table: its corner, heads of columns, and rows that begin with a name."""

    corner_text: str
    column_heads: list[str]
    named_rows: list[list[str]]

    def column_widths(self) -> list[int]:
        """Return the terminal cells that each column takes with its padding and one border."""
        columns = zip([self.corner_text, *self.column_heads], *self.named_rows, strict=True)
        return [max(map(cell_len, column)) + 3 for column in columns]

    def split_to_fit(self, width: int) -> list[_CellGrid] | None:
        """Split the columns over as many grids as fit the width; None if one is too wide alone."""
        name_width, *widths = self.column_widths()
        left_width, column_groups = 0, list[list[int]]()
        for column_index, column_width in enumerate(widths):
            if name_width + column_width + 1 > width:
                return None
            if not column_groups or column_width > left_width:
                column_groups.append([])
                left_width = width - name_width - 1
            column_groups[-1].append(column_index)
            left_width -= column_width
        return [self._with_columns(column_group) for column_group in column_groups]

    def _with_columns(self, column_indices: Sequence[int]) -> _CellGrid:
        rows = [
            [row[0], *(row[1 + column_index] for column_index in column_indices)]
            for row in self.named_rows
        ]
        return _CellGrid(
            self.corner_text,
            [self.column_heads[column_index] for column_index in column_indices],
            rows,
        )

    def as_rich_table(self) -> Table:
        table = Table()
        table.add_column(Text(self.corner_text), no_wrap=True)
        for head in self.column_heads:
            table.add_column(Text(head), justify="right", no_wrap=True)
        for row in self.named_rows:
            table.add_row(*map(Text, row))
        return table


def make_tables(title: str, lines: Sequence[TableLine], width: int) -> list[Table]:
    """Make tables with a row per line and a column per figure, or the other way round if better.

    They are several where one would be too wide, and none where not even one figure fits beside
    its name.  Whatever bytes a name has, it is one line that any terminal shows.

    Args:
        title: What the figures are, for the corner.
        lines: What to show; a figure that a line lacks is a dash.
        width: Cells of the screen.
    """
    title, lines = _printable_lines(title, lines)
    figure_names = list(dict.fromkeys(figure for _, row in lines for figure in row))
    line_names = [name for name, _ in lines]
    cell_rows = [[row.get(figure, "-") for figure in figure_names] for _, row in lines]
    lines_as_rows = _CellGrid(
        title,
        figure_names,
        [[line_name, *row] for line_name, row in zip(line_names, cell_rows, strict=True)],
    )
    figures_as_rows = _CellGrid(
        title,
        line_names,
        [
            [figure_name, *(row[figure_index] for row in cell_rows)]
            for figure_index, figure_name in enumerate(figure_names)
        ],
    )
    grids_by_preference = (
        [figures_as_rows, lines_as_rows]
        if len(figure_names) > _MAX_FIGURE_COLUMNS
        else [lines_as_rows, figures_as_rows]
    )
    fitting_splits = [
        grids for grid in grids_by_preference if (grids := grid.split_to_fit(width)) is not None
    ]
    return [grid.as_rich_table() for grid in min(fitting_splits, key=len, default=[])]


def _printable_lines(title: str, lines: Sequence[TableLine]) -> tuple[str, list[TableLine]]:
    printable_lines = [
        (
            printable(name),
            {printable(figure): printable(value) for figure, value in row.items()},
        )
        for name, row in lines
    ]
    return printable(title), [(name, row) for name, row in printable_lines]


def print_tables(title: str, lines: Sequence[TableLine], console: Console | None = None) -> None:
    """Print the tables, or a plain line per figure where the screen is too narrow for them."""
    screen = console or bars.make_console()
    fitting_tables = make_tables(title, lines, screen.width)
    for table in fitting_tables:
        screen.print(table)
    if fitting_tables:
        return
    title, lines = _printable_lines(title, lines)
    text_lines = [title]
    for name, row in lines:
        text_lines += [name, *(f"  {figure}: {value}" for figure, value in row.items())]
    # Not broken: a line that is too long is the terminal's own affair, and whole in a log.
    screen.print(Text("\n".join(text_lines)), soft_wrap=True)
