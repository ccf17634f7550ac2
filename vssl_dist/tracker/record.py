"""Records of MLflow in a run folder: its runs there, and who is sending."""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from vssl_dist import locks
from vssl_dist.durable import user_name, write_inside_folder
from vssl_dist.locks import make_private_lock
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.address import EXPERIMENT_NAME
from vssl_dist.tracker.identity import Identity
from vssl_dist.tracker.intake import is_text_mapping, read_json_object


@dataclass
class TrackingRecord:
    """``mlflow_run.json``: where curves go now, and the MLflow run at each address so far.

    It belongs to one run: what a copied folder brings along is not believed.
    """

    uuid: str
    experiment: str = EXPERIMENT_NAME
    tracking_uri: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    """Run ids by address."""

    @classmethod
    def load(cls, run_dir: Path, identity: Identity | None) -> TrackingRecord:
        """Load what is written down for this run, or an empty record."""
        uuid = identity.uuid if identity else ""
        try:
            facts = read_json_object(RunFolder(run_dir).mlflow_record_path)
            owner_uuid, experiment, uri = (facts[k] for k in ("uuid", "experiment", "tracking_uri"))
        except (OSError, ValueError, KeyError):
            return cls(uuid)
        earlier_runs = facts.get("runs", {})
        are_all_texts = all(isinstance(text, str) for text in (owner_uuid, experiment, uri))
        if not are_all_texts or not is_text_mapping(earlier_runs):
            return cls(uuid)
        last_run = {uri: facts["run_id"]} if "run_id" in facts else {}
        if not re.fullmatch(r"(?!\.*$)[\w. -]{1,250}", experiment):
            experiment = EXPERIMENT_NAME
        run_ids = {
            address: run_id
            for address, run_id in (earlier_runs | last_run).items()
            if isinstance(run_id, str) and _is_run_id(run_id)
        }
        # What a copied folder brings along is the original's.
        return cls(uuid, experiment, uri, run_ids if uuid == owner_uuid else {})

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run at the address where curves go now."""
        return self.runs.get(self.tracking_uri)

    def save(self, run_dir: Path) -> None:
        """Store the record, with ``run_id`` for people and programs that ask for the run."""
        facts = asdict(self) | ({"run_id": self.run_id} if self.run_id else {})
        write_inside_folder(RunFolder(run_dir).mlflow_record_path, json.dumps(facts).encode())


@dataclass
class Sender:
    """``spool/flusher.json``: the process that has, or last had, the lease, and what stops it."""

    tracking_uri: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str | None = None
    """Id of the SLURM job, if our launcher started the process there."""
    problem: str | None = None

    @classmethod
    def load(cls, run_dir: Path) -> Sender | None:
        """Load the sender that is written down, if any."""
        try:
            facts = read_json_object(RunFolder(run_dir).sender_path)
        except (OSError, ValueError):
            return None
        match facts:
            case {"tracking_uri": str(uri), "host": str(host), "pid": int(pid)}:
                job, problem = (facts.get(key) for key in ("job", "problem"))
                return cls(uri, host, pid, job and str(job), problem and str(problem))
        return None

    def save(self, run_dir: Path) -> None:
        """Store the sender."""
        write_inside_folder(RunFolder(run_dir).sender_path, json.dumps(asdict(self)).encode())

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return printable(f"process {self.pid} on {self.host}{job}")

    is_known = True
    """Whether it has written down what it sends, and where."""

    @property
    def activity(self) -> str:
        """Activity of the sender, as the subject of a line."""
        return printable(f"{self} is sending to {self.tracking_uri}")


class UnknownSender(Sender):
    """Process that holds the lease and has not written down that it sends."""

    is_known = False

    def __init__(self, holder_name: str, lock_path: Path) -> None:
        super().__init__("?")
        self.holder_name, self.lock_path = holder_name, lock_path

    def __str__(self) -> str:
        return self.holder_name

    @property
    def activity(self) -> str:
        """Activity of the process, as the subject of a line."""
        return printable(f"{self} holds {self.lock_path}")


def sending_lock(run_dir: Path) -> FileLock:
    """Return the lock that the one process which sends a run's spool holds."""
    return make_private_lock(RunFolder(run_dir).sender_lock_path)


def lease_holder(run_dir: Path, wait_s: float = 0.0) -> Sender | None:
    """Return who holds the lease, or ``None`` if it is free within ``wait_s``."""
    lock_path = RunFolder(run_dir).sender_lock_path
    try:
        with sending_lock(run_dir).acquire(timeout=wait_s):
            return None
    except Timeout:
        holder_name = locks.describe_lock_holder(lock_path)
    except PermissionError:
        if not lock_path.exists():
            raise
        return UnknownSender(user_name(lock_path.lstat().st_uid), lock_path)
    if " of " in holder_name and f" of {user_name(os.geteuid())} (" not in holder_name:
        return UnknownSender(holder_name, lock_path)
    return Sender.load(run_dir) or Sender("?", "an unknown host", 0)


def _is_run_id(text: str) -> bool:
    return re.fullmatch(r"[\w-]{1,64}", text) is not None
