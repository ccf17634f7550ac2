"""The JSON schema of configs or of profiles, which editors complete and check YAML with.

    vssl schema                 # of a config: vssl_dist/cli/config.schema.json
    vssl schema profile         # of a machine's profile, slurm/*.yaml

Every shipped YAML file names its schema on its first line; put the same line into your own:
"# yaml-language-server: $schema=PATH".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from vssl_dist.cli.typos import RULE_CONSTANTS, RULES
from vssl_dist.config import RECIPES, MethodConfig, RunConfig
from vssl_dist.jobs.resources import Resources
from vssl_dist.methods import CONFIGS
from vssl_dist.text import say

_DRAFT = "https://json-schema.org/draft/2020-12/schema"
_BOUNDS = {
    "gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum",
}  # fmt: skip
_INFINITE = r"^[+-]?\.?(inf|Inf|INF)$"


def config_schema() -> dict[str, Any]:
    """JSON schema of all that a user may write into a config."""
    schema = RunConfig.model_json_schema()
    blocks = schema["$defs"]
    del blocks["MethodConfig"]
    for model in CONFIGS.values():
        block = model.model_json_schema(ref_template="#/$defs/{model}")
        blocks |= block.pop("$defs", {})
        required = ["name", *block.get("required", ())]
        blocks[model.__name__] = block | {"required": required} | _rules(model)
    keys = schema["properties"]
    keys["method"] = {
        "description": keys["method"]["description"],
        "oneOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in CONFIGS.values()],
    }
    schema["required"].remove("name")  # the file's own, where there is none
    view = blocks["ViewRecipe"]
    view.pop("required", None)  # a recipe may have them
    view["properties"] |= {
        "recipe": {
            "enum": list(RECIPES),
            "description": "Recipe whose values the entry starts from.",
        },
        "count": {"type": "integer", "minimum": 1, "description": "Views the entry stands for."},
    }
    views = blocks["DataConfig"]["properties"]["views"]
    views["items"] = {"anyOf": [{"enum": list(RECIPES)}, {"$ref": "#/$defs/ViewRecipe"}]}
    return {"$schema": _DRAFT} | _as_written(schema)


def _rules(method: type[MethodConfig]) -> dict[str, Any]:
    """Constants that rules between a method's keys and a run's ask for; none if they need code."""
    rules = ("views_wanted", "wrong_sizes")
    if any(getattr(method, rule) is not getattr(MethodConfig, rule) for rule in rules):
        return {}
    return {RULES: {name: getattr(method, name) for name in RULE_CONSTANTS}}


def profile_schema() -> dict[str, Any]:
    """JSON schema of all that a user may write into a profile."""
    return {"$schema": _DRAFT} | _as_written(Resources.model_json_schema())


def _as_written(schema: dict[str, Any]) -> dict[str, Any]:
    """Pydantic's schema in the words of JSON schema, for values as YAML files have them."""
    plain = {_BOUNDS.get(key, key): _inside(inner) for key, inner in schema.items()}
    if isinstance(plain.get("type"), str):
        if plain["type"] == "array":
            for length, items in (("minLength", "minItems"), ("maxLength", "maxItems")):
                if length in plain:
                    plain[items] = plain.pop(length)
        if plain["type"] == "number":  # `inf` without YAML's dot is text to other readers
            plain |= {"type": ["number", "string"], "pattern": _INFINITE}
        plain.pop("title", None)
    return plain


def _inside(value: Any) -> Any:
    if isinstance(value, list):
        return [_inside(entry) for entry in value]
    return _as_written(value) if isinstance(value, dict) else value


def _text(name: str) -> Iterator[str]:
    schema = config_schema() if name == "config" else profile_schema()
    yield from json.dumps(schema, indent=1).splitlines()


def main(argv: Sequence[str]) -> int:
    """Print the schema; exit code 0."""
    from vssl_dist.cli.program import arguments

    say(*_text(arguments("schema", argv).kind))
    return 0
