"""Plain words of YAML, read as the type of their key says: nothing is guessed before.

YAML 1.1 reads ``012`` as ten, ``1:30`` as ninety, ``1_0`` as ten and ``no`` as false.  Here a
scalar keeps its characters until the type of its key is known: text stays as it was typed, and
a number is what everybody reads as that number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

_WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,999})")
_DECIMAL = re.compile(r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?")
_INFINITE = re.compile(r"[+-]?\.?(inf|Inf|INF)")
_SEVERAL_READINGS = re.compile(
    r"[+-]?([0-9][0-9_]*(:[0-9_]+)*(\.[0-9_]*)?([eE][+-]?[0-9_]+)?|0[xXoObB][0-9a-fA-F_]+)"
)
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUE, _FALSE = {"true", "True", "TRUE"}, {"false", "False", "FALSE"}
_OTHER_TRUTHS = {"yes", "no", "on", "off", "y", "n"}
_LARGEST_EXPONENT = 18


class Plain(str):
    """A scalar without quotes, in the characters of the file."""


def as_float(text: str) -> float | None:
    """The number that ``text`` is in plain decimal notation, or ``inf``; None: it is none.

    >>> as_float("1e-3"), as_float("012"), as_float("1_0")
    (0.001, None, None)
    """
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    number = float(text) if _DECIMAL.fullmatch(text) else math.inf
    return None if math.isinf(number) else number


def _as_int(text: str) -> int | None:
    if _WHOLE.fullmatch(text):
        return int(text)
    if not _DECIMAL.fullmatch(text) or "e" not in text.lower():
        return None
    number = Decimal(text)  # 1e5 is whole, and exactly so
    small = number.adjusted() <= _LARGEST_EXPONENT
    return int(number) if small and number == number.to_integral_value() else None


def typed(value: Any, annotation: Any, where: str = "", *, path: Callable[[str], str] = str) -> Any:
    """Turn each plain scalar of what YAML gave into what its key's type takes.

    What a type does not take is left as text, for the type to refuse.

    Args:
        value: Mappings, lists and scalars, the plain ones as `Plain`.
        annotation: Type of the key that the value belongs to.
        where: The key, dotted, for messages.
        path: Function that a text whose type is a path goes through.

    Raises:
        ValueError: One line that names the key: a number or a truth that different readers of
            YAML take for different things, or what ``path`` refuses.
    """
    options = list(_options(annotation))
    if isinstance(value, dict):
        return {
            str(key): typed(inner, _below(options, value, str(key)), f"{where}{key}.", path=path)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        items = [_item(options, number) for number in range(len(value))]
        return [
            typed(inner, item, f"{where}{number}.", path=path)
            for number, (inner, item) in enumerate(zip(value, items, strict=True))
        ]
    if not isinstance(value, str):
        return value
    leaves = set(_leaves(options))
    read = _scalar(value, leaves, where.removesuffix(".")) if isinstance(value, Plain) else value
    if Path not in leaves or not isinstance(read, str):
        return read
    try:
        return path(read)
    except ValueError as error:
        raise ValueError(f"{where.removesuffix('.')}: {error}") from None


def _scalar(text: str, leaves: set[Any], where: str) -> Any:
    words = leaves & {str, Path}
    typeless = not leaves & {str, Path, int, float, bool}
    if text in _NULL and (not words or NoneType in leaves or not text):
        return None
    if text in _NULL - {"~"} and Path in leaves:
        return None  # nobody means a folder of that name
    if text in _TRUE | _FALSE and (bool in leaves or typeless):
        return text in _TRUE
    if (int in leaves or typeless) and (integer := _as_int(text)) is not None:
        return integer
    if (float in leaves or typeless) and (number := as_float(text)) is not None:
        return number
    if words or typeless:
        return str(text)
    if leaves & {int, float} and _SEVERAL_READINGS.fullmatch(text):
        if _DECIMAL.fullmatch(text):  # a fraction, where only whole numbers are taken
            return str(text)
        raise ValueError(
            f"{where}: {text} is different numbers to different readers: write plain decimal "
            "digits (no leading zeros, underscores, colons or 0x), such as 12 or 1e-3"
        )
    if bool in leaves and text.lower() in _OTHER_TRUTHS:
        raise ValueError(f"{where}: {text} is not a truth to every reader: write true or false")
    return str(text)


def _options(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _options(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for option in get_args(annotation):
            yield from _options(option)
    elif origin is Literal:
        yield from {type(value) for value in get_args(annotation)}
    else:
        yield annotation


def _leaves(options: list[Any]) -> Iterator[Any]:
    """The scalar types among alternatives; one value may stand for a list of one."""
    for option in options:
        if get_origin(option) is tuple:
            yield from _leaves(list(_options(get_args(option)[0])))
        else:
            yield option


def _item(options: list[Any], number: int) -> Any:
    for option in options:
        if get_origin(option) is tuple:
            entries = get_args(option)
            if entries[-1] is Ellipsis:
                return entries[0]
            return entries[number] if number < len(entries) else Any
    return Any


def _below(options: list[Any], value: Mapping[str, Any], key: str) -> Any:
    """The annotation of ``key`` in a mapping of one of these types."""
    for option in options:
        if get_origin(option) is dict:
            return get_args(option)[1]
    blocks = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
    for block in blocks:
        if len(blocks) == 1 or _is(block, value):
            annotations = {name: field.annotation for name, field in block.model_fields.items()}
            return (getattr(block, "shorthands", {}) | annotations).get(key, Any)
    return Any


def _is(block: type[BaseModel], value: Mapping[str, Any]) -> bool:
    """Whether the key that tells blocks apart says that ``value`` is this one."""
    fields = block.model_fields.items()
    names = {
        key: get_args(f.annotation) for key, f in fields if get_origin(f.annotation) is Literal
    }
    tags = {key: names[key] for key in names if len(names[key]) == 1}
    return any(value.get(key) == tag for key, (tag,) in tags.items())
