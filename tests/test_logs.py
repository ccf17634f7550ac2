from __future__ import annotations

import logging
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from vssl_dist import logs

LINE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d rank 3 "
log = logging.getLogger("vssl_dist.somewhere")


def test_each_line_of_a_log_file_has_time_writer_and_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure_log_output("rank 3")
    log.info("step %d/9  loss 1.0", 5)
    log.warning("the disk is nearly full")
    out, err = capsys.readouterr()
    assert out == "", "a process has one log"
    assert re.fullmatch(
        f"{LINE}INFO step 5/9  loss 1.0\n{LINE}WARNING the disk is nearly full\n", err
    )


def test_a_terminal_shows_messages_alone_and_warnings_on_stderr(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure_terminal_output()
    log.info("sent")
    log.warning("not sent")
    log.error("refused")
    assert capsys.readouterr() == ("sent\n", "warning: not sent\nerror: refused\n")


def test_what_is_written_to_a_file_is_shown_by_a_terminal_as_if_it_were_said_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown = []
    for configure in (
        logs.configure_terminal_output,
        lambda: logs.configure_log_output("rank 0"),
    ):
        configure()
        for level in (logging.INFO, logging.WARNING, logging.ERROR):
            log.log(level, "a  b: 100 %")
        out, err = capsys.readouterr()
        shown.append([logs.entry_as_terminal_text(line) for line in (out + err).splitlines()])
    assert shown[0] == shown[1]


def test_no_name_of_a_file_begins_an_entry_or_commands_a_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure_log_output("rank 3")
    log.warning("%s is damaged", "a\n2026-11-30 20:40:01 rank 0 ERROR forged \x1b[2J")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
    assert "\\n2026" in line


def test_a_traceback_is_below_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_log_output("rank 3")
    try:
        raise RuntimeError("no luck \x1b[2J")
    except RuntimeError:
        log.exception("evaluation failed:")
    first, *others = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"{LINE}ERROR evaluation failed:", first)
    assert others[0] == "Traceback (most recent call last):"
    assert others[-1] == "RuntimeError: no luck \\x1b[2J"


def test_warnings_of_python_are_entries_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure_log_output("rank 3")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)  # pytest has its own hands on them
        warnings.warn("images are damaged", stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"{LINE}WARNING .*UserWarning: images are damaged", line)


def test_a_full_disk_costs_lines_and_not_the_process() -> None:
    program = """
import logging, sys
from vssl_dist import logs
logs.configure_log_output("rank 0")
logging.getLogger("vssl_dist.x").warning("lost")
sys.stdout.write("went on")
"""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False
        )
    assert done.stdout == b"went on"


def test_each_line_is_written_once_whatever_was_configured_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure_terminal_output()
    logs.configure_log_output("queue")
    logs.configure_log_output("rank 3")
    log.info("once")
    out, err = capsys.readouterr()
    assert (out + err).count("once") == 1


def test_lines_of_older_logs_are_shown_as_they_are() -> None:
    for line in ("step  3/9  loss 1.0", "warning: [odd] brackets", "Traceback (most recent", ""):
        assert logs.entry_as_terminal_text(line) == line
