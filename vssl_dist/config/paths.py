"""Paths as people write them: ``~`` and ``$VAR`` are what a shell would make of them, once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from string import Template


def expanded(text: str) -> str:
    """A path with ``$VAR``, ``${VAR}`` and a leading ``~`` or ``~user`` written out.

    ``$$`` is a dollar, and ``./~`` a file of that name.

    Raises:
        ValueError: One line that names what is not defined.
    """
    try:
        plain = Template(text).substitute(_Variables(os.environ))
    except KeyError as error:
        raise ValueError(f"{text}: the variable {error.args[0]} is not set, or empty") from None
    except ValueError:
        raise ValueError(f"{text}: a dollar that names no variable is written $$") from None
    if not plain.startswith("~"):
        return plain
    try:
        return str(Path(plain).expanduser())
    except RuntimeError:
        user = plain.partition("/")[0]
        raise ValueError(
            f"{text}: there is no home of {user} here (a file of that name is ./{user})"
        ) from None


def path_argument(text: str) -> Path:
    """A path from a command line, for argparse.

    Raises:
        argparse.ArgumentTypeError: See `expanded`.
    """
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def literal(path: Path) -> str:
    """The text of which `expanded` makes this very path, for a command that calls another.

    >>> literal(Path("/scratch/$x"))
    '/scratch/$$x'
    """
    text = str(path).replace("$", "$$")
    return f"./{text}" if text.startswith("~") else text


class _Variables(dict[str, str]):
    """An empty variable would move a path to another place as silently as a missing one."""

    def __getitem__(self, name: str) -> str:
        value = super().__getitem__(name)
        if not value:
            raise KeyError(name)
        return value
