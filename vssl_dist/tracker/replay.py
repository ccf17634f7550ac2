"""From the spool into MLflow, again and again without a double."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from mlflow.entities import LifecycleStage, Metric, Param, RunTag

from vssl_dist.curves import NAMES, current_curve
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.address import sqlite_file
from vssl_dist.tracker.artifacts import open_artifact
from vssl_dist.tracker.batch import Batch, clean_key
from vssl_dist.tracker.cursor import Cursor, Progress
from vssl_dist.tracker.identity import Identity, as_utf8
from vssl_dist.tracker.intake import is_count
from vssl_dist.tracker.look import probe_tracking
from vssl_dist.tracker.record import Record
from vssl_dist.tracker.refusals import Refused, error_line, is_ambiguous, is_transient
from vssl_dist.tracker.remote import OWN_TAGS, UUID_TAG, connect, find_or_create, own_tags
from vssl_dist.tracker.spool import TRAINER, Status, read_chunk

_PARAM, _TAG = 6000, 5000
_MOST_NAMED = 500
_SERVERS = ("http:", "https:", "mlflow-artifacts:")
"""Stores that are signed in to: a database, which may be anybody's file, does not choose them."""
_LONGEST_PATH = 4096
_LONGEST_KIND = 80
_log = logging.getLogger(__name__)


