"""How the code reads, in figures: ``python -m bench.house [CHECKOUT ...]``.

For each checkout, of the code in vssl_dist/, data_prep/ and launch/: files and lines, the largest
folder, comment lines, ``Any``, names that say how a value came and not what it is, and docstrings
whose first line leans on something else.  One column per checkout, so that a change can be shown
beside what it replaced.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

from vssl_dist.config.paths import path_argument
from vssl_dist.console import tables

ROOMS = ("vssl_dist", "data_prep", "launch")
HOW_IT_CAME = {
    "found", "made", "told", "said", "given", "kept", "known", "own", "one", "place", "wanted",
    "here", "there", "taken", "seen", "theirs",
}  # fmt: skip
"""Names of variables and parameters that do not say what they hold."""
_LEANS = re.compile(r"(Of|As|Likewise|Nothing|The same|Such as|It|Its|Their|They|And|Or)\b")
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def sources(checkout: Path) -> list[Path]:
    """The Python files of the code, tests and measurements left out."""
    return [path for room in ROOMS for path in sorted((checkout / room).rglob("*.py"))]


def names(tree: ast.Module) -> Iterator[str]:
    """Every variable that is assigned and every parameter, as often as it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def docstrings(tree: ast.Module) -> Iterator[str]:
    """The first line of every docstring, those below attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str) and text.strip():
                        yield text.strip().splitlines()[0]


def comments(text: str) -> int:
    """Lines that hold a comment, but for those that speak to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    marks = (token.string for token in tokens if token.type == tokenize.COMMENT)
    return sum(not re.match(r"#\s*(fmt|type|noqa|!)", mark) for mark in marks)


def figures(checkout: Path) -> dict[str, str]:
    """The figures of one checkout, by what they count."""
    paths = sources(checkout)
    texts = [path.read_text() for path in paths]
    trees = [ast.parse(text) for text in texts]
    lines = [text.count("\n") for text in texts]
    folders = Counter(path.parent.relative_to(checkout) for path in paths)
    folder, files = max(folders.items(), key=lambda pair: pair[1])
    assigned = Counter(name for tree in trees for name in names(tree))
    dialect = Counter({name: assigned[name] for name in HOW_IT_CAME})
    first_lines = [line for tree in trees for line in docstrings(tree)]
    anys = sum(
        isinstance(node, ast.Name) and node.id == "Any" for tree in trees for node in ast.walk(tree)
    )
    publics = Counter(
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, _DEFINITIONS) and not node.name.startswith("_") and node.name != "main"
    )
    return {
        "files": str(len(paths)),
        "lines": str(sum(lines)),
        "lines of the median file": f"{statistics.median(lines):g}",
        "files in the largest folder": f"{files} ({folder})",
        "folders": str(len(folders)),
        "comment lines per 100": f"{100 * sum(map(comments, texts)) / sum(lines):.1f}",
        "uses of Any": str(anys),
        "names that say how a value came": str(dialect.total()),
        "the most frequent of them": ", ".join(f"{n} {c}" for n, c in dialect.most_common(5)),
        "docstrings": str(len(first_lines)),
        "docstrings that lean on another": str(sum(bool(_LEANS.match(s)) for s in first_lines)),
        "public names defined twice or more": str(sum(count > 1 for count in publics.values())),
    }


def main(argv: Sequence[str]) -> int:
    """Print the table; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.house", description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=path_argument, default=[Path()])
    columns = {str(path): figures(path) for path in parser.parse_args(argv).checkouts}
    rows = list(next(iter(columns.values())))
    tables.print_tables(
        "figure",
        [(row, {name: column[row] for name, column in columns.items()}) for row in rows],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
