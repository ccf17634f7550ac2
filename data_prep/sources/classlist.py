"""A list of classes to keep, as a text file: ``imagenet100.txt`` beside this file is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssl_dist.errors import DataError


def read_class_list(path: Path | None, known: Sequence[str]) -> tuple[str, ...]:
    """The classes that a file lists, sorted: their order in the file makes no difference.

    A line is a class, or a class followed by a space and whatever; ``#`` starts a remark.

    Args:
        path: The file; None chooses all.
        known: The classes there are.

    Raises:
        DataError: The file cannot be read, or a line is not one of the classes.
    """
    if path is None:
        return tuple(sorted(known))
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: cannot be read ({reason}) (--classes)") from error
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        name = text if text in known else text.split()[0]
        if name not in known:
            raise DataError(f"{path}: line {number}: {name} is none of the {len(known)} classes")
        if name in found:
            raise DataError(f"{path}: line {number}: {name} is listed twice")
        found.append(name)
    if not found:
        raise DataError(f"{path}: lists no class (--classes)")
    return tuple(sorted(found))
