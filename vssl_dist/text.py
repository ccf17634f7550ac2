"""Text of unknown origin, made harmless for terminals and Markdown."""

from __future__ import annotations

import html
import re
import sys

_MARKDOWN_MARKS_PATTERN = re.compile(
    r"[\\\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^[-+=#]"
    r"|(?:(?<=^\d)|(?<=^\d\d)|(?<=^\d\d\d))[.)](?=\s|$)"  # items of a list, and not 0.75
)
_BARE_LINK_PATTERN = re.compile(r"(?<=:)//|(?<=www)\.", re.I)


def printable(text: str) -> str:
    """Escape text into one line that any terminal shows.

    Names of files may hold line ends, commands to terminals and bytes of no character.

    >>> printable("caf\\u00e9\\n\\x1b[31m\\udcff")
    'café\\\\n\\\\x1b[31m\\\\udcff'
    """
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def printable_lines(text: str) -> str:
    """Escape text line by line for any terminal; tabs stay.

    >>> printable_lines("a\\tb\\n\\x1b[2J")
    'a\\tb\\n\\\\x1b[2J'
    """
    lines = ("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    return "\n".join(lines)


def say(*lines: str, to_stderr: bool = False) -> None:
    """Print lines, each made harmless, so that a program that waits has said them.

    Args:
        lines: Without their ends.
        to_stderr: On stderr.
    """
    output_stream = sys.stderr if to_stderr else sys.stdout
    print(*map(printable, lines), sep="\n", file=output_stream, flush=True)


def escape_markdown(text: str) -> str:
    """Escape text into one line of Markdown: no heading, link, formula, tag or cell.

    >>> escape_markdown("a_b *c* | <b>")
    'a_b \\\\*c\\\\* \\\\| &lt;b&gt;'
    >>> print(escape_markdown("12. 0.75"), escape_markdown("0.75"))
    12\\. 0.75 0.75
    >>> print(escape_markdown("# x\\n[y](http://z)"))
    \\# x\\\\n\\[y\\](http:&#47;/z)
    """
    escaped_marks = _MARKDOWN_MARKS_PATTERN.sub(
        lambda mark_match: f"\\{mark_match[0]}", printable(text)
    )
    escaped_html = html.escape(escaped_marks, quote=False)
    return _BARE_LINK_PATTERN.sub(
        lambda link_match: f"&#{ord(link_match[0][0])};{link_match[0][1:]}", escaped_html
    )
