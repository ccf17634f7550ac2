from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vssl_dist.commands.keys import (
    CONFIG_BLOCKS,
    block_markdown,
    key_rows,
    main,
)
from vssl_dist.config import ViewRecipe

ROOT = Path(__file__).parents[2]
OF_SURFACE = {"": "run", "data.views": "views", "data.normalise": "normalise"}
NAMES = {
    "whole number": (1, "0.5"),
    "number": (0.5, "a"),
    "true, false": (True, "yes"),
    "text": ("a", 1),
    "path": ("a", ""),
}
"""A value of the kind, which bounds may still refuse, and one that it never takes."""


def cells(block: str) -> dict[str, list[str]]:
    """Default, accepted values and meaning by key, read from the Markdown."""
    lines = block_markdown(block).splitlines()[4:]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert all(len(row) == 4 for row in table), "a cell holds the sign that ends cells"
    return {row[0].strip("`"): row[1:] for row in table}


@pytest.mark.parametrize("block", CONFIG_BLOCKS)
def test_every_key_has_its_default_and_a_meaning(block: str) -> None:
    model, found = CONFIG_BLOCKS[block][1], cells(block)
    for key, field in model.model_fields.items():
        if key in {"name", "task"} and block != "run" and block != "optim":
            assert key not in found  # it is the block's own name
            continue
        default, _, meaning = found[key]
        assert meaning.endswith("."), f"{block}.{key} has no meaning"
        if default == "required":
            assert field.is_required(), key
        elif default != "see there":
            made = field.get_default(call_default_factory=True)
            shown = default.strip("`")
            if isinstance(made, str | Path):
                assert shown == str(made)
            else:
                assert json.loads(shown) == (list(made) if isinstance(made, tuple) else made)


@pytest.mark.parametrize("block", CONFIG_BLOCKS)
def test_what_a_key_is_said_not_to_take_it_refuses(block: str) -> None:
    model = CONFIG_BLOCKS[block][1]

    def refused(key: str, value: Any) -> bool:
        try:
            model.model_validate({key: value})
        except ValidationError as error:
            return any(e["loc"][:1] == (key,) for e in error.errors())
        return False

    for key, _, takes, _ in key_rows(model):
        if key in ViewRecipe.shorthands and block == "views":
            continue
        kinds = takes.split("; ")
        assert refused(key, None) == ("null" not in kinds), key
        (kind,) = (name for name in kinds if name != "null")
        if kind in NAMES:
            right, wrong = NAMES[kind]
            assert refused(key, wrong), key
            assert kind == "text" or not refused(key, right), key
        for sign, low in (("<=", False), ("<", True)):
            bound = kind.partition(f" {sign} ")[0]
            if kind.startswith(f"{bound} {sign} ") and bound.replace(".", "").isdigit():
                edge = int(bound) if "whole" in kind else float(bound)
                assert refused(key, edge) == low, key
                assert refused(key, edge - 1), key
        choices = kind.split(", ")
        if kind not in NAMES and len(choices) > 1 and choices[0].isidentifier():
            assert not any(refused(key, choice) for choice in choices), key
            assert refused(key, "something else"), key


def test_the_page_is_what_the_command_prints_and_has_the_whole_schema() -> None:
    page = (ROOT / "docs" / "keys.md").read_text()
    printed = subprocess.run(
        [sys.executable, "launch/keys.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert page.endswith(f"\n\n{printed.stdout}"), "python launch/keys.py prints what belongs there"
    for dotted in (ROOT / "tests" / "config" / "surface.txt").read_text().split():
        place, _, key = dotted.rpartition(".")
        block = OF_SURFACE.get(place, place.rpartition(".")[2])
        assert key in {row[0] for row in key_rows(CONFIG_BLOCKS[block][1])} | {"task"}, dotted


def test_some_blocks_may_be_asked_for_and_a_wrong_one_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["vje", "optim"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("#")] == [
        "## `vje`: method: {name: vje, ...}",
        "## `optim`: optim",
    ]
    assert main(["optim", "optm"]) == 2
    assert capsys.readouterr() == ("", "error: no block 'optm': did you mean 'optim'?\n")
