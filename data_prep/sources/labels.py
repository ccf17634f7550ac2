"""The label of a WebDataset's sample, as the text or the JSON that somebody wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

JSON_KEYS = ("label", "cls", "class")
"""What the label may be called in a JSON member that is not asked for a key."""
_NUMBER = re.compile(r"(-?)(?:0(?=[0-9]))*+([0-9]+?)(?:\.0)?")
_MOST_DIGITS = 9
"""Of a number: longer ones are names."""
_MARK = "\ufeff"
_SHOWN = 12

Label = int | str | None


def parse_label(text: str) -> int | str:
    """A label as a number or as a name: without byte order mark, blanks, leading zeros and ``.0``.

    Raises:
        ValueError: It is empty, or a number in a form that could mean several things.

    >>> parse_label("007"), parse_label(" 3.0\\n"), parse_label("cat")
    (7, 3, 'cat')
    """
    stripped = text.strip().strip(_MARK).strip()
    if not stripped:
        raise ValueError("it is empty")
    match = _NUMBER.fullmatch(stripped)
    if match and len(match[2]) > _MOST_DIGITS:
        return match[1] + match[2]
    if match and not (match[1] and (match[2] == "0" or stripped[1] == "0")):
        return int(match[1] + match[2])
    if match or _is_number(stripped):
        raise ValueError(f"{stripped!r:.40} could be a number, but is no plain whole one")
    return stripped


def _is_number(text: str) -> bool:
    """Whether any program might take it for a number."""
    for reads in (float, lambda digits: int(digits, 0)):
        try:
            reads(text)
        except ValueError:
            continue
        return True
    return False


def label_in_json(told: object, key: str = "") -> Label:
    """The label that a JSON member states; null states none.

    Args:
        told: What the member holds.
        key: Where in it, with dots between the keys of objects in objects; "" looks for it.

    Raises:
        ValueError: There is no such key, or no label at it.
    """
    if key:
        value = _at(told, key)
    else:
        values = [told.get(name) for name in JSON_KEYS] if isinstance(told, dict) else []
        value = next((each for each in values if each is not None), None)
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{value!r:.40} is neither a whole number nor a name")
    return parse_label(str(value))


def _at(told: object, key: str) -> object:
    if isinstance(told, dict) and key in told:
        return told[key]
    first, dot, rest = key.partition(".")
    if dot and isinstance(told, dict) and first in told:
        return _at(told[first], rest)
    there = f"only {join_names(told)}" if isinstance(told, dict) and told else "but no keys at all"
    raise ValueError(f"it has no {key}, {there}")


def join_names(names: Mapping[str, object]) -> str:
    """Names, in one line of bounded length.

    >>> join_names({"b": 1, "a": 2})
    'a, b'
    """
    shown = sorted(names)[:_SHOWN]
    return ", ".join(f"{name:.40}" for name in shown) + (", ..." if len(names) > _SHOWN else "")


def read_label(field: str, key: str, data: bytes) -> Label:
    """The label in the member of a sample.

    Args:
        field: What the member is called, without the sample's key.
        key: Where in a JSON member; "" looks for it.
        data: The member.

    Raises:
        ValueError: There is none that can be understood.
    """
    if key or field.rpartition(".")[2] == "json":
        return label_in_json(json.loads(data), key)
    return parse_label(data.decode("utf-8-sig"))
