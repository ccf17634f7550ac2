"""Progress of a run: one plain line of the log per report, which a terminal turns into a bar."""

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
    MIN_BAR_WIDTH,
    WholeProgress,
    make_console,
)
from vssl_dist.logs import entry_as_terminal_text
from vssl_dist.text import printable, printable_lines

_REPORT_LINE = re.compile(r"step +(\d+)/(\d+)  (.*)")


@dataclass
class ProgressReport:
    """One line of progress: ``step 120/600  loss -1.2345  2541 images/s  0:01:12 left``."""

    step: int
    total: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step:>{len(str(self.total))}}/{self.total}  {self.text}"

    @classmethod
    def parse(cls, line: str) -> ProgressReport | None:
        """Read a report back from a line of a log; None where the line is none.

        >>> ProgressReport.parse("step  20/600  loss 1.0000")
        ProgressReport(step=20, total=600, text='loss 1.0000')
        >>> ProgressReport.parse("warning: step 20 is not saved") is None
        True
        """
        line_match = _REPORT_LINE.fullmatch(line.rstrip("\n"))
        return cls(int(line_match[1]), int(line_match[2]), line_match[3]) if line_match else None


class ProgressReporter:
    """Turns metrics into reports, with the time left from the pace since the first report."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.start: tuple[float, int] | None = None
        """Time and step of the first report."""
        self.is_collapsed = False

    def report(self, metrics: Mapping[str, float], step: int) -> ProgressReport:
        """Report ``step``; the time left is known from the second report on."""
        now = time.monotonic()
        figure_texts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
        if "images_per_second" in metrics:
            figure_texts.append(f"{metrics['images_per_second']:.0f} images/s")
        if self.start is None:
            self.start = (now, step)
        elif step > self.start[1]:
            seconds_per_step = (now - self.start[0]) / (step - self.start[1])
            figure_texts.append(
                f"{timedelta(seconds=round(seconds_per_step * (self.total - step)))} left"
            )
        return ProgressReport(step, self.total, "  ".join(figure_texts))

    def collapse_warning(self, metrics: Mapping[str, float], step: int) -> str | None:
        """Return a line that warns of a collapse, at the step where the alarm goes off."""
        had_collapsed = self.is_collapsed
        self.is_collapsed = bool(metrics.get("collapse_alarm"))
        if had_collapsed or not self.is_collapsed:
            return None
        keys = ("embedding_spread", "effective_rank", "projection_spread")
        values = ", ".join(f"{key} {metrics[key]:.3f}" for key in keys if key in metrics)
        return (
            f"the embedding has collapsed by step {step} ({values}): nearly the same "
            "features for every image; the run goes on, but look at what keeps views apart "
            "(target, predictor, weights) and at the learning rate"
        )


class LogView:
    """Shows the lines of a log: on a terminal reports move a bar, elsewhere all stay lines."""

    def __init__(self) -> None:
        self.console = make_console(soft_wrap=True)
        self.bar: Progress | None = None
        self.unfinished_line = ""

    def show(self, text: str) -> None:
        """Show more of the log; an unfinished line waits for its end."""
        *lines, self.unfinished_line = (self.unfinished_line + text).split("\n")
        for line in map(entry_as_terminal_text, lines):
            report = ProgressReport.parse(line)
            if report is not None and self.console.is_terminal and self._fits_bar(report):
                self._move_bar(report)
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
        """Print an unfinished last line and leave the bar as it stands."""
        if self.unfinished_line:
            self.say(entry_as_terminal_text(self.unfinished_line))
            self.unfinished_line = ""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _fits_bar(self, report: ProgressReport) -> bool:
        """Whether a bar has room beside the report's figures."""
        num_cells = cell_len(f" {report.total}/{report.total} {report.text.strip()}")
        return self.console.width >= num_cells + MIN_BAR_WIDTH

    def _move_bar(self, report: ProgressReport) -> None:
        if self.bar is None:
            self.bar = WholeProgress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                console=self.console,
            )  # fmt: skip
            self.bar.add_task("", total=report.total)
            self.bar.start()
        self.bar.update(
            self.bar.task_ids[0],
            completed=report.step,
            description=printable(report.text.strip()),
        )
