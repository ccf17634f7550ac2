"""The house stands: imports only go down, each vendor has one door, nothing runs at import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vssl_dist"
FLOORS = [
    {"text", "confidential"},
    {
        "config",
        "schedule",
        "dist",
        "densities",
        "vision",
        "durable",
        "state",
        "installed",
        "environment",
        "bars",
        "locks",
    },
    {"models"},
    {"methods", "data", "optim", "teacher", "checkpoint", "tracker", "zero"},
    {"export"},
    {"engine", "evaluation", "trace", "linter"},
    {"resume"},
    {"train"},
    {"jobs"},
]
CONTRACTS = {"vssl_dist.methods.base", "vssl_dist.data.loader", "vssl_dist.data.shards"}
DOORS = {
    "deepspeed": {"vssl_dist/engine.py"},
    "submitit": {"vssl_dist/jobs"},
    "mlflow": {"vssl_dist/tracker"},
    "nvidia": {f"vssl_dist/data/{name}.py" for name in ("dali", "decoder", "graph")},
    "torchvision": {"vssl_dist/vision.py"},
    "webdataset": {"data_prep"},
}
FORBIDDEN = {"utils.py", "helpers.py", "common.py", "misc.py"}


def sources(*rooms: str) -> list[Path]:
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", sources("vssl_dist"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        assert parts[0] not in {"launch", "data_prep", "tests"}, f"{path}: imports {name}"
        if parts[0] != "vssl_dist" or len(parts) < 2 or parts[1] == "__version__":
            continue
        sideways_contract = any(name.startswith(c) for c in CONTRACTS) and floor(parts[1]) <= floor(
            room
        )
        down = floor(parts[1]) < floor(room)
        assert parts[1] == room or down or sideways_contract, f"{path}: climbs to {name}"


def test_each_vendor_has_one_door() -> None:
    for path in sources("vssl_dist", "launch", "data_prep"):
        place = path.relative_to(ROOT).as_posix()
        for name in imports(path):
            doors = DOORS.get(name.split(".")[0])
            if doors is not None:
                assert any(place.startswith(door) for door in doors), f"{place} imports {name}"


@pytest.mark.parametrize(
    "path", sources("vssl_dist", "launch", "data_prep", "bench"), ids=lambda p: p.name
)
def test_every_file_says_what_it_is_for_and_no_function_takes_a_crowd(path: Path) -> None:
    assert path.name not in FORBIDDEN
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            parameters = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
            assert parameters <= 7, f"{path}:{node.lineno}: {node.name} takes {parameters}"


def test_nothing_runs_at_import() -> None:
    quiet = (
        ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
        ast.Assign, ast.AnnAssign, ast.Try,
    )  # fmt: skip
    for path in sources("vssl_dist", "launch", "data_prep"):
        for node in ast.parse(path.read_text()).body:
            text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            guard = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            assert isinstance(node, quiet) or text or guard or typing, f"{path}:{node.lineno}"


def test_the_top_level_is_the_agreed_one() -> None:
    agreed = {
        "pyproject.toml", "README.md", "launch", "vssl_dist", "data_prep", "configs", "tests",
        "slurm", "Makefile", "constraints.txt", "CHANGELOG.md", ".gitignore", ".ci", "bench",
        "docs",
    }  # fmt: skip
    needed = agreed - {"bench", "docs"}
    present = {path.name for path in ROOT.iterdir()}
    assert needed <= present
    package_folders = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert package_folders <= agreed


def test_no_test_assumes_that_a_path_of_the_machine_is_absent() -> None:
    """Somebody's machine has it: what must be absent is named below the test's own folder."""
    invented = re.compile(
        r"(?:^|[=: {])/(absent|does[-_]not[-_]exist|gone|missing|moved|no|no[-_]such|nonexistent"
        r"|not[-_]there|nowhere)\b"
    )
    for path in sources("tests"):
        tree = ast.parse(path.read_text())
        pieces = {id(v) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
                  for v in node.values}  # fmt: skip
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            # A piece of an f-string goes on from a folder before it.
            if isinstance(text, str) and id(node) not in pieces and path.name != "test_house.py":
                assert not invented.search(text), f"{path}:{node.lineno}: {text}"
