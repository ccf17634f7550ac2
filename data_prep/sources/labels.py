"""The label of a WebDataset's sample, as the text or the JSON that somebody wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

JSON_LABEL_KEYS = ("label", "cls", "class")
"""What the label may be called in a JSON member that is not asked for a key."""
_NUMBER_PATTERN = re.compile(r"(-?)(?:0(?=[0-9]))*+([0-9]+?)(?:\.0)?")
_MAX_LABEL_DIGITS = 9
"""Digits that a number may have: longer ones are names."""
_BYTE_ORDER_MARK = "\ufeff"
_MAX_SHOWN_NAMES = 12

SampleLabel = int | str | None


def parse_label(text: str) -> int | str:
    """Parse a label as a number or as a name.

    A byte order mark, blanks, and a number's leading zeros and ``.0`` are dropped.

    Raises:
        ValueError: It is empty, or a number in a form that could mean several things.

    >>> parse_label("007"), parse_label(" 3.0\\n"), parse_label("cat")
    (7, 3, 'cat')
    """
    stripped_text = text.strip().strip(_BYTE_ORDER_MARK).strip()
    if not stripped_text:
        raise ValueError("it is empty")
    number_match = _NUMBER_PATTERN.fullmatch(stripped_text)
    if number_match and len(number_match[2]) > _MAX_LABEL_DIGITS:
        return number_match[1] + number_match[2]
    if number_match and not (
        number_match[1] and (number_match[2] == "0" or stripped_text[1] == "0")
    ):
        return int(number_match[1] + number_match[2])
    if number_match or _looks_like_number(stripped_text):
        raise ValueError(f"{stripped_text!r:.40} could be a number, but is no plain whole one")
    return stripped_text


def _looks_like_number(text: str) -> bool:
    """Tell whether any program might take a text for a number."""
    for parse in (float, lambda digits: int(digits, 0)):
        try:
            parse(text)
        except ValueError:
            continue
        return True
    return False


def find_json_label(content: object, key: str = "") -> SampleLabel:
    """Take the label that a JSON member states; null states none.

    Args:
        content: What the member holds.
        key: Where in the member, with dots between the keys of objects in objects; "" looks for it.

    Raises:
        ValueError: There is no such key, or no label at it.
    """
    if key:
        value = _find_json_value(content, key)
    else:
        values = (
            [content.get(name) for name in JSON_LABEL_KEYS] if isinstance(content, dict) else []
        )
        value = next((value for value in values if value is not None), None)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r:.40} is neither a whole number nor a name")
    return parse_label(str(value))


def _find_json_value(content: object, key: str) -> object:
    if isinstance(content, dict) and key in content:
        return content[key]
    first_key, key_separator, later_keys = key.partition(".")
    if key_separator and isinstance(content, dict) and first_key in content:
        return _find_json_value(content[first_key], later_keys)
    known_keys_text = (
        f"only {join_names(content)}"
        if isinstance(content, dict) and content
        else "but no keys at all"
    )
    raise ValueError(f"it has no {key}, {known_keys_text}")


def join_names(names: Mapping[str, object]) -> str:
    """Join names in one line of bounded length.

    >>> join_names({"b": 1, "a": 2})
    'a, b'
    """
    shown_names = sorted(names)[:_MAX_SHOWN_NAMES]
    return ", ".join(f"{name:.40}" for name in shown_names) + (
        ", ..." if len(names) > _MAX_SHOWN_NAMES else ""
    )


def read_label(field: str, key: str, data: bytes) -> SampleLabel:
    """Read the label in a member of a sample.

    Args:
        field: The member's name without the sample's key.
        key: Where in a JSON member; "" looks for it.
        data: The content of the member.

    Raises:
        ValueError: There is none that can be understood.
    """
    if key or field.rpartition(".")[2] == "json":
        return find_json_label(json.loads(data), key)
    return parse_label(data.decode("utf-8-sig"))
