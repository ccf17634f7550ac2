"""What docs/security.md tells people to type works, and names what is there."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "security.md").read_text()
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.M | re.S)


def block(word: str) -> str:
    (found,) = [text for text in BLOCKS if word in text]
    return str(found)


def typed(command: str, **variables: Path | str) -> str:
    """What a block prints, in a shell that stops at the first thing that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mode(path: Path) -> str:
    return stat.filemode(path.stat().st_mode)


def test_a_groups_folders_are_made_as_told(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    typed(block("chmod 3770"), SHARED=shared, GROUP=str(os.getegid()))
    typed(block("umask 027"), SHARED=shared, USER="anna")
    assert mode(shared / "data") == "drwxr-s---"
    assert mode(shared / "runs") == "drwxrws--T"
    assert mode(shared / "runs" / "anna") == "drwxr-s---"


def test_what_others_could_change_in_a_run_is_found_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "export").mkdir(parents=True)
    for path in (run, run / "export", run / "config.yaml"):
        path.touch()
        path.chmod(0o750)
    (run / "link").symlink_to("config.yaml")
    assert typed(block("find"), RUN=run) == ""
    (run / "export").chmod(0o770)
    (line,) = typed(block("find"), RUN=run).splitlines()
    assert line.endswith(f"{run}/export")


def test_commands_files_and_options_that_are_named_exist() -> None:
    from mlflow.cli import server

    for place in re.findall(r"\b(?:launch|slurm|data_prep)/[\w/.]+\w|\bconstraints\.txt", PAGE):
        assert (ROOT / place).exists(), place
    options = {option for parameter in server.params for option in parameter.opts}
    assert set(re.findall(r"(?<=\s)--[\w-]+", block("mlflow server"))) <= options
    assert "docs/security.md" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("text", BLOCKS)
def test_every_block_is_shell(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
