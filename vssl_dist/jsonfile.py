"""JSON of a run folder or beside an export, which somebody else may have written."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from vssl_dist.durable import read_regular_file
from vssl_dist.text import printable

_MAX_JSON_BYTES = 1 << 26
_MAX_SHOWN_CHARS = 60


def _refuse_control_characters(text: str) -> str:
    if control_character := next(
        (character for character in text if unicodedata.category(character) in ("Cc", "Zl", "Zp")),
        None,
    ):
        raise ValueError(f"holds the control character {control_character!r}")
    return text


OneLineText = Annotated[str, Field(max_length=1000), AfterValidator(_refuse_control_characters)]
"""Text of one line without control characters."""
StepNumber = Annotated[int, Field(ge=0, lt=10**10)]


def read_json(path: Path) -> Any:
    """Read a file of JSON as plain values.

    Raises:
        OSError: It cannot be read, is no regular file, or huge.
        ValueError: One line: it is not JSON, says a key twice, or is nested beyond reason.
    """
    json_bytes = read_regular_file(path, _MAX_JSON_BYTES)
    try:
        return json.loads(json_bytes.decode(), object_pairs_hook=_dict_of_unique_keys)
    except RecursionError:
        raise ValueError("nested beyond reason") from None


def _dict_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value_by_key = dict(pairs)
    if len(value_by_key) < len(pairs):
        keys = [name for name, _ in pairs]
        repeated_key = next(name for name in keys if keys.count(name) > 1)
        raise ValueError(f"{printable(repeated_key[:100])} stands twice")
    return value_by_key


def describe_first_error(error: ValidationError) -> str:
    """Describe the first fault of a validation in one line, with its key and value."""
    first_error = error.errors(include_url=False)[0]
    dotted_key = ".".join(str(key) for key in first_error["loc"])
    shown_value = repr(first_error["input"])
    shown_value = (
        shown_value
        if len(shown_value) <= _MAX_SHOWN_CHARS
        else f"{shown_value[:_MAX_SHOWN_CHARS]}..."
    )
    message = first_error["msg"].removeprefix("Value error, ")
    return printable(f"{dotted_key[:200]}: {message}, got {shown_value}".removeprefix(": "))
