"""How far a run is: one plain line per report, which a terminal turns into a bar."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from rich.cells import cell_len
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from vssl_dist.console.bars import (
    SHORTEST,
    WholeProgress,
    screen,
)
from vssl_dist.logs import terminal_text
from vssl_dist.text import printable, printable_lines

_LINE = re.compile(r"step +(\d+)/(\d+)  (.*)")


@dataclass
class Report:
    """One line about a step: ``step 120/600  loss -1.2345  2541 images/s  0:01:12 left``."""

    step: int
    total: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step:>{len(str(self.total))}}/{self.total}  {self.text}"

    @classmethod
    def parse(cls, line: str) -> Report | None:
        """The report that a line of a log is, or None.

        >>> Report.parse("step  20/600  loss 1.0000")
        Report(step=20, total=600, text='loss 1.0000')
        >>> Report.parse("warning: step 20 is not saved") is None
        True
        """
        found = _LINE.fullmatch(line.rstrip("\n"))
        return cls(int(found[1]), int(found[2]), found[3]) if found else None


class Reporter:
    """Turns metrics into reports; knows the pace from when it was asked before."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.first: tuple[float, int] | None = None
        self.collapsed = False

    def report(self, metrics: Mapping[str, float], step: int) -> Report:
        """What to say about ``step``; the time left is known from the second report on."""
        now = time.monotonic()
        parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        if "images_per_second" in metrics:
            parts.append(f"{metrics['images_per_second']:.0f} images/s")
        if self.first is None:
            self.first = (now, step)
        elif step > self.first[1]:
            pace = (now - self.first[0]) / (step - self.first[1])
            parts.append(f"{timedelta(seconds=round(pace * (self.total - step)))} left")
        return Report(step, self.total, "  ".join(parts))

    def alarm(self, metrics: Mapping[str, float], step: int) -> str | None:
        """The one line that says that the embedding has collapsed, when it has just done so."""
        was, self.collapsed = self.collapsed, bool(metrics.get("collapse_alarm"))
        if was or not self.collapsed:
            return None
        known = ("embedding_spread", "effective_rank", "projection_spread")
        said = ", ".join(f"{key} {metrics[key]:.3f}" for key in known if key in metrics)
        return (
            f"the embedding has collapsed by step {step} ({said}): nearly the same "
            "features for every image; the run goes on, but look at what keeps views apart "
            "(target, predictor, weights) and at the learning rate"
        )


class LogView:
    """Shows the lines of a log: on a terminal reports move a bar, elsewhere all stay lines."""

    def __init__(self) -> None:
        self.console = screen(soft_wrap=True)
        self.bar: Progress | None = None
        self.half = ""

    def show(self, text: str) -> None:
        """Show more of the log; an unfinished line waits for its end."""
        *lines, self.half = (self.half + text).split("\n")
        for line in map(terminal_text, lines):
            report = Report.parse(line)
            if report is not None and self.console.is_terminal and self._fits(report):
                self._move(report)
            else:
                self.say(line)

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one; names in it may hold anything."""
        line = printable_lines(line)
        if self.bar is not None:
            self.bar.console.print(Text(line))  # rich takes `:100:` in plain text for an emoji
        elif self.console.is_terminal:
            self.console.print(Text(line))
        else:  # a pipe or a file: the line of the log, at once
            sys.stdout.write(line + "\n")
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it is and print what was left of the log."""
        if self.half:
            self.say(terminal_text(self.half))
            self.half = ""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _fits(self, report: Report) -> bool:
        """Whether there is room for a bar beside what the report says."""
        figures = cell_len(f" {report.total}/{report.total} {report.text.strip()}")
        return self.console.width >= figures + SHORTEST

    def _move(self, report: Report) -> None:
        if self.bar is None:
            self.bar = WholeProgress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                console=self.console,
            )  # fmt: skip
            self.bar.add_task("", total=report.total)
            self.bar.start()
        self.bar.update(
            self.bar.task_ids[0], completed=report.step, description=printable(report.text.strip())
        )
