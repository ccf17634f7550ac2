"""A newcomer who forgot to activate the environment is told so, by every command."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import packages_distributions
from itertools import takewhile
from pathlib import Path

import pytest

from tests.support.refusals import refusal
from vssl_dist.installed import NEEDED, own_code_only, require_packages

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("launch", "data_prep")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False)
    return folder / "bin" / "python"


@pytest.mark.parametrize("command", COMMANDS)
def test_without_the_packages_a_command_says_so_in_one_line(bare: Path, command: str) -> None:
    done = subprocess.run([bare, command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    line = refusal(done.stderr)
    for told in (str(bare), "torch", "make install", ". .venv/bin/activate", command):
        assert told in line


def test_the_commands_are_those_that_people_type() -> None:
    typed = {"launch/submit.py", "launch/evaluate.py", "launch/export.py", "launch/one_class.py"}
    typed |= {f"data_prep/{name}.py" for name in ("shard", "verify", "preview")}
    assert typed <= set(COMMANDS)


def test_every_program_looks_for_them_before_it_imports_one() -> None:
    """And drops a notebook's MPLBACKEND there, which would end the import of matplotlib."""
    programs = [
        path
        for folder in ("launch", "data_prep", "bench")
        for path in (ROOT / folder).glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
        and path.name != "gpu_first.py"  # it says of each of its sections what that lacks
    ]
    assert len(programs) > len(COMMANDS)
    for path in programs:
        before = list(takewhile(lambda node: not isinstance(node, ast.If), parsed(path)))
        modules = [n.module or "" for n in before if isinstance(n, ast.ImportFrom)]
        modules += [a.name for n in before if isinstance(n, ast.Import) for a in n.names]
        assert {name.partition(".")[0] for name in modules} <= sys.stdlib_module_names, path
        assert "require_packages()" in ast.unparse(parsed(path)[len(before)]), path


def parsed(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text()).body


def test_a_notebook_s_pictures_are_no_program_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in own_code_only({}):
        monkeypatch.setenv(name, "")  # as they are, they come back
    require_packages()
    assert "MPLBACKEND" not in os.environ


def test_from_any_folder_and_with_one_package_missing_it_is_that_package(
    bare: Path, tmp_path: Path
) -> None:
    for name in NEEDED[:-1]:
        (tmp_path / f"{name}.py").touch()
    done = subprocess.run(
        [bare, ROOT / "launch" / "submit.py"],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"lacks {NEEDED[-1]}: " in refusal(done.stderr)


@pytest.mark.parametrize("path", [None, "", ":", ":{}", "{}:"])
def test_a_python_that_we_start_imports_this_code_and_nothing_of_its_folder(
    bare: Path, tmp_path: Path, path: str | None
) -> None:
    """Nor does one that a library starts there, and the package need not be installed."""
    (tmp_path / "more").mkdir()
    for name in ("yaml", "selectors", "vssl_dist"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('hijacked')")
    before = {} if path is None else {"PYTHONPATH": path.format(tmp_path / "more")}
    inner = "import selectors, vssl_dist, sys; print(vssl_dist.__file__)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    for words in (["-c", inner], ["-c", code], ["-m", "vssl_dist.installed"]):
        done = subprocess.run(
            [bare, *words],
            cwd=tmp_path, env=before | own_code_only(before), capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() in ("", str(ROOT / "vssl_dist" / "__init__.py"))


def test_what_is_needed_is_what_pyproject_asks_for() -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {plain(re.split(r"[=><;\s]", line)[0]) for line in asked}
    asked_for = {name for name in names if "dali" not in name}
    installed = packages_distributions()
    brought = [{plain(package) for package in installed[name]} & asked_for for name in NEEDED]
    assert all(brought)
    assert set.union(*brought) == asked_for


def test_a_name_that_is_no_utf_8_can_be_printed_in_every_locale() -> None:
    code = (
        "import os; from vssl_dist.installed import print_any_path; print_any_path();"
        r"print(os.fsdecode(b'caf\xe9'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
        check=True,
    )
    assert done.stdout == rb"caf\udce9" + b"\n"


def test_pins_are_exact_and_stand_in_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(line for lines in extras.values() for line in lines)]
    assert not [line for line in asked if "==" in line.partition(";")[0]]
    assert "==" not in (ROOT / "Makefile").read_text()
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in pins)
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in pins}
    names = {re.sub(r"[-_.]+", "-", re.split(r"[=><;\s]", line)[0]).lower() for line in asked}
    assert names <= pinned
    both = [set(extras[name]) for name in ("cuda12", "cuda13")]
    assert all(len(lines) == 1 for lines in both), "one DALI each"
