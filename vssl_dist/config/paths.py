"""Paths as people write them: ``~`` and ``$VAR`` are what a shell would make of them, once."""

from __future__ import annotations

import argparse
import os
import re
import unicodedata
from pathlib import Path
from string import Template

_DOLLAR = "a dollar sign itself is written $$"
_SHELL_FORM = re.compile(r"\$(\{[^}]*\}?|\([^)]*\)?|.?)")


def expanded(text: str) -> str:
    """A path with ``$VAR``, ``${VAR}`` and a leading ``~`` or ``~user`` written out.

    ``$$`` is a dollar, and ``./~`` a file of that name.

    Raises:
        ValueError: One line that names what is not defined, or is no path at all.
    """
    _refuse_control_characters(text, text)
    try:
        plain = Template(text).substitute(_Variables(os.environ))
    except KeyError as error:
        raise ValueError(
            f"{text}: the variable {error.args[0]} is not set, or empty ({_DOLLAR})"
        ) from None
    except ValueError:
        strange = next(m for m in Template.pattern.finditer(text) if m["invalid"] is not None)
        form = _SHELL_FORM.match(text, strange.start())
        raise ValueError(
            f"{text}: {form and form[0]} is neither $NAME nor ${{NAME}}, the forms that are "
            f"expanded here ({_DOLLAR})"
        ) from None
    _refuse_control_characters(text, plain)
    return _with_home(text, plain) if plain.startswith("~") else plain


def _refuse_control_characters(text: str, plain: str) -> None:
    """A variable from a file with Windows' line ends, say, would make a folder of another name."""
    if strange := next((c for c in plain if unicodedata.category(c) == "Cc"), None):
        raise ValueError(
            f"{text!r}: holds the control character {strange!r}, which no path does: take it out, "
            "or out of the variable's value"
        )


def _with_home(text: str, plain: str) -> str:
    user = plain.partition("/")[0]
    if user == "~" and not os.environ.get("HOME", "/").startswith("/"):
        raise ValueError(f"{text}: the variable HOME is empty, or no absolute path")
    try:
        return str(Path(plain).expanduser())
    except RuntimeError:
        raise ValueError(
            f"{text}: there is no home of {user} here (a file of that name is ./{user})"
        ) from None


def path_argument(text: str) -> Path:
    """A path from a command line, for argparse.

    Raises:
        argparse.ArgumentTypeError: It is empty; or see `expanded`.
    """
    if not text:
        raise argparse.ArgumentTypeError("an empty path: is a variable of the shell not set?")
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
