"""Which tars a WebDataset consists of: a folder, one of them, or a pattern."""

from __future__ import annotations

import re
from pathlib import Path

from vssl_dist.errors import DataError

from .base import LeftOut
from .split_folders import describe_left_out, is_folder, list_names

ENDINGS = (".tar", ".tar.gz", ".tgz")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MOST = 1_000_000


def find_tars(root: Path) -> list[Path]:
    """The tars that a path means, sorted by name; none if it is a folder without.

    Args:
        root: A tar, a folder, or a pattern with ``*`` or ``{000..012}`` in its name.

    Raises:
        DataError: A tar of a pattern with braces is not there, or a pattern is none.
    """
    if root.is_file():
        return [root]
    if root.is_dir():
        names = list_names(root)
        return [root / n for n in names if is_tar(n) and not is_folder(root / n)]
    if _BRACES.search(str(root)):
        return _all_there(root)
    return _matching(root)


def _matching(pattern: Path) -> list[Path]:
    try:
        return sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())
    except ValueError as error:
        raise DataError(
            f"{pattern}: not a pattern ({error}): use * for a part of a name"
        ) from error


def is_tar(name: str) -> bool:
    """Whether a file of a folder is called a tar, and is not hidden.

    >>> is_tar("a.TAR.gz"), is_tar("._a.tar")
    (True, False)
    """
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def list_other_files(folder: Path) -> list[LeftOut]:
    """What lies in a folder besides its tars."""
    return [
        describe_left_out(folder / name, name, "no .tar, .tar.gz or .tgz")
        for name in list_names(folder)
        if not is_tar(name) or is_folder(folder / name)
    ]


def _all_there(pattern: Path) -> list[Path]:
    named = [Path(text) for text in expand_braces(str(pattern))]
    paths = [_matching(path) if "*" in path.name else [path] for path in named]
    missing = [
        path
        for path, matching in zip(named, paths, strict=True)
        if not matching or not matching[0].is_file()
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(f"{missing[0]}: no such file{more}, of {len(named)} that {pattern} means")
    return sorted({path for matching in paths for path in matching})


def expand_braces(text: str) -> list[str]:
    """The names that a pattern with braces means.

    >>> expand_braces("x-{08..10}.tar")
    ['x-08.tar', 'x-09.tar', 'x-10.tar']
    >>> expand_braces("{a,b}{0..1}")
    ['a0', 'a1', 'b0', 'b1']
    """
    match = _BRACES.search(text)
    if match is None:
        return [text]
    numbers = _RANGE.fullmatch(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        padded = any(number[0] == "0" < number for number in numbers.groups())
        width = max(map(len, numbers.groups())) if padded else 0
        if not first <= last < first + _MOST:
            raise DataError(f"{match[0]}: not a range of numbers, the smaller one first")
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    head, tail = text[: match.start()], expand_braces(text[match.end() :])
    if len(parts) * len(tail) > _MOST:
        raise DataError(f"{text}: means more than {_MOST} files")
    return [f"{head}{part}{rest}" for part in parts for rest in tail]
