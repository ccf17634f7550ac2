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

CONFIG_BLOCKS: dict[str, tuple[str, type[Model]]] = {
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
"""Where each block stands in a config or profile, and its model, by the name that a user types."""
_LOWER_BOUND_SIGNS = {"gt": "<", "exclusiveMinimum": "<", "ge": "<=", "minimum": "<="}
_UPPER_BOUND_SIGNS = {"lt": "<", "exclusiveMaximum": "<", "le": "<=", "maximum": "<="}
_TYPE_WORDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true, false",
    "null": "null",
}


def accepted_values(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema accepts.

    >>> accepted_values({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "null"}]})
    '0 < whole number; null'
    """
    if "anyOf" in schema:
        return "; ".join(accepted_values(alternative) for alternative in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "prefixItems" in schema:
        return f"[{', '.join(accepted_values(item) for item in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        items = schema["items"]
        return f"list of {accepted_values(items) if 'type' in items else 'blocks'}"
    if "$ref" in schema:
        return "block"
    if schema.get("type") == "object":
        (value,) = schema.get(
            "patternProperties", {"": schema.get("additionalProperties")}
        ).values()
        return f"name: {accepted_values(value)}"
    type_name = _TYPE_WORDS.get(schema["type"], schema.get("format", "text"))
    lower_bounds = [
        f"{schema[key]} {sign} " for key, sign in _LOWER_BOUND_SIGNS.items() if key in schema
    ]
    upper_bounds = [
        f" {sign} {schema[key]}" for key, sign in _UPPER_BOUND_SIGNS.items() if key in schema
    ]
    return "".join([*lower_bounds, type_name, *upper_bounds])


def key_rows(model: type[Model]) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, default, accepted values and meaning of everything that may be set in a block."""
    for key, schema in model.model_json_schema()["properties"].items():
        if "const" in schema:
            continue  # it names the block
        field = model.model_fields[key]
        default = "required" if field.is_required() else _default_text(schema.get("default", {}))
        yield key, default, accepted_values(schema), " ".join((field.description or "").split())
    if model is ViewRecipe:
        yield "recipe", "none", ", ".join(RECIPES), "Recipe whose values the entry starts from."
        yield "count", "`1`", "0 < whole number", "Number of views that the entry stands for."


def block_markdown(name: str) -> str:
    """Write a block as a section of Markdown with a table."""
    block_place, model = CONFIG_BLOCKS[name]
    lines = [
        f"## `{name}`: {block_place}",
        "",
        "| key | default | takes | meaning |",
        "|---|---|---|---|",
    ]
    for key, default, accepted_text, meaning in key_rows(model):
        lines.append(f"| `{key}` | {default} | {accepted_text} | {meaning.replace('``', '`')} |")
    return "\n".join(lines) + "\n"


def _default_text(value: object) -> str:
    if isinstance(value, Mapping) and value:
        return "see there"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("keys", argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 after one line where there is no such block."""
    block_names = arguments(argv).blocks
    for name in block_names:
        if name not in CONFIG_BLOCKS:
            close_names = difflib.get_close_matches(name, CONFIG_BLOCKS, n=1)
            hint = (
                f"did you mean {close_names[0]!r}?"
                if close_names
                else f"there are {', '.join(CONFIG_BLOCKS)}"
            )
            say(f"error: no block {name!r}: {hint}", to_stderr=True)
            return 2
    say(*"\n".join(block_markdown(name) for name in block_names or CONFIG_BLOCKS).splitlines())
    return 0
