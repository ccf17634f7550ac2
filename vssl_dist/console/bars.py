"""Progress bars whose figures are whole on any screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from vssl_dist.text import printable

MIN_BAR_WIDTH = 10
"""Smallest width in cells of a bar that can still be read."""
_FALLBACK_WIDTH = 80


def make_console(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Make a console, 80 cells wide where ``COLUMNS`` is 0, as some launchers leave it."""
    console = Console(stderr=stderr, soft_wrap=soft_wrap)
    if not console.width:
        console.width = _FALLBACK_WIDTH
    return console


class WholeProgress(Progress):
    """A `Progress` that cuts no figure: a narrow screen costs the bar, then the columns."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Lay out the visible tasks, as a table or, where it is too wide, as words."""
        visible_tasks = [task for task in tasks if task.visible]
        if not visible_tasks:  # also when a Progress is built, which has no console by then
            return super().make_tasks_table(visible_tasks)
        is_bar_column = [isinstance(column, BarColumn) for column in self.columns]
        cell_rows = [
            [c(task) if callable(c) else c.format(task=task) for c in self.columns]
            for task in visible_tasks
        ]
        column_widths = [
            max((self.console.measure(cell).maximum for cell in cells), default=0)
            for is_bar, *cells in zip(is_bar_column, *cell_rows, strict=True)
            if not is_bar
        ]
        if sum(column_widths) + len(column_widths) + MIN_BAR_WIDTH > self.console.width:
            return self._as_words(is_bar_column, cell_rows)
        grid_columns = [Column(no_wrap=not is_bar) for is_bar in is_bar_column]
        table = Table.grid(*grid_columns, padding=(0, 1), expand=self.expand)
        for cell_row in cell_rows:
            table.add_row(*cell_row)
        return table

    def _as_words(
        self, is_bar: Sequence[bool], cell_rows: Sequence[Sequence[RenderableType]]
    ) -> Table:
        """Lay out each row without its bar, as a sentence that is broken between words."""
        table = Table.grid(Column(overflow="fold"), expand=self.expand)
        for cell_row in cell_rows:
            word_cells = (
                cell for is_bar_cell, cell in zip(is_bar, cell_row, strict=True) if not is_bar_cell
            )
            word_texts = (
                word if isinstance(word, Text) else Text(str(word)) for word in word_cells
            )
            table.add_row(Text(" ").join(text for text in word_texts if text))
        return table


def make_progress_bar() -> Progress:
    """Make a progress bar that is drawn on a terminal only."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    return WholeProgress(
        *columns,
        TimeRemainingColumn(),
        console=make_console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


class _SampleRateColumn(ProgressColumn):
    """Shows the present speed in samples per second."""

    def render(self, task: Task) -> Text:
        samples_per_s = task.finished_speed or task.speed
        return Text("" if samples_per_s is None else f"{samples_per_s:,.0f}/s")


@contextmanager
def show_sample_bar(title: str, sample_count: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; call what it yields with each number of samples done.

    On anything but a terminal only the last state is printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _SampleRateColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with WholeProgress(*columns, console=make_console(stderr=True)) as progress:
        task = progress.add_task(printable(title), total=sample_count)
        yield lambda samples: progress.advance(task, samples)
