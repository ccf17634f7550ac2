"""`pip install .`, not of a checkout: one command, one top-level name, all that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("vssl_dist", "data_prep", "configs", "slurm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--wheel-dir", str(folder), str(source)],
        check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_every_room_is_packed_below_the_one_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names if "dist-info/" not in name} == {"vssl_dist"}
    for room in ROOMS:
        below = "" if room == "vssl_dist" else "vssl_dist/"
        suffixes = {".yaml"} if room in ("configs", "slurm") else {".py", ".json", ".txt"}
        for path in (ROOT / room).rglob("*"):
            if path.suffix in suffixes and "devcluster/" not in str(path):
                assert f"{below}{path.relative_to(ROOT)}" in names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"vssl": "vssl_dist.cli:main"}


def vssl(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from vssl_dist.cli import main; sys.exit(main())"
    environ = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_from_any_folder_it_shards_checks_and_submits_by_name(
    installed: Path, tmp_path: Path
) -> None:
    done = vssl(installed, tmp_path, "shard", "photos", "--out", "data/photos", "--limit", "320")
    assert done.returncode == 0, done.stderr
    assert vssl(installed, tmp_path, "verify", "data/photos").returncode == 0
    small = ("optim.max_steps=1", "evaluations=[]")
    dry = vssl(installed, tmp_path, "submit", "--local", "2", "quickstart", *small, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"# {tmp_path}/runs/quickstart/config.yaml" in dry.stdout
    missing = vssl(installed, tmp_path, "submit", "--local", "1", "in1k_vje")
    assert missing.returncode == 2
    assert "data.train: " in missing.stderr
    assert not (tmp_path / "runs").exists()
