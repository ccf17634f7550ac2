"""What the processes of a study know of each run besides its folder, and of each other."""

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
from vssl_dist.durable import publish
from vssl_dist.locks import private_lock

ROOT = Path(__file__).resolve().parents[1]


class Log:
    """What a study remembers of one run besides its folder: cost, commit, and how it ended."""

    def __init__(self, trial: Trial) -> None:
        self.path = trial.cfg.out / "study" / f"{trial.cfg.name}.json"

    def read(self) -> dict[str, Any]:
        """What is written, if it is whole."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, **facts: Any) -> None:
        """Add facts, on disk before this returns."""
        publish(self.path, json.dumps(self.read() | facts).encode())


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Whether this process, and no other one of the study, does what is inside."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    mine = private_lock(lock)
    try:
        mine.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        mine.release()


def commit() -> str:
    """The checked-out commit, ``-dirty`` if files differ from it that a study does not write."""
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    name = _git("describe", "--always", "--abbrev=7", "--exclude=*") or "unknown"
    return f"{name}-dirty" if changed else name


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def place(study: Study) -> str:
    """What a run runs on."""
    by = f"{study.ranks} rank{'s' * (study.ranks > 1)}"
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()} by {by}"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU core{'s' * (cores > 1)} by {by}, no GPU"
