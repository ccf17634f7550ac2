"""What a run folder knows of MLflow: its runs there, and who is sending."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vssl_dist.durable import publish
from vssl_dist.tracker.address import EXPERIMENT
from vssl_dist.tracker.identity import Identity, run_file
from vssl_dist.tracker.spool import spool_folder


@dataclass
class Record:
    """``mlflow_run.json``: where curves go now, and the MLflow run at each address so far.

    It belongs to one run: what a copied folder brings along is not believed.
    """

    uuid: str
    experiment: str = EXPERIMENT
    tracking_uri: str = ""
    runs: dict[str, str] = field(default_factory=dict)
    """Run ids by address."""

    @classmethod
    def load(cls, run_dir: Path, identity: Identity | None) -> Record:
        """What is written down for this run, or an empty record."""
        uuid = identity.uuid if identity else ""
        try:
            facts: dict[str, Any] = json.loads(run_file(run_dir).read_text())
            owner, experiment, uri = (facts[k] for k in ("uuid", "experiment", "tracking_uri"))
            if not all(isinstance(fact, str) for fact in (owner, experiment, uri)):
                return cls(uuid)
            last = {uri: facts["run_id"]} if "run_id" in facts else {}
            record = cls(owner, experiment, uri, facts.get("runs", {}) | last)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return cls(uuid)
        return record if uuid == record.uuid else cls(uuid, record.experiment, uri)

    @property
    def run_id(self) -> str | None:
        """The run at the address where curves go now."""
        return self.runs.get(self.tracking_uri)

    def save(self, run_dir: Path) -> None:
        """Write it down, with ``run_id`` for people and programs that ask for the run."""
        facts = asdict(self) | ({"run_id": self.run_id} if self.run_id else {})
        publish(run_file(run_dir), json.dumps(facts).encode())


@dataclass
class Sender:
    """``spool/flusher.json``: the process that has, or last had, the lease, and what stops it."""

    tracking_uri: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str | None = None
    """Of SLURM, if our launcher started the process there."""
    problem: str | None = None

    @classmethod
    def load(cls, run_dir: Path) -> Sender | None:
        """The one that is written down, if any."""
        try:
            return cls(**json.loads(_sender_file(run_dir).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def save(self, run_dir: Path) -> None:
        """Write it down."""
        publish(_sender_file(run_dir), json.dumps(asdict(self)).encode())

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


def lease(run_dir: Path) -> FileLock:
    """Held by the one process that sends a run's spool."""
    return FileLock(spool_folder(run_dir) / "flusher.lock")


def holder(run_dir: Path, wait_s: float = 0.0) -> Sender | None:
    """Who has the lease, if it is not free within so long."""
    try:
        with lease(run_dir).acquire(timeout=wait_s):
            return None
    except Timeout:
        return Sender.load(run_dir) or Sender("?", "an unknown host", 0)


def _sender_file(run_dir: Path) -> Path:
    return spool_folder(run_dir) / "flusher.json"
