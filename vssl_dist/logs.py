"""Logging of this package: lines with time, writer and level in log files, bare on a terminal.

Modules log through ``logging.getLogger(__name__)``.  A process chooses one of the two once, where
it starts; where none is chosen, as in a notebook, Python shows the warnings alone.

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

_TERMINAL_PREFIX_BY_LEVEL = {"INFO": "", "WARNING": "warning: ", "ERROR": "error: "}
"""How a line of each level begins on a terminal."""
_ENTRY_HEADER_PATTERN = re.compile(
    rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d [a-z]+(?: \d+)? ({'|'.join(_TERMINAL_PREFIX_BY_LEVEL)}) "
)
_PACKAGE_LOGGER_NAME = "vssl_dist"
_WARNINGS_LOGGER_NAME = "py.warnings"
"""The logger that `logging.captureWarnings` writes to."""


def configure_log_output(writer_name: str) -> None:
    """Have this process log to its standard error, which leads to a file that others append to.

    Python's warnings go there as well.

    Args:
        writer_name: Who writes, such as ``rank 3``: one lower-case word, and a number if there are
            more.
    """
    _install_handler(_StdStreamHandler(logging.NOTSET, _EntryFormatter(writer_name)))
    logging.captureWarnings(True)


def configure_terminal_output() -> None:
    """Have this process log for who is watching it: warnings to stderr, the rest to stdout."""
    _install_handler(_StdStreamHandler(logging.WARNING, _TerminalFormatter()))


def format_log_entry(writer: str, level: str, text: str) -> str:
    """Format text as an entry that `configure_log_output` would write now, without a line end.

    Args:
        writer: See `configure_log_output`.
        level: INFO, WARNING or ERROR.
        text: Its first line follows the level; more lines, such as a traceback's, stay lines.
    """
    timestamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    return f"{timestamp} {writer} {level} {printable_lines(text)}"


def entry_as_terminal_text(line: str) -> str:
    """Turn a line of a log file into what a terminal shows; lines of older logs stay as they are.

    >>> entry_as_terminal_text("2026-11-30 20:40:01 rank 0 WARNING step 9 is not saved")
    'warning: step 9 is not saved'
    >>> entry_as_terminal_text("2026-11-30 20:40:01 rank 0 INFO step  9/10  loss 1.2")
    'step  9/10  loss 1.2'
    >>> entry_as_terminal_text("step  9/10  loss 1.2")
    'step  9/10  loss 1.2'
    """
    header_match = _ENTRY_HEADER_PATTERN.match(line)
    return (
        line
        if header_match is None
        else _TERMINAL_PREFIX_BY_LEVEL[header_match[1]] + line[header_match.end() :]
    )


class _EntryFormatter(logging.Formatter):
    """One line of time, writer, level and message, and a traceback below it."""

    def __init__(self, writer: str) -> None:
        super().__init__()
        self._writer = writer

    def format(self, record: logging.LogRecord) -> str:
        return format_log_entry(self._writer, record.levelname, _record_text(record, self))


class _TerminalFormatter(logging.Formatter):
    """The message, after a word of warning where it is one."""

    def format(self, record: logging.LogRecord) -> str:
        return _TERMINAL_PREFIX_BY_LEVEL.get(record.levelname, "") + _record_text(record, self)


def _record_text(record: logging.LogRecord, formatter: logging.Formatter) -> str:
    message = record.getMessage()
    # Python has made two lines of a warning, the second its source.
    if record.name == _WARNINGS_LOGGER_NAME:
        message = " ".join(message.split())
    # A line end in the name of a file must not begin an entry of its own.
    message = printable(message)
    if record.exc_info:
        message += "\n" + formatter.formatException(record.exc_info)
    return message


class _StdStreamHandler(logging.Handler):
    """Writes to what standard output and standard error are at the moment.

    Args:
        min_stderr_level: The lowest level that goes to standard error.
        formatter: Of the lines.
    """

    def __init__(self, min_stderr_level: int, formatter: logging.Formatter) -> None:
        super().__init__()
        self._min_stderr_level = min_stderr_level
        self.setFormatter(formatter)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or nothing where the disk is full: that is no reason to lose a run."""
        stream = sys.stderr if record.levelno >= self._min_stderr_level else sys.stdout
        with suppress(OSError, ValueError):  # ValueError: somebody has closed it
            stream.write(self.format(record) + "\n")
            stream.flush()


def _install_handler(handler: logging.Handler) -> None:
    """Make a handler the only one of this package and of Python's warnings.

    Not of the root logger: submitit's logger has handlers of its own and passes everything on, so
    that it would be written twice.
    """
    logging.getLogger(_PACKAGE_LOGGER_NAME).setLevel(logging.INFO)
    for name in (_PACKAGE_LOGGER_NAME, _WARNINGS_LOGGER_NAME):
        logging.getLogger(name).handlers[:] = [handler]
