"""How a command ends: one line on stderr for whatever stopped it, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vssl_dist import logs
from vssl_dist.errors import Refusal
from vssl_dist.text import say

REFUSED_EXIT_CODE, INTERRUPTED_EXIT_CODE = Refusal.exit_code, 130
_OUT_OF_MEMORY_MESSAGE = (
    "memory ran out (no file is to blame): start again with fewer processes or more memory"
)


@dataclass
class CommandEnding:
    """How a command ended: its exit code, 0 unless something stopped it."""

    exit_code: int = 0


@contextmanager
def end_in_one_line(
    error_subject: Path | str = "disk", interrupted_message: str = "interrupted"
) -> Iterator[CommandEnding]:
    """Say in one line what stopped the block, and end it there.

    What the block logs meanwhile is shown as a terminal shows it.

    Args:
        error_subject: What an error is about that names no file itself.
        interrupted_message: The line after Ctrl-C.

    Yields:
        The ending.  Its code is that of the refusal (2 as a rule) after what a user can mend, an
        error of the file system among it, and 130 after Ctrl-C.
    """
    command_ending = CommandEnding()
    logs.configure_terminal_output()
    try:
        yield command_ending
    except Refusal as error:
        command_ending.exit_code = _print_and_return_code(f"error: {error}", error.exit_code)
    except OSError as error:
        command_ending.exit_code = _print_and_return_code(
            f"error: {error.filename or error_subject}: {error.strerror or error}",
            REFUSED_EXIT_CODE,
        )
    except MemoryError:
        command_ending.exit_code = _print_and_return_code(
            f"error: {error_subject}: {_OUT_OF_MEMORY_MESSAGE}", REFUSED_EXIT_CODE
        )
    except KeyboardInterrupt:
        command_ending.exit_code = _print_and_return_code(
            interrupted_message, INTERRUPTED_EXIT_CODE
        )


def _print_and_return_code(message: str, exit_code: int) -> int:
    say(message, to_stderr=True)
    return exit_code
