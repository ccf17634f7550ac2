"""One job per run folder: ``owner.json`` says which, and it is asked whether it still lives."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from vssl_dist.config import ConfigError
from vssl_dist.durable import publish
from vssl_dist.tracker import peek, settle


@dataclass(frozen=True)
class Owner:
    """A SLURM job (``job``), or else a process of a host."""

    job: str | None
    host: str
    pid: int
    started: float = field(compare=False)
    """When the process began: ids of processes are used again."""
    run: str = field(default="", compare=False)
    """Uuid of the run: a copied folder brings the original's owner along."""

    @classmethod
    def this_process(cls) -> Owner:
        """This process, on this host."""
        return cls(None, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"SLURM job {self.job}" if self.job else f"process {self.pid} on {self.host}"

    def lives(self, job_lives: Callable[[str], bool]) -> bool:
        """Whether it may still write; yes where that cannot be known (another host's process)."""
        if self.job is not None:
            return job_lives(self.job)
        if self.host != socket.gethostname():
            return True
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) < 1)
        except psutil.NoSuchProcess:
            return False


def check_free(run_dir: Path, job_lives: Callable[[str], bool]) -> None:
    """Refuse a run folder that a live job owns.

    Args:
        run_dir: The run's folder; it need not exist.
        job_lives: Whether the SLURM job with this id is still there.

    Raises:
        ConfigError: One line that names the owner.
    """
    owner, identity = _read(run_dir), peek(run_dir)
    if owner is not None and owner.run and (identity is None or identity.uuid != owner.run):
        return  # the original's
    if owner is not None and owner != Owner.this_process() and owner.lives(job_lives):
        remedy = (
            f"wait for it or stop it (scancel {owner.job})"
            if owner.job
            else f"wait for it or stop it; if it is gone, remove {_file(run_dir)}"
        )
        raise ConfigError(f"{run_dir} is being written by {owner}: {remedy}")


def claim(run_dir: Path, job_lives: Callable[[str], bool]) -> None:
    """Make this process the owner of ``run_dir``, which is created.

    Raises:
        ConfigError: A live job owns it.
    """
    identity = settle(run_dir)
    try:
        with FileLock(run_dir / ".owner.lock", timeout=30):
            check_free(run_dir, job_lives)
            _write(run_dir, replace(Owner.this_process(), run=identity.uuid))
    except Timeout:
        raise ConfigError(f"{run_dir} is being claimed by another process: try again") from None


def hand_over(run_dir: Path, job: str) -> None:
    """Make a SLURM job the owner, once it is submitted."""
    _write(run_dir, replace(Owner.this_process(), job=job, run=settle(run_dir).uuid))


def release(run_dir: Path) -> None:
    """Give the folder up, if it is this process's."""
    if _read(run_dir) == Owner.this_process():
        _file(run_dir).unlink()


def _file(run_dir: Path) -> Path:
    return run_dir / "owner.json"


def _read(run_dir: Path) -> Owner | None:
    try:
        return Owner(**json.loads(_file(run_dir).read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{_file(run_dir)} cannot be read ({error}): remove it") from error


def _write(run_dir: Path, owner: Owner) -> None:
    publish(_file(run_dir), json.dumps(asdict(owner)).encode())