class Replayer:
    """Replays one run's spool into its MLflow run; only the holder of the lease has one.

    Args:
        run_dir: The run's folder.
        identity: Which run that is.
        record: Where its curves go, and the MLflow runs that it has.
        afresh: Try once more what was set aside.
    """

    def __init__(
        self, run_dir: Path, identity: Identity, record: Record, *, afresh: bool = False
    ) -> None:
        uri = record.tracking_uri
        # MLflow itself tries for minutes to open what can be seen to be closed.
        if problem := probe_tracking(uri, run_dir, record.experiment).problem:
            raise Refused(problem)
        self.run_dir, self._identity = run_dir, identity
        self._client = connect(uri)
        self.run_id = find_or_create(self._client, run_dir, identity, record)
        self._cursor = Cursor.load(run_dir, uri, self.run_id)
        if afresh and self._cursor.refused:
            self._cursor.restart()
        run = self._run()
        # MLflow refuses another value for a parameter that it has: the first one stays.
        self._params = set(run.data.params)
        self._store: str = run.info.artifact_uri
        self._introduce(run, own_tags(run_dir, identity, uri))

    def _introduce(self, run: Any, tags: dict[str, str]) -> None:
        """Send where the run is now; of a copy also its name, before its history does."""
        new_tags = [
            RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value
        ]
        params = {}
        if self._identity.parent is not None:
            params = {"name": self.run_dir.name, "out": str(self.run_dir.parent)}
        unsent_params = [Param(k, as_utf8(v)) for k, v in params.items() if k not in self._params]
        self._send(Batch((), unsent_params, new_tags))
        self._params |= params.keys()

    def flush(self) -> None:
        """Send what is new; raises whatever MLflow raises, and may then simply be called again."""
        if self._cursor.names != NAMES:
            self._send_renamed()
        for path in RunFolder(self.run_dir).list_spool_files():
            try:
                while self._flush_some(path):
                    pass
            except _UnreadableError as error:
                what = f"the file {path.name} of the spool"
                if what not in self._cursor.refused:
                    self._set_aside(what, error)
                    self._cursor.save()
        outage: Exception | None = None
        for place in list(self._cursor.artifacts):
            try:
                self._upload(place)
            except Exception as error:  # the next one may lie in another store
                outage = error
                continue
            self._cursor.artifacts.remove(place)
            self._cursor.save()
        if outage is not None:
            raise outage

    def _send_renamed(self) -> None:
        """Send the points once more that this MLflow run has under names of earlier versions.

        Only they: everything else in the lines that have been sent is there.  The cursor is moved
        as in `_flush_some`, so that what ends this costs no point that has arrived.
        """
        for path in RunFolder(self.run_dir).list_spool_files():
            progress = self._cursor.files.get(path.name, Progress())
            for records in _until(path, progress.offset):
                content = _Content(dict(progress.last), _is_of_training(path))
                for record in records:
                    # A line that is no record was named when it came.
                    with suppress(LookupError, TypeError, ValueError, AttributeError):
                        if record["kind"] == "metrics":
                            content.add(record)
                self._send(Batch(content.metrics))
                progress.last = content.last
                self._cursor.save()
        self._cursor.names = NAMES
        self._cursor.save()

    def _flush_some(self, path: Path) -> bool:
        """Send one stretch of a file, then move the cursor; a crash between sends it twice."""
        progress = self._cursor.files.get(path.name, Progress())
        try:
            chunk = read_chunk(path, progress.offset)
        except OSError as error:
            if is_transient(error):
                raise
            raise _UnreadableError(error.strerror or str(error)) from error
        if chunk.offset == progress.offset:
            return False
        content = _Content(
            dict(progress.last), _is_of_training(path), artifacts=list(self._cursor.artifacts)
        )
        if chunk.broken:
            self._set_aside(f"a line of {path.name}", ValueError("is no record"))
        for record in chunk.records:
            try:
                content.add(record)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # Of another version, or damaged: no reason to keep back all that follows.
                self._set_aside(f"a line of {path.name}", error)
        for value_name, reason in content.refused.items():
            self._set_aside(value_name, reason)
        params = {k: self._cut(f"parameter {k}", v, _PARAM) for k, v in content.params.items()}
        tags = {k: self._cut(f"tag {k}", v, _TAG) for k, v in content.tags.items()}
        new = {k: v for k, v in params.items() if k not in self._params}
        self._send(
            Batch(
                content.metrics,
                [Param(k, v) for k, v in new.items()],
                [RunTag(k, v) for k, v in tags.items()],
            )
        )
        self._params |= new.keys()
        if content.status is not None:
            status = content.status
            if (refusal := self._try(lambda: self._set_status(status))) is not None:
                self._set_aside(f"status {status['value']}", refusal)
        self._cursor.files[path.name] = Progress(chunk.offset, content.last)
        self._cursor.artifacts = content.artifacts
        self._cursor.save()
        return True

    def _send(self, batch: Batch) -> None:
        for request in batch.within_limits():
            self._send_part(request)

    def _send_part(self, batch: Batch) -> None:
        """Send values, halving what is refused: one bad value must not hold up all others."""
        if len(batch) == 0:
            return
        error = self._try(lambda: self._log_batch(batch))
        if error is None:
            return
        if len(batch) == 1:
            self._set_aside(batch.name(), error)
            return
        for half in batch.halves():
            self._send_part(half)

    def _try(self, action: Callable[[], None]) -> Exception | None:
        """Say why MLflow refuses this although it takes other things; ``None`` if it takes it."""
        for _ in range(2):
            try:
                action()
            except Exception as error:
                if is_transient(error) and not is_ambiguous(error):
                    raise
                self._client.set_tag(self._run().info.run_id, UUID_TAG, self._identity.uuid)
                reason = error
            else:
                return None
        return reason

    def _set_aside(self, value_name: str, error: Exception) -> None:
        refused = self._cursor.refused
        if value_name not in refused and len(refused) >= _MOST_NAMED:
            value_name = "more than can be named"
        if value_name not in refused:
            _log.warning("MLflow does not take %s: %s", printable(value_name), error_line(error))
        refused[value_name] = error_line(error)

    def _cut(self, value_name: str, value: str, most: int) -> str:
        if len(value) > most:
            self._set_aside(
                value_name, Refused(f"only the first {most} of {len(value)} characters")
            )
        return value[:most]

    def _log_batch(self, batch: Batch) -> None:
        self._client.log_batch(self.run_id, batch.metrics, batch.params, batch.tags)

    def _upload(self, place: str) -> None:
        error = self._try(lambda: self._log_artifact(place))
        if error is not None:
            self._set_aside(f"artifact {place or 'without a name'}", error)

    def _log_artifact(self, place: str) -> None:
        if sqlite_file(self._cursor.tracking_uri) and self._store.startswith(_SERVERS):
            raise Refused(f"the database has it sent to {self._store}, which nobody has asked for")
        with open_artifact(self.run_dir, place) as path:
            self._client.log_artifact(self.run_id, str(path))

    def _set_status(self, record: dict[str, Any]) -> None:
        if record["value"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["value"], end_time=record["t"])

    def _run(self) -> Any:
        run = self._client.get_run(self.run_id)
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            raise Refused(
                f"run {self.run_id} was deleted in MLflow: restore it there (mlflow runs restore "
                f"--run-id {self.run_id})"
            )
        return run


