"""Text of others, made harmless for where it is shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line that any terminal shows: names of files may hold line ends, commands to terminals
    and bytes of no character.

    >>> printable("caf\\u00e9\\n\\x1b[31m\\udcff")
    'café\\\\n\\\\x1b[31m\\\\udcff'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
