"""The progress bar of the data programs: count, rate and time left, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vssl_dist.bars import WholeProgress, screen
from vssl_dist.text import printable


class _Rate(ProgressColumn):
    """Samples per second of late."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f}/s")


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
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
