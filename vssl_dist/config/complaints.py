"""Pydantic's complaint about a wrong config, as one line for whoever wrote the file."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from vssl_dist.config.evaluations import TASKS

_REMEDIES = {
    "int_type": "write a whole number in plain decimal digits, without quotes, such as 12",
    "float_type": "write a number in plain decimal digits, such as 12, 0.5 or 1e-3",
    "bool_type": "write true or false, without quotes",
    "string_type": "write text, in quotes where YAML reads it as something else",
    "is_instance_of": "write one path",
    "tuple_type": "write a list, such as [1, 2]",
    "dict_type": "write a block of keys and values",
    "model_type": "write a block of keys and values",
    "model_attributes_type": "write a block of keys and values",
}
"""Remedies by pydantic's name of the complaint, which speaks of Python's types."""


def _keys(model: type[BaseModel], loc: Sequence[Any]) -> list[str]:
    """The keys that the block at ``loc`` knows, for "did you mean"."""
    for key in loc:
        if isinstance(key, int):
            continue  # an entry of a list: its block is the list's
        field = model.model_fields.get(str(key))
        block = None if field is None else next(_blocks(field.annotation), None)
        if block is None:
            return []
        model = block
    return [*model.model_fields, *getattr(model, "shorthands", ())]


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    """The blocks in a type such as ``Block | None`` or ``tuple[Block, ...]``."""
    if (
        isinstance(annotation, type)
        and not get_args(annotation)
        and issubclass(annotation, BaseModel)
    ):
        yield annotation
    for inner in get_args(annotation):
        yield from _blocks(inner)


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first complaint as one line that names the key and, where it can, the remedy."""
    first = error.errors(include_url=False)[0]
    # pydantic names the task, which no key of the file does, after its place in the list.
    named = first["loc"][:1] == ("evaluations",) and first["loc"][2:3]
    task = TASKS.get(str(first["loc"][2])) if named else None
    loc = first["loc"] if task is None else first["loc"][:2] + first["loc"][3:]
    where = (prefix + ".".join(str(key) for key in loc)).removesuffix(".")
    if first["type"] == "extra_forbidden":
        keys = _keys(task, loc[2:-1]) if task else _keys(model, loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), keys, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"has: {', '.join(keys)}"
        return f"{where}: no such key ({hint})"
    if first["type"] == "missing":
        return f"{where}: this key is required"
    if first["type"].startswith("union_tag"):
        return f"{where}.task: must be one of {', '.join(TASKS)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}".removeprefix(": ")
    remedy = f": {_REMEDIES[first['type']]}" if first["type"] in _REMEDIES else ""
    return f"{where}: {message}, got {first['input']!r}{remedy}"
