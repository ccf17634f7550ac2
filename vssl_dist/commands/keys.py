"""Every key of a config and of a machine's profile: its default, what it takes, what it means.

    python launch/keys.py               # all of them: docs/keys.md
    python launch/keys.py optim vje     # those blocks

The schema itself is asked, so this is what this version takes.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vssl_dist.cli.program import arguments as typed
from vssl_dist.config import (
    RECIPES,
    TASKS,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    Model,
    Normalisation,
    OnlineConfig,
    OptimConfig,
    RunConfig,
    ViewRecipe,
)
from vssl_dist.jobs.resources import EvaluationResources, Resources
from vssl_dist.methods import CONFIGS
from vssl_dist.text import say

BLOCKS: dict[str, tuple[str, type[Model]]] = {
    "run": ("the config itself", RunConfig),
    **{name: (f"method: {{name: {name}, ...}}", model) for name, model in CONFIGS.items()},
    "data": ("data", DataConfig),
    "views": ("an entry of data.views", ViewRecipe),
    "normalise": ("data.normalise", Normalisation),
    "optim": ("optim", OptimConfig),
    "engine": ("engine", EngineConfig),
    "checkpoint": ("checkpoint", CheckpointConfig),
    **{name: (f"evaluations: - {{task: {name}, ...}}", task) for name, task in TASKS.items()},
    "online": ("online", OnlineConfig),
    "profile": ("a machine's profile, slurm/*.yaml", Resources),
    "evaluation": ("evaluation, of a profile", EvaluationResources),
}
"""By the name that a user types: where the block stands, and its model."""
_LOWER = {"gt": "<", "exclusiveMinimum": "<", "ge": "<=", "minimum": "<="}
_UPPER = {"lt": "<", "exclusiveMaximum": "<", "le": "<=", "maximum": "<="}
_TYPES = {"integer": "whole number", "number": "number", "boolean": "true, false", "null": "null"}


def takes(schema: Mapping[str, Any]) -> str:
    """What a JSON schema accepts, in words.

    >>> takes({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]})
    '0 < whole number; null'
    """
    if "anyOf" in schema:
        return "; ".join(takes(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "prefixItems" in schema:
        return f"[{', '.join(takes(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return (
            f"list of {takes(schema['items'])}" if "type" in schema["items"] else "list of blocks"
        )
    if "$ref" in schema:
        return "block"
    if schema.get("type") == "object":
        (value,) = schema.get(
            "patternProperties", {"": schema.get("additionalProperties")}
        ).values()
        return f"name: {takes(value)}"
    kind = _TYPES.get(schema["type"], schema.get("format", "text"))
    lower = [f"{schema[key]} {sign} " for key, sign in _LOWER.items() if key in schema]
    upper = [f" {sign} {schema[key]}" for key, sign in _UPPER.items() if key in schema]
    return "".join([*lower, kind, *upper])


def rows(model: type[Model]) -> Iterator[tuple[str, str, str, str]]:
    """Key, default, accepted values and meaning of everything that a block's user may set."""
    for key, schema in model.model_json_schema()["properties"].items():
        if "const" in schema:
            continue  # it names the block
        field = model.model_fields[key]
        default = "required" if field.is_required() else _yaml(schema.get("default", {}))
        yield key, default, takes(schema), " ".join((field.description or "").split())
    if model is ViewRecipe:
        yield "recipe", "none", ", ".join(RECIPES), "Recipe whose values the entry starts from."
        yield "count", "`1`", "0 < whole number", "Number of views that the entry stands for."


def markdown(name: str) -> str:
    """A block as a section with a table."""
    where, model = BLOCKS[name]
    lines = [
        f"## `{name}`: {where}",
        "",
        "| key | default | takes | meaning |",
        "|---|---|---|---|",
    ]
    for key, default, accepted, meaning in rows(model):
        lines.append(f"| `{key}` | {default} | {accepted} | {meaning.replace('``', '`')} |")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return "see there"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the user typed; what is wrong with it ends the program with 2."""
    return typed("keys", argv)


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 2 with one line where there is no such block."""
    wanted = arguments(argv).blocks
    for name in wanted:
        if name not in BLOCKS:
            close = difflib.get_close_matches(name, BLOCKS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(BLOCKS)}"
            say(f"error: no block {name!r}: {hint}", error=True)
            return 2
    say(*"\n".join(markdown(name) for name in wanted or BLOCKS).splitlines())
    return 0
