"""Text of others, made harmless for where it is shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """One line that any terminal shows: names of files may hold line ends, commands to terminals
    and bytes of no character.

    >>> printable("caf\\u00e9\\n\\x1b[31m\\udcff")
    'café\\\\n\\\\x1b[31m\\\\udcff'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Several such lines, in which tabs stay what they are.

    >>> printable_lines("a\\tb\\n\\x1b[2J")
    'a\\tb\\n\\\\x1b[2J'
    """
    lines = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    return "\n".join(lines)
