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
from operator import itemgetter
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

from vssl_dist.config.paths import path_argument
from vssl_dist.console import tables

CODE_FOLDERS = ("vssl_dist", "data_prep", "launch")
VAGUE_NAMES = {
    "found", "made", "told", "said", "given", "kept", "known", "own", "one", "place", "wanted",
    "here", "there", "taken", "seen", "theirs",
}  # fmt: skip
"""Names of variables and parameters that do not say what they hold."""
_DEPENDENT_FIRST_LINE = re.compile(
    r"(Of|As|Likewise|Nothing|The same|Such as|It|Its|Their|They|And|Or)\b"
)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def source_files(checkout: Path) -> list[Path]:
    """The Python files of the code, tests and measurements left out."""
    return [
        path
        for code_folder in CODE_FOLDERS
        for path in sorted((checkout / code_folder).rglob("*.py"))
    ]


def assigned_names(tree: ast.Module) -> Iterator[str]:
    """Every variable that is assigned and every parameter, as often as it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def docstring_first_lines(tree: ast.Module) -> Iterator[str]:
    """The first line of every docstring, those below attributes included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                    text = statement.value.value
                    if isinstance(text, str) and text.strip():
                        yield text.strip().splitlines()[0]


def num_comment_lines(text: str) -> int:
    """Lines that hold a comment, but for those that speak to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comment_texts = (token.string for token in tokens if token.type == tokenize.COMMENT)
    return sum(
        not re.match(r"#\s*(fmt|type|noqa|!)", comment_text) for comment_text in comment_texts
    )


def checkout_figures(checkout: Path) -> dict[str, str]:
    """The figures of one checkout, by what they count."""
    paths = source_files(checkout)
    texts = [path.read_text() for path in paths]
    trees = [ast.parse(text) for text in texts]
    lines = [text.count("\n") for text in texts]
    files_per_folder = Counter(path.parent.relative_to(checkout) for path in paths)
    largest_folder, max_files = max(files_per_folder.items(), key=itemgetter(1))
    assigned_counts = Counter(name for tree in trees for name in assigned_names(tree))
    vague_counts = Counter({name: assigned_counts[name] for name in VAGUE_NAMES})
    first_lines = [line for tree in trees for line in docstring_first_lines(tree)]
    num_any_uses = sum(
        isinstance(node, ast.Name) and node.id == "Any" for tree in trees for node in ast.walk(tree)
    )
    public_name_counts = Counter(
        node.name
        for tree in trees
        for node in tree.body
        if isinstance(node, _DEFINITIONS) and not node.name.startswith("_") and node.name != "main"
    )
    return {
        "files": str(len(paths)),
        "lines": str(sum(lines)),
        "lines of the median file": f"{statistics.median(lines):g}",
        "files in the largest folder": f"{max_files} ({largest_folder})",
        "folders": str(len(files_per_folder)),
        "comment lines per 100": f"{100 * sum(map(num_comment_lines, texts)) / sum(lines):.1f}",
        "uses of Any": str(num_any_uses),
        "names that say how a value came": str(vague_counts.total()),
        "the most frequent of them": ", ".join(f"{n} {c}" for n, c in vague_counts.most_common(5)),
        "docstrings": str(len(first_lines)),
        "docstrings that lean on another": str(
            sum(bool(_DEPENDENT_FIRST_LINE.match(s)) for s in first_lines)
        ),
        "public names defined twice or more": str(
            sum(count > 1 for count in public_name_counts.values())
        ),
    }


def main(argv: Sequence[str]) -> int:
    """Print the table; exit code 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.house", description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=path_argument, default=[Path()])
    figures_by_checkout = {
        str(path): checkout_figures(path) for path in parser.parse_args(argv).checkouts
    }
    figure_names = list(next(iter(figures_by_checkout.values())))
    tables.print_tables(
        "figure",
        [
            (
                name,
                {path: figures[name] for path, figures in figures_by_checkout.items()},
            )
            for name in figure_names
        ],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