class _UnreadableError(ValueError):
    """A file of the spool cannot be read; all others can."""


@dataclass
class _Content:
    """Content of some records of a spool file, ready to be sent."""

    last: dict[str, int]
    """The last step, by metric: curves only move forward."""
    is_of_training: bool
    """Whether the trainer has written them."""
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    status: dict[str, Any] | None = None
    refused: dict[str, Exception] = field(default_factory=dict)
    """What is no value at all."""

    def add(self, record: dict[str, Any]) -> None:
        """Add one record; raises whatever a record that is none leads to."""
        kind, t = record["kind"], record["t"]
        if kind == "metrics":
            values = _values(record)
            if "names" not in record:
                of_training = self.is_of_training
                values = {current_curve(k, of_training=of_training): values[k] for k in values}
            self._add_metrics(values, record["step"], t)
        elif kind == "params":
            self.params = self._texts("parameter", _values(record)) | self.params
        elif kind == "tags":
            self.tags |= self._texts("tag", _values(record))
        elif kind == "artifact":
            self._add_artifact(record["path"])
        elif kind == "status":
            if record["value"] not in get_args(Status):
                raise ValueError("no status of a run")
            if is_count(t):
                self.status = {"value": record["value"], "t": t}
            else:
                self.refused[f"status {record['value']}"] = ValueError(
                    "its time is no whole number"
                )
        else:
            raise ValueError(f"a record of kind {kind[:_LONGEST_KIND]}")

    def _add_metrics(self, values: dict[str, Any], step: object, t: object) -> None:
        for raw, value in values.items():
            key = clean_key(raw)
            if not is_count(step) or not is_count(t):
                self.refused[f"metric {key}"] = ValueError("its step or time is no whole number")
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                self.refused[f"metric {key}"] = ValueError("its value is no number")
                continue
            if step > self.last.get(key, -1):
                self.last[key] = step
                self.metrics.append(Metric(key, number, t, step))

    def _texts(self, kind: str, values: dict[str, Any]) -> dict[str, str]:
        """Return values that are text or become it, without tags that say which run this is."""
        texts = {}
        for raw, value in values.items():
            key = clean_key(raw)
            if kind == "tag" and key in OWN_TAGS:
                self.refused[f"tag {key}"] = ValueError("is not for the spool to say")
            elif isinstance(value, str | int | float | None):
                texts[key] = str(value)
            else:
                self.refused[f"{kind} {key}"] = ValueError("its value is no text")
        return texts

    def _add_artifact(self, place: object) -> None:
        if not isinstance(place, str) or len(place) > _LONGEST_PATH:
            raise ValueError("an artifact without a path")
        if place not in self.artifacts:
            self.artifacts.append(place)


def _until(path: Path, end: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a spool file up to an offset, or somewhat beyond, in chunks."""
    offset = 0
    while offset < end:
        try:
            chunk = read_chunk(path, offset)
        except OSError as error:
            if is_transient(error):
                raise
            return  # which `Replayer.flush` names
        if chunk.offset <= offset:
            return
        offset = chunk.offset
        yield chunk.records


def _is_of_training(path: Path) -> bool:
    return path.stem == TRAINER[0]


def _values(record: dict[str, Any]) -> dict[str, Any]:
    values = record["values"]
    if not isinstance(values, dict):
        raise ValueError("values that are none")
    return values
