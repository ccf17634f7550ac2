"""A list of classes to keep, as a text file: ``imagenet100.txt`` beside this file is one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssl_dist.errors import DataError


def read_class_list(path: Path | None, known_classes: Sequence[str]) -> tuple[str, ...]:
    """Read the classes that a file lists, sorted: their order in the file makes no difference.

    A line is a class, or a class followed by a space and whatever; ``#`` starts a remark.

    Args:
        path: The file; None chooses all.
        known_classes: The classes there are.

    Raises:
        DataError: The file cannot be read, or a line is not one of the classes.
    """
    if path is None:
        return tuple(sorted(known_classes))
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise DataError(f"{path}: cannot be read ({reason}) (--classes)") from error
    classes: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        name = text if text in known_classes else text.split()[0]
        if name not in known_classes:
            raise DataError(
                f"{path}: line {number}: {name} is none of the {len(known_classes)} classes"
            )
        if name in classes:
            raise DataError(f"{path}: line {number}: {name} is listed twice")
        classes.append(name)
    if not classes:
        raise DataError(f"{path}: lists no class (--classes)")
    return tuple(sorted(classes))
