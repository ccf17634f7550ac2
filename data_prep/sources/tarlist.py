"""Which tars a WebDataset consists of: a folder, one of them, or a pattern."""

from __future__ import annotations

import re
from pathlib import Path

from vssl_dist.errors import DataError

from .base import LeftOutEntry
from .split_folders import describe_left_out, is_folder, list_names

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_BRACES_PATTERN = re.compile(r"\{([^{}]*)\}")
_NUMBER_RANGE_PATTERN = re.compile(r"([0-9]+)\.\.([0-9]+)")
_MAX_EXPANDED_FILES = 1_000_000


def find_tars(root: Path) -> list[Path]:
    """Find the tars that a path means, sorted by name; none in a folder without any.

    Args:
        root: A tar, a folder, or a pattern with ``*`` or ``{000..012}`` in its name.

    Raises:
        DataError: A tar of a pattern with braces is not there, or a pattern is none.
    """
    if root.is_file():
        return [root]
    if root.is_dir():
        names = list_names(root)
        return [root / name for name in names if is_tar(name) and not is_folder(root / name)]
    if _BRACES_PATTERN.search(str(root)):
        return _list_all_named_tars(root)
    return _list_matching_tars(root)


def _list_matching_tars(pattern: Path) -> list[Path]:
    try:
        return sorted(path for path in pattern.parent.glob(pattern.name) if path.is_file())
    except ValueError as error:
        raise DataError(
            f"{pattern}: not a pattern ({error}): use * for a part of a name"
        ) from error


def is_tar(name: str) -> bool:
    """Tell whether a file is called a tar, and is not hidden.

    >>> is_tar("a.TAR.gz"), is_tar("._a.tar")
    (True, False)
    """
    return name.lower().endswith(TAR_ENDINGS) and not name.startswith(".")


def list_other_files(folder: Path) -> list[LeftOutEntry]:
    """List what lies in a folder beside its tars."""
    return [
        describe_left_out(folder / name, name, "no .tar, .tar.gz or .tgz")
        for name in list_names(folder)
        if not is_tar(name) or is_folder(folder / name)
    ]


def _list_all_named_tars(pattern: Path) -> list[Path]:
    named_paths = [Path(text) for text in expand_braces(str(pattern))]
    tars_of_path = [
        _list_matching_tars(path) if "*" in path.name else [path] for path in named_paths
    ]
    missing = [
        path
        for path, tars in zip(named_paths, tars_of_path, strict=True)
        if not tars or not tars[0].is_file()
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{missing[0]}: no such file{more}, of {len(named_paths)} that {pattern} means"
        )
    return sorted({path for tars in tars_of_path for path in tars})


def expand_braces(text: str) -> list[str]:
    """Expand a pattern with braces to the names that it means.

    >>> expand_braces("x-{08..10}.tar")
    ['x-08.tar', 'x-09.tar', 'x-10.tar']
    >>> expand_braces("{a,b}{0..1}")
    ['a0', 'a1', 'b0', 'b1']
    """
    match = _BRACES_PATTERN.search(text)
    if match is None:
        return [text]
    numbers = _NUMBER_RANGE_PATTERN.fullmatch(match[1])
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        is_padded = any(number[0] == "0" < number for number in numbers.groups())
        width = max(map(len, numbers.groups())) if is_padded else 0
        if not first <= last < first + _MAX_EXPANDED_FILES:
            raise DataError(f"{match[0]}: not a range of numbers, the smaller one first")
        alternatives = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        alternatives = match[1].split(",")
    prefix, suffixes = text[: match.start()], expand_braces(text[match.end() :])
    if len(alternatives) * len(suffixes) > _MAX_EXPANDED_FILES:
        raise DataError(f"{text}: means more than {_MAX_EXPANDED_FILES} files")
    return [f"{prefix}{alternative}{suffix}" for alternative in alternatives for suffix in suffixes]
