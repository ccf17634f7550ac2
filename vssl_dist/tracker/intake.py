"""Files of a run folder, read as data that may be anybody's: they cost no wait and no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from vssl_dist.durable import open_regular_file, resolve_trusted_links
from vssl_dist.jsonfile import read_json

_COUNT_LIMIT = 2**63


def open_safely(path: Path) -> BinaryIO:
    """Open a file of a run folder for reading, through no link of another user.

    Raises:
        OSError: There is none, it is a folder, a pipe or a device, or a link of another user.
    """
    return open_regular_file(resolve_trusted_links(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object that a file of JSON holds.

    Raises:
        OSError: See `open_safely`.
        ValueError: It is no object, or none that one of our programs has written.
    """
    facts = read_json(resolve_trusted_links(path))
    if not isinstance(facts, dict):
        raise ValueError(f"{path} holds no object")
    return facts


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value can be a step, an offset or a time: not negative, not of 100 digits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _COUNT_LIMIT


def is_text_mapping(value: object) -> TypeGuard[dict[str, str]]:
    """Whether a value is an object that holds nothing but text."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
