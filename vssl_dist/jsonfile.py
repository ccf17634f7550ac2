"""JSON of a run folder or beside an export, which somebody else may have written."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from vssl_dist.durable import read_regular
from vssl_dist.text import printable

_MAX_BYTES = 1 << 26
_SHOWN = 60


def _refuse_control(text: str) -> str:
    if strange := next((c for c in text if unicodedata.category(c) in ("Cc", "Zl", "Zp")), None):
        raise ValueError(f"holds the control character {strange!r}")
    return text


Line = Annotated[str, Field(max_length=1000), AfterValidator(_refuse_control)]
"""Text of one line without control characters."""
Step = Annotated[int, Field(ge=0, lt=10**10)]


def read_json(path: Path) -> Any:
    """Read a file of JSON as plain values.

    Raises:
        OSError: It cannot be read, is no regular file, or huge.
        ValueError: One line: it is not JSON, says a key twice, or is nested beyond reason.
    """
    text = read_regular(path, _MAX_BYTES)
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("nested beyond reason") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    facts = dict(pairs)
    if len(facts) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{printable(twice[:100])} stands twice")
    return facts


def first_complaint(error: ValidationError) -> str:
    """Describe the first fault of a validation in one line, with its key and value."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(key) for key in first["loc"])
    value = repr(first["input"])
    value = value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
    message = first["msg"].removeprefix("Value error, ")
    return printable(f"{where[:200]}: {message}, got {value}".removeprefix(": "))
