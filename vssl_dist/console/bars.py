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

SHORTEST = 10
"""Smallest width in cells of a bar that can still be read."""
_USUAL_WIDTH = 80


def screen(*, stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Make a console, 80 cells wide where ``COLUMNS`` is 0, as some launchers leave it."""
    console = Console(stderr=stderr, soft_wrap=soft_wrap)
    if not console.width:
        console.width = _USUAL_WIDTH
    return console


class WholeProgress(Progress):
    """A `Progress` that cuts no figure: a narrow screen costs the bar, then the columns."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """Lay out the visible tasks, as a table or, where it is too wide, as words."""
        visible = [task for task in tasks if task.visible]
        if not visible:  # also when a Progress is built, which has no console by then
            return super().make_tasks_table(visible)
        is_bar = [isinstance(column, BarColumn) for column in self.columns]
        rows = [
            [c(task) if callable(c) else c.format(task=task) for c in self.columns]
            for task in visible
        ]
        widths = [
            max((self.console.measure(cell).maximum for cell in cells), default=0)
            for bar, *cells in zip(is_bar, *rows, strict=True)
            if not bar
        ]
        if sum(widths) + len(widths) + SHORTEST > self.console.width:
            return self._as_words(is_bar, rows)
        heads = [Column(no_wrap=not bar) for bar in is_bar]
        table = Table.grid(*heads, padding=(0, 1), expand=self.expand)
        for row in rows:
            table.add_row(*row)
        return table

    def _as_words(self, is_bar: Sequence[bool], rows: Sequence[Sequence[RenderableType]]) -> Table:
        """Lay out each row without its bar, as a sentence that is broken between words."""
        table = Table.grid(Column(overflow="fold"), expand=self.expand)
        for row in rows:
            words = (cell for bar, cell in zip(is_bar, row, strict=True) if not bar)
            texts = (word if isinstance(word, Text) else Text(str(word)) for word in words)
            table.add_row(Text(" ").join(text for text in texts if text))
        return table


def progress_bar() -> Progress:
    """Make a progress bar that is drawn on a terminal only."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()
    return WholeProgress(
        *columns,
        TimeRemainingColumn(),
        console=screen(stderr=True),
        disable=not sys.stderr.isatty(),
    )


class _Rate(ProgressColumn):
    """Shows the present speed in samples per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextmanager
def sample_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; call what it yields with each number of samples done.

    On anything but a terminal only the last state is printed.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with WholeProgress(*columns, console=screen(stderr=True)) as progress:
        task = progress.add_task(printable(title), total=total)
        yield lambda samples: progress.advance(task, samples)
