"""Text of unknown origin, made harmless for terminals and Markdown."""

from __future__ import annotations

import html
import re
import sys

_MARKS = re.compile(
    r"[\\\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^[-+=#]"
    r"|(?:(?<=^\d)|(?<=^\d\d)|(?<=^\d\d\d))[.)](?=\s|$)"  # items of a list, and not 0.75
)
_LINKS = re.compile(r"(?<=:)//|(?<=www)\.", re.I)


def printable(text: str) -> str:
    """Escape text into one line that any terminal shows.

    Names of files may hold line ends, commands to terminals and bytes of no character.

    >>> printable("caf\\u00e9\\n\\x1b[31m\\udcff")
    'café\\\\n\\\\x1b[31m\\\\udcff'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """Escape text line by line for any terminal; tabs stay.

    >>> printable_lines("a\\tb\\n\\x1b[2J")
    'a\\tb\\n\\\\x1b[2J'
    """
    lines = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    return "\n".join(lines)


def say(*lines: str, error: bool = False) -> None:
    """Print lines, each made harmless, so that a program that waits has said them.

    Args:
        lines: Without their ends.
        error: On stderr.
    """
    stream = sys.stderr if error else sys.stdout
    print(*map(printable, lines), sep="\n", file=stream, flush=True)


def markdown(text: str) -> str:
    """Escape text into one line of Markdown: no heading, link, formula, tag or cell.

    >>> markdown("a_b *c* | <b>")
    'a_b \\\\*c\\\\* \\\\| &lt;b&gt;'
    >>> print(markdown("12. 0.75"), markdown("0.75"))
    12\\. 0.75 0.75
    >>> print(markdown("# x\\n[y](http://z)"))
    \\# x\\\\n\\[y\\](http:&#47;/z)
    """
    marked = _MARKS.sub(lambda mark: f"\\{mark[0]}", printable(text))
    escaped = html.escape(marked, quote=False)
    return _LINKS.sub(lambda link: f"&#{ord(link[0][0])};{link[0][1:]}", escaped)
