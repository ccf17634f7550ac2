"""Progress bars whose figures are whole on any screen."""

from __future__ import annotations

from collections.abc import Iterable

from rich.progress import BarColumn, Progress, Task
from rich.table import Column, Table

SHORTEST = 10
"""Cells of a bar that still says something."""


class WholeProgress(Progress):
    """A `rich.progress.Progress` that gives up its bar, and then its one line, before a figure."""

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        """The lines to show, of the tasks that are visible."""
        visible = [task for task in tasks if task.visible]
        if not visible:  # also when a Progress is built, which has no console by then
            return super().make_tasks_table(visible)
        bars = [isinstance(column, BarColumn) for column in self.columns]
        rows = [
            [c(task) if callable(c) else c.format(task=task) for c in self.columns]
            for task in visible
        ]
        taken = [
            max((self.console.measure(cell).maximum for cell in cells), default=0)
            for bar, *cells in zip(bars, *rows, strict=True)
            if not bar
        ]
        whole = sum(taken) + len(taken) + SHORTEST <= self.console.width
        heads = [Column(no_wrap=whole and not bar, overflow="fold") for bar in bars]
        shown = [number for number, bar in enumerate(bars) if whole or not bar]
        table = Table.grid(*(heads[number] for number in shown), padding=(0, 1), expand=self.expand)
        for row in rows:
            table.add_row(*(row[number] for number in shown))
        return table
