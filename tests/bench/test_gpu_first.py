"""The program for the first minutes on a GPU: every section runs, and none stops another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_first
from bench.gpu_first import FILE_NAME, SECTIONS, TOTAL_S, Section, first_missing

ROOT = Path(__file__).parents[2]
TORCH_ALONE = [section.name for section in SECTIONS if not section.packages]
ONLY_TORCH = """
import sys
from importlib.machinery import PathFinder

REQUIRED_BY_TORCH = {"typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
                     "filelock", "fsspec", "setuptools", "torchgen", "functorch", "optree"}
ALLOWED = sys.stdlib_module_names | REQUIRED_BY_TORCH | {"torch", "bench", "vssl_dist"}
find_spec = PathFinder.find_spec


def find_little(name, path=None, target=None):
    is_there = path is not None or name in ALLOWED or name.startswith("_sysconfigdata")
    return find_spec(name, path, target) if is_there else None


PathFinder.find_spec = find_little
"""
"""A Python in which torch is all that is installed, numpy not either."""


def run(*arguments: str, environment: dict[str, str] | None = None) -> Any:
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "gpu_first.py"), "--device", "cpu", *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
        capture_output=True,
        text=True,
        check=False,
    )


def errors(value: Any) -> Iterator[str]:
    """Everything below ``value`` that is an error."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "error":
                yield str(inner)
            yield from errors(inner)


def test_the_sections_fit_into_nine_minutes_and_those_of_torch_alone_need_no_package() -> None:
    assert sum(section.limit_s for section in SECTIONS) <= TOTAL_S == 540
    assert {"sync_bn", "launches", "bits", "models", "lars"} <= set(TORCH_ALONE)


@pytest.mark.slow
def test_every_section_runs_on_a_cpu(tmp_path: Path) -> None:
    done = run("--dry", "--out", str(tmp_path))
    reports = json.loads((tmp_path / FILE_NAME).read_text())
    assert list(reports) == [section.name for section in SECTIONS]
    for name, report in reports.items():
        assert report["status"] in ("ok", "missing"), f"{name}: {report}"
        assert list(errors(report)) == [], name
        assert report["status"] == "missing" or report["results"], name
    assert done.returncode == 0


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_kernels_models_and_launches_import_torch_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ONLY_TORCH)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run("--dry", "--section", name, environment={"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("section-result ")]
    assert lines
    assert "No module named" not in done.stdout


def test_in_that_python_the_other_packages_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ONLY_TORCH)
    probe = "import importlib.util as u; print(*map(u.find_spec, ['numpy', 'pydantic', 'timm']))"
    done = subprocess.run(
        [sys.executable, "-c", probe],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None None None\n"


def test_a_package_that_is_missing_is_named() -> None:
    assert first_missing(["json", "no_such_package", "other"]) == "no_such_package"
    assert first_missing(["no_such_package.part"]) == "no_such_package.part"
    assert first_missing(["json", "torch"]) is None
    section = Section("decoding", "no_such_module:f", 10, ("no_such_package",))
    args = gpu_first.argument_parser().parse_args([])
    assert gpu_first.measure_section(section, args, 10) == {
        "status": "missing",
        "reason": "no_such_package is not installed",
    }


def test_without_a_gpu_each_section_says_so_and_the_next_one_runs(tmp_path: Path) -> None:
    only = ["machine", "lars"]
    assert gpu_first.main(["--out", str(tmp_path), "--only", *only]) == 1
    reports = json.loads((tmp_path / FILE_NAME).read_text())
    assert [report["status"] for report in reports.values()] == ["failed", "failed"]
    assert [report["results"] for report in reports.values()] == [
        {"error": "there is no CUDA device"}
    ] * 2


def test_what_a_killed_section_has_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "hangs.py"
    program.write_text(
        "import time\nprint('noise')\n"
        "print('section-result [\"a\", 1]', flush=True)\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_first, "__file__", str(program))
    args = gpu_first.argument_parser().parse_args([])
    start = time.monotonic()
    report = gpu_first.measure_section(SECTIONS[0], args, 3)
    assert time.monotonic() - start < 30
    assert (report["status"], report["results"]) == ("out of time", {"a": 1})
