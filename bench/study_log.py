"""The notes that the processes of a study keep of each run, and the locks between them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout

from bench.study_plan import Study, Trial
from vssl_dist.durable import write_durably
from vssl_dist.locks import make_private_lock

CHECKOUT = Path(__file__).resolve().parents[1]


class RunLog:
    """A study's notes on one run, kept beside its folder: cost, commit, and how it ended."""

    def __init__(self, trial: Trial) -> None:
        self.path = trial.cfg.out / "study" / f"{trial.cfg.name}.json"

    def read(self) -> dict[str, Any]:
        """Read the notes; those of a file that is missing or torn are empty."""
        try:
            notes = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}

    def write(self, **facts: Any) -> None:
        """Add facts, on disk before this returns."""
        write_durably(self.path, json.dumps(self.read() | facts).encode())


@contextmanager
def claimed_run(lock_path: Path) -> Iterator[bool]:
    """Claim a run; yields whether this process, and no other one of the study, has it."""
    lock_path.parent.mkdir(parents=True, exist_ok=True)
    lock = make_private_lock(lock_path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def commit_name() -> str:
    """Name the checked-out commit, ``-dirty`` if files differ that a study does not write."""
    changed_files = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    name = _git("describe", "--always", "--abbrev=7", "--exclude=*") or "unknown"
    return f"{name}-dirty" if changed_files else name


def _git(*words: str) -> str:
    process = subprocess.run(
        ["git", *words], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    return process.stdout.strip()


def describe_machine(study: Study) -> str:
    """Say in words what a run runs on."""
    ranks = f"{study.ranks} rank{'s' * (study.ranks > 1)}"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} by {ranks}"
    # Not the machine's cores: a process of a study may be bound to some of them.
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU core{'s' * (cores > 1)} by {ranks}, no GPU"
