"""What processes say while they work: in log files with time, writer and level, on a terminal bare.

Modules log through ``logging.getLogger(__name__)``.  A process decides once, where it starts,
which of the two it writes; one that decides nothing (a notebook) has the warnings on stderr.

    2026-11-30 20:40:01 rank 3 WARNING step 120 is not saved: No space left on device

is ``warning: step 120 is not saved: No space left on device`` on a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
from contextlib import suppress
from datetime import datetime

from vssl_dist.text import printable, printable_lines

_PREFIXES = {"INFO": "", "WARNING": "warning: ", "ERROR": "error: "}
"""How a line of each level begins on a terminal."""
_ENTRY = re.compile(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [a-z]+(?: \d+)? ({'|'.join(_PREFIXES)}) ")
_PACKAGE = "vssl_dist"
_WARNINGS = "py.warnings"
"""The logger that `logging.captureWarnings` writes to."""


def configure_log(writer: str) -> None:
    """Have this process log to its standard error, which leads to a file that others append to.

    Python's warnings go there as well.

    Args:
        writer: Who writes, such as ``rank 3``: one lower-case word, and a number if there are more.
    """
    _handle(_Output(logging.NOTSET, _EntryFormatter(writer)))
    logging.captureWarnings(True)


def configure_terminal() -> None:
    """Have this process log for who is watching it: warnings to stderr, the rest to stdout."""
    _handle(_Output(logging.WARNING, _TerminalFormatter()))


def entry(writer: str, level: str, text: str) -> str:
    """Text as `configure_log` would have it written now, without a line end.

    Args:
        writer: See `configure_log`.
        level: INFO, WARNING or ERROR.
        text: Its first line follows the level; more lines, such as a traceback's, stay lines.
    """
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return f"{now} {writer} {level} {printable_lines(text)}"


def terminal_text(line: str) -> str:
    """A line of a log file as a terminal shows it; one that is no entry stays as it is.

    >>> terminal_text("2026-11-30 20:40:01 rank 0 WARNING step 9 is not saved")
    'warning: step 9 is not saved'
    >>> terminal_text("2026-11-30 20:40:01 rank 0 INFO step  9/10  loss 1.2")
    'step  9/10  loss 1.2'
    >>> terminal_text("step  9/10  loss 1.2")
    'step  9/10  loss 1.2'
    """
    header = _ENTRY.match(line)
    return line if header is None else _PREFIXES[header[1]] + line[header.end() :]


class _EntryFormatter(logging.Formatter):
    """One line of time, writer, level and message, and a traceback below it."""

    def __init__(self, writer: str) -> None:
        super().__init__()
        self._writer = writer

    def format(self, record: logging.LogRecord) -> str:
        return entry(self._writer, record.levelname, _text(record, self))


class _TerminalFormatter(logging.Formatter):
    """The message, after a word of warning where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        return _PREFIXES.get(record.levelname, "") + _text(record, self)


def _text(record: logging.LogRecord, formatter: logging.Formatter) -> str:
    message = record.getMessage()
    if record.name == _WARNINGS:  # Python has made two lines of it, the second its source
        message = " ".join(message.split())
    # A line end in the name of a file must not begin an entry of its own.
    message = printable(message)
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


class _Output(logging.Handler):
    """Writes to what standard output and standard error are at the moment.

    Args:
        error_from: The lowest level that goes to standard error.
        formatter: Of the lines.
    """

    def __init__(self, error_from: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self._error_from = error_from
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or nothing where the disk is full: that is no reason to lose a run."""
        stream = sys.stderr if record.levelno >= self._error_from else sys.stdout
        with suppress(OSError, ValueError):  # ValueError: somebody has closed it
            stream.write(self.format(record) + "\n")
            stream.flush()


def _handle(handler: logging.Handler) -> None:
    """Make a handler the only one of this package and of Python's warnings.

    Not of the root logger: submitit's logger has handlers of its own and passes everything on, so
    that it would be written twice.
    """
    logging.getLogger(_PACKAGE).setLevel(logging.INFO)
    for name in (_PACKAGE, _WARNINGS):
        logging.getLogger(name).handlers[:] = [handler]
