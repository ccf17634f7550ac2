"""Backends are chosen above what they share, and refused in one line where they cannot be."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from vssl_dist.config import Normalisation, ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.errors import ConfigError

ROOM = Path(__file__).parents[3] / "vssl_dist" / "data"


def imported(path: Path) -> set[str]:
    """The modules of the data room that a file imports, at its top or inside a function."""
    tree = ast.walk(ast.parse(path.read_text()))
    nodes = [node for node in tree if isinstance(node, ast.ImportFrom) and node.module]
    names = {name for n in nodes for name in (n.module, *(f"{n.module}.{a.name}" for a in n.names))}
    prefix = "vssl_dist.data."
    return {name.removeprefix(prefix) for name in names if name and name.startswith(prefix)}


def test_no_module_of_the_data_layer_imports_itself_by_a_detour() -> None:
    files = {".".join(p.relative_to(ROOM).with_suffix("").parts): p for p in ROOM.rglob("*.py")}
    below = {name: imported(path) for name, path in files.items()}
    assert {"loader", "render", "store.dataset"} <= below.keys()
    while leaves := [name for name, needs in below.items() if not needs & below.keys()]:
        for name in leaves:
            del below[name]
    assert not below, f"in a circle: {sorted(below)}"


def test_a_backend_that_is_not_installed_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "vssl_dist.data.backends.dali", None)
    spec = BackendSpec((ViewRecipe(),), 32, Normalisation())
    with pytest.raises(ConfigError, match=r"data\.backend=dali: .*use data\.backend=reference"):
        build_backend("dali", spec)
    build_backend("reference", spec)


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_a_blur_that_reaches_beyond_the_view_is_refused_whichever_size_it_has(name: str) -> None:
    local = ViewRecipe(size=6)
    with pytest.raises(ConfigError, match="reaches 6 pixels, beyond views of 6 pixels"):
        build_backend(name, BackendSpec((ViewRecipe(), local), 32, Normalisation()))
    build_backend(name, BackendSpec((ViewRecipe(), ViewRecipe(size=7)), 32, Normalisation()))
