"""How a command ends: one line on stderr for whatever stopped it, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vssl_dist import logs
from vssl_dist.errors import Refusal
from vssl_dist.text import say

REFUSED, INTERRUPTED = Refusal.exit_code, 130
_MEMORY = "memory ran out (no file is to blame): start again with fewer processes or more memory"


@dataclass
class Ending:
    """The exit code of a program: 0 unless something else became of it."""

    code: int = 0


@contextmanager
def one_line(place: Path | str = "disk", interrupted: str = "interrupted") -> Iterator[Ending]:
    """Say in one line what stopped the block, and end it there.

    What the block logs meanwhile is shown as a terminal shows it.

    Args:
        place: What an error of the file system is about that names no file itself.
        interrupted: What to say of Ctrl-C.

    Yields:
        The ending.  Its code is that of the refusal (2 as a rule) after what a user can mend, an
        error of the file system among it, and 130 after Ctrl-C.
    """
    ending = Ending()
    logs.configure_terminal()
    try:
        yield ending
    except Refusal as error:
        ending.code = _say(f"error: {error}", error.exit_code)
    except OSError as error:
        ending.code = _say(f"error: {error.filename or place}: {error.strerror or error}", REFUSED)
    except MemoryError:
        ending.code = _say(f"error: {place}: {_MEMORY}", REFUSED)
    except KeyboardInterrupt:
        ending.code = _say(interrupted, INTERRUPTED)


def _say(line: str, code: int) -> int:
    say(line, error=True)
    return code
