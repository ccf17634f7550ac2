"""The packed JSON schemas are those of the models, and every shipped YAML file is as they say."""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml

from vssl_dist import config
from vssl_dist.cli import schema, typos
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS

ROOT = Path(__file__).parents[2]
KINDS = {"configs": "config", "slurm": "profile"}
SHIPPED = [path for folder in KINDS for path in sorted((ROOT / folder).glob("*.yaml"))]
TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None),
}  # fmt: skip


class Reader(yaml.SafeLoader):
    """YAML as editors read it: 1e-3 is a number."""


Reader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"),
    [*"+-0123456789"],
)


def is_a(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        return type(value) is int or (kind == "number" and type(value) is float)
    return isinstance(value, TYPES[kind])


def faults(value: Any, rule: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """Why a value is not as the rule says: the part of JSON schema that ours consist of."""
    if "$ref" in rule:
        rule = root["$defs"][rule["$ref"].rpartition("/")[2]] | {
            key: part for key, part in rule.items() if key != "$ref"
        }
    for several in ("anyOf", "oneOf"):
        if several in rule:
            fits = [not faults(value, option, root) for option in rule[several]]
            if not (sum(fits) == 1 if several == "oneOf" else any(fits)):
                return [f"{at}: fits {sum(fits)} of {several}"]
    if "enum" in rule and value not in rule["enum"]:
        return [f"{at}: {value!r} is not in {rule['enum']}"]
    if "const" in rule and value != rule["const"]:
        return [f"{at}: {value!r} is not {rule['const']!r}"]
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(is_a(value, kind) for kind in kinds):
        return [f"{at}: {value!r} is no {kinds}"]
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return [f"{at}: {value!r} does not match"]
    if is_a(value, "number"):
        bounds = [value >= rule.get("minimum", value), value <= rule.get("maximum", value)]
        bounds += [value > rule.get("exclusiveMinimum", value - 1)]
        return [] if all(bounds) else [f"{at}: {value} is out of bounds"]
    if isinstance(value, list):
        items = [*rule.get("prefixItems", [])]
        items += [rule.get("items", {})] * (len(value) - len(items))
        return [f for v, r in zip(value, items, strict=True) for f in faults(v, r, root, at)]
    if isinstance(value, dict):
        known = rule.get("properties", {})
        found = [f"{at}: lacks {key}" for key in rule.get("required", ()) if key not in value]
        for key, inner in value.items():
            if key in known:
                found += faults(inner, known[key], root, f"{at}.{key}")
            elif rule.get("additionalProperties") is False:
                found.append(f"{at}: has {key}")
        return found
    return []


@pytest.mark.parametrize("kind", KINDS.values())
def test_the_packed_schema_is_what_the_command_writes(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert schema.main([kind]) == 0
    assert capsys.readouterr().out == typos.schema_file(kind).read_text(), (
        f"vssl schema {kind} > {typos.schema_file(kind).relative_to(ROOT)}"
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_names_its_schema_first_and_is_as_it_says(path: Path) -> None:
    first, _, text = path.read_text().partition("\n")
    kind = KINDS[path.parent.name]
    _, _, relative = first.partition("# yaml-language-server: $schema=")
    assert (path.parent / relative).resolve() == typos.schema_file(kind)
    rules = schema.config_schema() if kind == "config" else schema.profile_schema()
    value = yaml.load(text, Reader)
    assert faults(value, rules, rules) == []
    if kind == "config":
        for key, wrong in (("optim", value["optim"] | {"epoch": 3}), ("seed", "x"), ("nokey", 1)):
            assert faults(value | {key: wrong}, rules, rules)
        assert faults(value | {"method": value["method"] | {"bta": 1}}, rules, rules)


def complaint(methods: Any, item: str) -> str:
    try:
        config.load(ROOT / "configs" / "quickstart.yaml", [item], methods=methods)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_method_s_keys_are_refused_in_the_same_words_with_and_without_torch(name: str) -> None:
    methods = typos._Methods()
    for key in CONFIGS[name].model_fields:
        for value in ("nonsense", "-1", "0", "[1]", "null", "true", "1.5", "[2, 3]"):
            item = f"method={{name: {name}, {key}: {value}}}"
            light = complaint(methods, item)
            real = complaint(CONFIGS, item)
            if light and light.startswith("method."):
                assert light == real, item
            elif real.startswith(f"method.{key}: Input"):
                assert "finite" in real or light == real, item


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_no_shipped_config_is_refused_without_torch(path: Path) -> None:
    if path.parent.name == "configs":
        typos.refuse_config(Namespace(config=path, overrides=()))
