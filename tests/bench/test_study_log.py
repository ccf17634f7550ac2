"""A study knows what code its runs ran, and shares them with its other processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench import study_log


def test_the_commit_is_dirty_by_code_and_not_by_what_a_study_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_log, "CHECKOUT", tmp_path)

    def git(*words: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", *who, *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    page, code = tmp_path / "docs" / "study.md", tmp_path / "code.py"
    page.parent.mkdir()
    for path in (page, code):
        path.write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short=7", "HEAD")
    (tmp_path / "runs").mkdir()
    page.write_text("2")
    assert study_log.commit_name() == head
    code.write_text("2")
    assert study_log.commit_name() == f"{head}-dirty"


def test_one_process_claims_and_gives_back(tmp_path: Path) -> None:
    lock = tmp_path / "study" / "run.lock"
    with study_log.claimed_run(lock) as first, study_log.claimed_run(lock) as second:
        assert (first, second) == (True, False)
    with study_log.claimed_run(lock) as again:
        assert again
