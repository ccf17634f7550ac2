from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from vssl_dist.jobs import progress
from vssl_dist.jobs.progress import LogView, ProgressReport, ProgressReporter


def test_a_report_says_where_the_run_is_how_fast_and_how_long_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    reporter = ProgressReporter(total=600)
    reporter.report({"loss": 2.0}, 100)
    line = str(reporter.report({"loss": 1.23456, "images_per_second": 2541.2}, 200))
    assert line == "step 200/600  loss 1.2346  2541 images/s  0:00:40 left"


def test_a_collapse_is_said_in_one_line_when_it_begins_and_not_again() -> None:
    reporter = ProgressReporter(total=600)
    fine = {"collapse_alarm": 0.0, "embedding_spread": 0.6, "effective_rank": 20.0}
    gone = {"collapse_alarm": 1.0, "embedding_spread": 0.0321, "effective_rank": 1.26}
    said = [
        reporter.collapse_warning(m, step) for step, m in enumerate((fine, gone, gone, fine, gone))
    ]
    assert [line is not None for line in said] == [False, True, False, False, True]
    assert said[1] is not None
    assert "collapsed by step 1 (embedding_spread 0.032, effective_rank 1.260)" in said[1]
    assert "\n" not in said[1]
    assert reporter.collapse_warning({"loss": 1.0}, 9) is None


def test_a_line_is_read_back_as_the_report_it_was() -> None:
    report = ProgressReport(7, 600, "loss 1.0000  12 images/s")
    assert ProgressReport.parse(f"{report}\n") == report
    assert ProgressReport.parse("[rank 0] step 7/600  loss") is None


def test_without_a_terminal_every_line_is_passed_on_once_it_is_whole(
    capsys: pytest.CaptureFixture[str],
) -> None:
    screen = LogView()
    screen.show("step  1/9  loss 1.0\nhalf a")
    screen.show(" line\nno end")
    assert capsys.readouterr().out == "step  1/9  loss 1.0\nhalf a line\n"
    screen.close()
    assert capsys.readouterr().out == "no end\n"


def test_on_a_terminal_reports_move_a_bar_and_other_lines_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = LogView()
    screen.console = Console(
        file=io.StringIO(), force_terminal=True, width=80, markup=False, highlight=False
    )
    screen.show("step 3/9  loss 1.0\nwarning: [odd] brackets\nstep 9/9  loss 0.5\n")
    screen.close()
    assert isinstance(screen.console.file, io.StringIO)
    shown = screen.console.file.getvalue()
    assert "warning: [odd] brackets" in shown
    assert "9/9" in shown
    assert "loss 0.5" in shown


def test_a_terminal_shows_the_characters_of_the_log() -> None:
    screen, file = LogView(), io.StringIO()
    screen.console = Console(file=file, force_terminal=True, width=80, soft_wrap=True, _environ={})
    line = "warning: [red]/data/x.py:100: 12 MiB/s, b:warning: at 1:1234: node[01:04]" + 90 * "."
    screen.show(f"{line}\nstep 1/9  loss 1.0\n{line}\n")
    screen.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert shown.splitlines().count(line) == 2, "before the bar and above it"


@pytest.mark.parametrize("width", [20, 45, 60, 80, 200])
def test_a_report_is_whole_on_a_screen_of_any_width(width: int) -> None:
    screen, file = LogView(), io.StringIO()
    screen.console = Console(
        file=file, force_terminal=True, width=width, soft_wrap=True, markup=False, _environ={}
    )
    screen.show("step  20/600  loss -1.2345  2541 images/s  0:01:12 left\n")
    screen.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "…" not in shown
    assert "20/600" in shown
    assert "loss -1.2345  2541 images/s  0:01:12 left" in shown
