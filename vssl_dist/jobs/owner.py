"""One job per run folder: ``owner.json`` names it, and is believed as long as the job lives."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import psutil
from filelock import Timeout
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from vssl_dist.durable import refuse_link_out_of_folder, write_inside_folder
from vssl_dist.errors import ConfigError
from vssl_dist.jobs import private
from vssl_dist.locks import describe_lock_holder, make_private_lock
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker import settle_identity, stored_identity

_CLAIM_TIMEOUT_S = 30
_MAX_OWNER_FILE_BYTES = 10_000
JobId = Annotated[str, Field(pattern=r"^[0-9]{1,20}([_+][0-9]{1,10})?$")]
"""SLURM's id of a job: a number, of an array ``12_3``, of several kinds of nodes ``12+1``."""


@dataclass(frozen=True)
class Owner:
    """Who may write in a run folder: a SLURM job (``job``), or else a process of a host."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    job: JobId | None
    host: Annotated[str, Field(pattern=r"^[\w.:-]+$", max_length=255)]
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    started: Annotated[float, Field(allow_inf_nan=False)] = field(compare=False)
    """Time when the process began: ids of processes are used again."""
    run: Annotated[str, Field(pattern=r"^[\w-]*$", max_length=100)] = field(
        default="", compare=False
    )
    """Uuid of the run: the owner file in a copied folder is the original's."""

    @classmethod
    def this_process(cls) -> Owner:
        """Describe this process."""
        return cls(None, socket.gethostname(), os.getpid(), psutil.Process().create_time())

    def __str__(self) -> str:
        return f"SLURM job {self.job}" if self.job else f"process {self.pid} on {self.host}"

    def is_alive(self, is_job_live: Callable[[str], bool]) -> bool:
        """Whether the owner may still write; True where that cannot be known (another host)."""
        if self.job is not None:
            return is_job_live(self.job)
        if self.host != socket.gethostname():
            return True
        try:
            # Not equal: psutil derives the time from that of the boot, which adjustments move.
            return bool(abs(psutil.Process(self.pid).create_time() - self.started) < 1)
        except psutil.NoSuchProcess:
            return False


def check_free(run_dir: Path, is_job_live: Callable[[str], bool]) -> None:
    """Refuse a run folder that a live job owns.

    Args:
        run_dir: The run's folder; it need not exist.
        is_job_live: Whether the SLURM job with this id is still there.

    Raises:
        ConfigError: One line that names the owner.
    """
    owner, identity = _read_owner(run_dir), stored_identity(run_dir)
    if owner is not None and owner.run and (identity is None or identity.uuid != owner.run):
        return  # of the run that this folder is a copy of
    if owner is not None and owner != Owner.this_process() and owner.is_alive(is_job_live):
        remedy = (
            f"wait for it or stop it (scancel {owner.job})"
            if owner.job
            else f"wait for it or stop it; if it is gone, remove {RunFolder(run_dir).owner_path}"
        )
        raise ConfigError(f"{run_dir} is being written by {owner}: {remedy}")


def claim(run_dir: Path, is_job_live: Callable[[str], bool]) -> None:
    """Make this process the owner of ``run_dir``, which is created; from then on only this user
    can write in it.

    Raises:
        ConfigError: A live job owns it, or it is not this user's.
        OSError: A file that will be added to is a link out of its folder.
    """
    private.make_run_folder(run_dir)
    identity = settle_identity(run_dir)  # gives a copy files of its own in place of such links
    for path in RunFolder(run_dir).list_appended_files():
        refuse_link_out_of_folder(path)
    lock_path = RunFolder(run_dir).owner_lock_path
    try:
        # Of two claims at once the second has to find the first one's owner file.
        with make_private_lock(lock_path).acquire(timeout=_CLAIM_TIMEOUT_S):
            check_free(run_dir, is_job_live)
            _write_owner(run_dir, replace(Owner.this_process(), run=identity.uuid))
    except Timeout:
        raise ConfigError(
            f"{run_dir} is being claimed by {describe_lock_holder(lock_path)}: wait for it "
            "or stop it, then try again"
        ) from None


def transfer_to_job(run_dir: Path, job: str) -> None:
    """Make a SLURM job that has been submitted the owner of the run."""
    _write_owner(run_dir, replace(Owner.this_process(), job=job, run=settle_identity(run_dir).uuid))


def release(run_dir: Path) -> None:
    """Give the folder up if this process owns it."""
    if _read_owner(run_dir) == Owner.this_process():
        RunFolder(run_dir).owner_path.unlink()


def _read_owner(run_dir: Path) -> Owner | None:
    path = RunFolder(run_dir).owner_path
    try:
        return TypeAdapter(Owner).validate_json(private.read_text_file(path, _MAX_OWNER_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        first_error = error.errors()[0]
        reason = f"{'.'.join(map(str, first_error['loc']))}: {first_error['msg']}"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise ConfigError(f"{path} cannot be read ({printable(reason)[:200]}): remove it")


def _write_owner(run_dir: Path, owner: Owner) -> None:
    write_inside_folder(RunFolder(run_dir).owner_path, json.dumps(asdict(owner)).encode())
