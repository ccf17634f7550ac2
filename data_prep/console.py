"""How a command line ends: one line on stderr for whatever stopped it, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vssl_dist.config import ConfigError
from vssl_dist.data.manifest import DataError
from vssl_dist.text import say

REFUSED, INTERRUPTED = 2, 130
_MEMORY = "memory ran out (no file is to blame): start again with fewer --workers or more memory"


@dataclass
class Ending:
    """The exit code of a program: 0 unless something else became of it."""

    code: int = 0


@contextmanager
def one_line(out: Path, interrupted: str = "interrupted") -> Iterator[Ending]:
    """Say in one line what stopped the block, and end it there.

    Args:
        out: What the program writes: named where an error of the file system names nothing.
        interrupted: What to say of Ctrl-C.

    Yields:
        The ending, whose code is 2 after an error that a user can mend and 130 after Ctrl-C.
    """
    ending = Ending()
    try:
        yield ending
    except (ConfigError, DataError) as error:
        ending.code = _say(f"error: {error}", REFUSED)
    except OSError as error:
        ending.code = _say(f"error: {error.filename or out}: {error.strerror or error}", REFUSED)
    except MemoryError:
        ending.code = _say(f"error: {out}: {_MEMORY}", REFUSED)
    except KeyboardInterrupt:
        ending.code = _say(interrupted, INTERRUPTED)


def _say(line: str, code: int) -> int:
    say(line, error=True)
    return code
