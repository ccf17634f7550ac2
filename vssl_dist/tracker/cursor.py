"""How much of the spool has reached MLflow.  Knows files only, so that asking costs nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vssl_dist.curves import NAMES
from vssl_dist.durable import write_inside_folder
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker.address import NO_TRACKING
from vssl_dist.tracker.identity import stored_identity
from vssl_dist.tracker.intake import is_count, read_json_object
from vssl_dist.tracker.record import TrackingRecord
from vssl_dist.tracker.refusals import is_transient
from vssl_dist.tracker.spool import read_records


@dataclass
class SpoolFileProgress:
    """Progress of replaying one spool file."""

    offset: int = 0
    last: dict[str, int] = field(default_factory=dict)
    """The last step sent, by metric; a resumed run writes earlier ones again."""

    @classmethod
    def read(cls, facts: dict[str, Any]) -> SpoolFileProgress:
        """Read the progress that a cursor file states for one spool file.

        Raises:
            ValueError: It is not what one of our programs writes.
        """
        progress = cls(**facts)
        if not all(is_count(number) for number in (progress.offset, *progress.last.values())):
            raise ValueError("no offset or no step")
        return progress


@dataclass
class Cursor:
    """State of what one MLflow run has been sent, in ``spool/cursor.json``."""

    path: Path
    tracking_uri: str
    run_id: str
    progress_by_file: dict[str, SpoolFileProgress] = field(default_factory=dict)
    pending_artifacts: list[str] = field(default_factory=list)
    """Asked for and not uploaded yet: a store that is out of reach does not hold up metrics."""
    refusal_reasons: dict[str, str] = field(default_factory=dict)
    """What MLflow does not take, and why: it is set aside, so that all else arrives."""
    other_cursors: dict[str, Any] = field(default_factory=dict)
    """The cursors of other addresses, as they were written."""
    names_version: int = NAMES
    """Which names (`vssl_dist.curves`) the curves that were sent have; 1 where it is not said."""

    @classmethod
    def load(cls, run_dir: Path, tracking_uri: str, run_id: str) -> Cursor:
        """Load the stored cursor, or a fresh one if there is none for this MLflow run."""
        path = RunFolder(run_dir).cursor_path
        try:
            stored_facts = read_json_object(path)
            other_cursors = stored_facts.pop("others", {}) | {
                stored_facts.get("tracking_uri", tracking_uri): stored_facts
            }
            stored_here = other_cursors.pop(tracking_uri, {})
        except (OSError, ValueError, AttributeError, TypeError):
            # Sending everything once more does no harm.
            return cls(path, tracking_uri, run_id)
        fresh_cursor = cls(path, tracking_uri, run_id, other_cursors=other_cursors)
        try:
            progress_by_file = {
                name: SpoolFileProgress.read(progress)
                for name, progress in stored_here["files"].items()
            }
            pending_artifacts, refusal_reasons = (
                stored_here["artifacts"],
                stored_here.get("refused", {}),
            )
            texts = [*pending_artifacts, *refusal_reasons.values()]
            if stored_here["run_id"] != run_id or not all(isinstance(text, str) for text in texts):
                return fresh_cursor
            names_version = NAMES if stored_here.get("names") == NAMES else 1
            return cls(
                path,
                tracking_uri,
                run_id,
                progress_by_file,
                [*pending_artifacts],
                {**refusal_reasons},
                other_cursors,
                names_version,
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return fresh_cursor

    def forget_sent(self) -> None:
        """Send everything once more, also what was set aside."""
        self.progress_by_file, self.pending_artifacts, self.refusal_reasons = {}, [], {}
        self.names_version = NAMES

    def save(self) -> None:
        """Store the cursor, in one piece."""
        facts: Mapping[str, object] = {
            "tracking_uri": self.tracking_uri,
            "run_id": self.run_id,
            "names": self.names_version,
            "files": {name: vars(progress) for name, progress in self.progress_by_file.items()},
            "artifacts": self.pending_artifacts,
            "refused": self.refusal_reasons,
            "others": self.other_cursors,
        }
        write_inside_folder(self.path, json.dumps(facts).encode())


def load_spool_cursor(run_dir: Path, tracking_uri: str | None) -> Cursor:
    """Load the cursor of an address, by default of the one where curves go now."""
    record = TrackingRecord.load(run_dir, stored_identity(run_dir))
    uri = tracking_uri or record.tracking_uri
    return Cursor.load(run_dir, uri, record.runs.get(uri, ""))


def is_flushed(
    run_dir: Path, tracking_uri: str | None = None, writer_names: Collection[str] = ()
) -> bool:
    """Whether everything in the spool has been sent there, by this process or another.

    Args:
        run_dir: The run's folder.
        tracking_uri: By default where curves go now.
        writer_names: Ask for what these have written only; by default for everybody's.
    """
    cursor = load_spool_cursor(run_dir, tracking_uri)
    if cursor.tracking_uri == NO_TRACKING:
        return True
    if cursor.progress_by_file and cursor.names_version != NAMES:
        return False
    for path in RunFolder(run_dir).list_spool_files():
        if writer_names and path.stem not in writer_names:
            continue
        offset = cursor.progress_by_file.get(path.name, SpoolFileProgress()).offset
        try:
            if read_records(path, offset)[1] != offset:
                return False
        except OSError as error:
            if is_transient(error):
                return False
            continue  # which the replay names
    return not cursor.pending_artifacts
