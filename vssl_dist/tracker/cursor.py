"""How much of the spool has reached MLflow.  Knows files only, so that asking costs nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from vssl_dist.durable import publish
from vssl_dist.tracker.spool import read, run_file, spool_folder


@dataclass
class Progress:
    """How far one spool file has been replayed."""

    offset: int = 0
    last: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric; a resumed run writes earlier ones again."""


@dataclass
class Cursor:
    """What has been sent, in ``spool/cursor.json``; it belongs to one MLflow run only."""

    path: Path
    run_id: str
    files: dict[str, Progress] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    """Asked for and not uploaded yet: a store that is out of reach does not hold up metrics."""

    @classmethod
    def load(cls, run_dir: Path, run_id: str) -> Cursor:
        """The stored cursor, or a fresh one if there is none, or none for this MLflow run."""
        path = spool_folder(run_dir) / "cursor.json"
        try:
            raw = json.loads(path.read_text())
            files = {name: Progress(**progress) for name, progress in raw["files"].items()}
            stored = cls(path, raw["run_id"], files, raw["artifacts"])
        except (OSError, ValueError, KeyError, TypeError):
            # Sending everything once more does no harm.
            stored = cls(path, "")
        return stored if run_id == stored.run_id else cls(path, run_id)

    def save(self) -> None:
        """Store it, in one piece."""
        files = {name: vars(progress) for name, progress in self.files.items()}
        facts = {"run_id": self.run_id, "files": files, "artifacts": self.artifacts}
        publish(self.path, json.dumps(facts).encode())


def flushed(run_dir: Path) -> bool:
    """Whether everything in the spool has been sent, by this process or another."""
    try:
        run_id = json.loads(run_file(run_dir).read_text()).get("run_id", "")
    except (OSError, ValueError):
        run_id = ""
    cursor = Cursor.load(run_dir, run_id)
    for path in spool_folder(run_dir).glob("*.jsonl"):
        offset = cursor.files.get(path.name, Progress()).offset
        if read(path, offset)[1] != offset:
            return False
    return not cursor.artifacts
