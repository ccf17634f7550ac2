"""Mistakes of a command line that show without torch: keys, names, plain values.

The models of the methods' keys live beside their networks, so they are read here from the schema
that `vssl schema` writes.  It says less than the models do: what passes here is checked again.
"""

from __future__ import annotations

import difflib
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from vssl_dist.cli.places import refuse_unknown
from vssl_dist.errors import ConfigError

if TYPE_CHECKING:
    from vssl_dist.config import RunConfig

BLOCKS = (
    "data", "views", "normalise", "optim", "engine", "checkpoint", "online", "profile",
    "evaluation",
)  # fmt: skip
"""Blocks of ``vssl keys`` besides the run itself, its methods and its tasks."""
RULES = "x-rules"
"""Key of a method's schema: the constants that rules between keys ask it for."""
RULE_CONSTANTS = ("has_posterior", "global_views", "local_views_key")
"""Class variables of ``MethodConfig``, of which rules consist."""
_SCHEMAS = Path(__file__).parent


def schema_file(name: str) -> Path:
    """The packed schema of ``config`` or ``profile``."""
    return _SCHEMAS / f"{name}.schema.json"


def refuse_names(option: str, text: str, choices: Sequence[str]) -> None:
    """Refuse an option's names, with commas between, if one of them is not a choice.

    Raises:
        ValueError: One line with the nearest choice.
    """
    for name in (name.strip() for name in text.split(",")):
        if name not in choices:
            close = difflib.get_close_matches(name, choices, n=1)
            meant = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{option} {text}: {name!r} is not one of {', '.join(choices)}{meant}")


def refuse_blocks(args: Namespace) -> None:
    """Refuse a block that ``vssl keys`` does not have.

    Raises:
        ValueError: One line with the nearest.
    """
    from vssl_dist.config import TASKS

    blocks = ["run", *_Methods(), *TASKS, *BLOCKS]
    for name in args.blocks:
        if name not in blocks:
            close = difflib.get_close_matches(name, blocks, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(blocks)}"
            raise ValueError(f"no block {name!r}: {hint}")


def refuse_run(args: Namespace) -> None:
    """Refuse a run for what its config, its profile and the name of its backbone tell.

    Raises:
        ConfigError: One line, as the full check says it.
    """
    from vssl_dist.models.names import check_spelling

    if (cfg := _read_config(args)) is not None:
        check_spelling(cfg.method.backbone)


def refuse_config(args: Namespace) -> None:
    """Refuse a config and its overrides for what their keys and values alone tell.

    Raises:
        ConfigError: One line, as the models themselves say it.
    """
    _read_config(args)


def _read_config(args: Namespace) -> RunConfig | None:
    """Read the config and the profile; None where a rule asks a method for more than constants."""
    from pydantic import ValidationError

    from vssl_dist import config

    profile = getattr(args, "profile", None)
    refuse_unknown("configs", args.config)
    if profile is not None:
        refuse_unknown("slurm", profile)
    methods = _Methods()
    try:
        cfg = config.load(args.config, args.overrides, methods=methods)
    except ConfigError as error:
        cause = error.__cause__
        between_keys = isinstance(cause, ValidationError) and not cause.errors()[0]["loc"]
        if between_keys and not methods.have_constant_rules:
            return None
        raise
    if profile is not None:
        from vssl_dist.jobs.resources import load_profile

        load_profile(profile)
    return cfg


@lru_cache
def _definitions() -> dict[str, Any]:
    definitions: dict[str, Any] = json.loads(schema_file("config").read_text())["$defs"]
    return definitions


class _Methods(Mapping[str, Any]):
    """Each method's keys by its name, made into a model when it is asked for."""

    def __init__(self) -> None:
        blocks = _definitions().values()
        names = (block["properties"].get("name", {}).get("const") for block in blocks)
        named = zip(names, blocks, strict=True)
        self._blocks = {name: block for name, block in named if name is not None}
        self._models: dict[str, Any] = {}

    @property
    def have_constant_rules(self) -> bool:
        """Whether the schema says all that rules between keys ask of any method."""
        return all(RULES in block for block in self._blocks.values())

    def __getitem__(self, name: str) -> Any:
        if name not in self._models:
            self._models[name] = self._model(name)
        return self._models[name]

    def _model(self, name: str) -> Any:
        from pydantic import create_model

        from vssl_dist.config import MethodConfig

        keys = self._blocks[name]["properties"]
        base = type(name, (MethodConfig,), dict(self._blocks[name].get(RULES, {})))
        fields: dict[str, Any] = {
            key: (_annotation(schema), schema.get("default", ...)) for key, schema in keys.items()
        }
        return create_model(name, __base__=base, **fields)

    def __iter__(self) -> Iterator[str]:
        return iter(self._blocks)

    def __len__(self) -> int:
        return len(self._blocks)


def _annotation(schema: Mapping[str, Any]) -> Any:
    """The type that a key of this schema has; anything where this module does not know better."""
    from pydantic import BeforeValidator, Field

    from vssl_dist.config.fields import Float, as_tuple

    if "anyOf" in schema:
        alternatives = [_annotation(option) for option in schema["anyOf"]]
        return Union[tuple(alternatives)]  # noqa: UP007
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if values:
        return Literal[tuple(values)]
    bounds = {
        constraint: schema[key]
        for key, constraint in (
            ("exclusiveMinimum", "gt"), ("minimum", "ge"), ("exclusiveMaximum", "lt"),
            ("maximum", "le"),
        )
        if key in schema
    }  # fmt: skip
    json_type = schema.get("type")
    if json_type == "array":
        items: list[Any] = [_annotation(item) for item in schema.get("prefixItems", ())]
        if not items and "items" in schema:
            items = [_annotation(schema["items"]), ...]
        row: Any = tuple.__class_getitem__(tuple(items))
        return Annotated[row, BeforeValidator(as_tuple)] if items else Any
    plain: dict[str, Any] = {
        "string": str,
        "integer": int,
        "boolean": bool,
        "null": None,
        "number": Float,
    }
    # `vssl schema` writes a number as "number or string", because of `inf`.
    may_be_infinite = isinstance(json_type, list) and "number" in json_type
    annotation: Any = Float if may_be_infinite else plain.get(str(json_type), Any)
    return Annotated[annotation, Field(**bounds)] if bounds else annotation
