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
from vssl_dist.tracker.cursor import Cursor, SpoolFileProgress
from vssl_dist.tracker.identity import Identity, as_utf8
from vssl_dist.tracker.intake import is_count
from vssl_dist.tracker.look import probe_tracking
from vssl_dist.tracker.record import TrackingRecord
from vssl_dist.tracker.refusals import RefusedByMlflow, error_line, is_ambiguous, is_transient
from vssl_dist.tracker.remote import (
    OWN_TAGS,
    UUID_TAG,
    connect_client,
    find_or_create_run,
    own_tags,
)
from vssl_dist.tracker.spool import TRAINER_WRITERS, Status, read_chunk

_MAX_PARAM_LENGTH, _MAX_TAG_LENGTH = 6000, 5000
_MAX_NAMED_REFUSALS = 500
_SERVER_SCHEMES = ("http:", "https:", "mlflow-artifacts:")
"""Stores that are signed in to: a database, which may be anybody's file, does not choose them."""
_MAX_PATH_LENGTH = 4096
_MAX_KIND_LENGTH = 80
_log = logging.getLogger(__name__)


class Replayer:
    """Replays one run's spool into its MLflow run; only the holder of the lease has one.

    Args:
        run_dir: The run's folder.
        identity: Which run that is.
        record: Where its curves go, and the MLflow runs that it has.
        retry_refused: Try once more what was set aside.
    """

    def __init__(
        self,
        run_dir: Path,
        identity: Identity,
        record: TrackingRecord,
        *,
        retry_refused: bool = False,
    ) -> None:
        uri = record.tracking_uri
        # MLflow itself tries for minutes to open what can be seen to be closed.
        if problem := probe_tracking(uri, run_dir, record.experiment).problem:
            raise RefusedByMlflow(problem)
        self.run_dir, self._identity = run_dir, identity
        self._client = connect_client(uri)
        self.run_id = find_or_create_run(self._client, run_dir, identity, record)
        self._cursor = Cursor.load(run_dir, uri, self.run_id)
        if retry_refused and self._cursor.refusal_reasons:
            self._cursor.forget_sent()
        run = self._active_run()
        # MLflow refuses another value for a parameter that it has: the first one stays.
        self._sent_param_keys = set(run.data.params)
        self._artifact_uri: str = run.info.artifact_uri
        self._send_own_tags(run, own_tags(run_dir, identity, uri))

    def _send_own_tags(self, run: Any, tags: dict[str, str]) -> None:
        """Send where the run is now; of a copy also its name, before its history does."""
        new_tags = [
            RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value
        ]
        params = {}
        if self._identity.parent is not None:
            params = {"name": self.run_dir.name, "out": str(self.run_dir.parent)}
        unsent_params = [
            Param(k, as_utf8(v)) for k, v in params.items() if k not in self._sent_param_keys
        ]
        self._send_batch(Batch((), unsent_params, new_tags))
        self._sent_param_keys |= params.keys()

    def flush(self) -> None:
        """Send what is new; raises whatever MLflow raises, and may then simply be called again."""
        if self._cursor.names_version != NAMES:
            self._send_renamed()
        for path in RunFolder(self.run_dir).list_spool_files():
            try:
                while self._send_next_chunk(path):
                    pass
            except _UnreadableError as error:
                value_name = f"the file {path.name} of the spool"
                if value_name not in self._cursor.refusal_reasons:
                    self._set_aside(value_name, error)
                    self._cursor.save()
        last_error: Exception | None = None
        for relative_path in list(self._cursor.pending_artifacts):
            try:
                self._upload(relative_path)
            except Exception as error:  # the next one may lie in another store
                last_error = error
                continue
            self._cursor.pending_artifacts.remove(relative_path)
            self._cursor.save()
        if last_error is not None:
            raise last_error

    def _send_renamed(self) -> None:
        """Send the points once more that this MLflow run has under names of earlier versions.

        Only they: everything else in the lines that have been sent is there.  The cursor is moved
        as in `_send_next_chunk`, so that what ends this costs no point that has arrived.
        """
        for path in RunFolder(self.run_dir).list_spool_files():
            progress = self._cursor.progress_by_file.get(path.name, SpoolFileProgress())
            for records in _records_until(path, progress.offset):
                sendable = _SendableValues(dict(progress.last), _is_of_training(path))
                for record in records:
                    # A line that is no record was named when it came.
                    with suppress(LookupError, TypeError, ValueError, AttributeError):
                        if record["kind"] == "metrics":
                            sendable.add(record)
                self._send_batch(Batch(sendable.metrics))
                progress.last = sendable.last_steps
                self._cursor.save()
        self._cursor.names_version = NAMES
        self._cursor.save()

    def _send_next_chunk(self, path: Path) -> bool:
        """Send one stretch of a file, then move the cursor; a crash between sends it twice."""
        progress = self._cursor.progress_by_file.get(path.name, SpoolFileProgress())
        try:
            chunk = read_chunk(path, progress.offset)
        except OSError as error:
            if is_transient(error):
                raise
            raise _UnreadableError(error.strerror or str(error)) from error
        if chunk.offset == progress.offset:
            return False
        sendable = _SendableValues(
            dict(progress.last),
            _is_of_training(path),
            artifacts=list(self._cursor.pending_artifacts),
        )
        if chunk.num_broken_lines:
            self._set_aside(f"a line of {path.name}", ValueError("is no record"))
        for record in chunk.records:
            try:
                sendable.add(record)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                # Of another version, or damaged: no reason to keep back all that follows.
                self._set_aside(f"a line of {path.name}", error)
        for value_name, reason in sendable.invalid_values.items():
            self._set_aside(value_name, reason)
        params = {
            k: self._cut_to_limit(f"parameter {k}", v, _MAX_PARAM_LENGTH)
            for k, v in sendable.params.items()
        }
        tags = {
            k: self._cut_to_limit(f"tag {k}", v, _MAX_TAG_LENGTH) for k, v in sendable.tags.items()
        }
        unsent_params = {k: v for k, v in params.items() if k not in self._sent_param_keys}
        self._send_batch(
            Batch(
                sendable.metrics,
                [Param(k, v) for k, v in unsent_params.items()],
                [RunTag(k, v) for k, v in tags.items()],
            )
        )
        self._sent_param_keys |= unsent_params.keys()
        if sendable.status is not None:
            status = sendable.status
            if (refusal := self._try_request(lambda: self._set_status(status))) is not None:
                self._set_aside(f"status {status['value']}", refusal)
        self._cursor.progress_by_file[path.name] = SpoolFileProgress(
            chunk.offset, sendable.last_steps
        )
        self._cursor.pending_artifacts = sendable.artifacts
        self._cursor.save()
        return True

    def _send_batch(self, batch: Batch) -> None:
        for request in batch.split_within_limits():
            self._send_or_halve(request)

    def _send_or_halve(self, batch: Batch) -> None:
        """Send values, halving what is refused: one bad value must not hold up all others."""
        if len(batch) == 0:
            return
        error = self._try_request(lambda: self._log_batch(batch))
        if error is None:
            return
        if len(batch) == 1:
            self._set_aside(batch.name(), error)
            return
        for half_batch in batch.split_in_half():
            self._send_or_halve(half_batch)

    def _try_request(self, action: Callable[[], None]) -> Exception | None:
        """Say why MLflow refuses this although it takes other things; ``None`` if it takes it."""
        for _ in range(2):
            try:
                action()
            except Exception as error:
                if is_transient(error) and not is_ambiguous(error):
                    raise
                self._client.set_tag(self._active_run().info.run_id, UUID_TAG, self._identity.uuid)
                reason = error
            else:
                return None
        return reason

    def _set_aside(self, value_name: str, error: Exception) -> None:
        refused = self._cursor.refusal_reasons
        if value_name not in refused and len(refused) >= _MAX_NAMED_REFUSALS:
            value_name = "more than can be named"
        if value_name not in refused:
            _log.warning("MLflow does not take %s: %s", printable(value_name), error_line(error))
        refused[value_name] = error_line(error)

    def _cut_to_limit(self, value_name: str, value: str, max_length: int) -> str:
        if len(value) > max_length:
            self._set_aside(
                value_name,
                RefusedByMlflow(f"only the first {max_length} of {len(value)} characters"),
            )
        return value[:max_length]

    def _log_batch(self, batch: Batch) -> None:
        self._client.log_batch(self.run_id, batch.metrics, batch.params, batch.tags)

    def _upload(self, relative_path: str) -> None:
        error = self._try_request(lambda: self._log_artifact(relative_path))
        if error is not None:
            self._set_aside(f"artifact {relative_path or 'without a name'}", error)

    def _log_artifact(self, relative_path: str) -> None:
        if sqlite_file(self._cursor.tracking_uri) and self._artifact_uri.startswith(
            _SERVER_SCHEMES
        ):
            raise RefusedByMlflow(
                f"the database has it sent to {self._artifact_uri}, which nobody has asked for"
            )
        with open_artifact(self.run_dir, relative_path) as path:
            self._client.log_artifact(self.run_id, str(path))

    def _set_status(self, record: dict[str, Any]) -> None:
        if record["value"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["value"], end_time=record["t"])

    def _active_run(self) -> Any:
        run = self._client.get_run(self.run_id)
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            raise RefusedByMlflow(
                f"run {self.run_id} was deleted in MLflow: restore it there (mlflow runs restore "
                f"--run-id {self.run_id})"
            )
        return run


class _UnreadableError(ValueError):
    """A file of the spool cannot be read; all others can."""


@dataclass
class _SendableValues:
    """Content of some records of a spool file, ready to be sent."""

    last_steps: dict[str, int]
    """The last step, by metric: curves only move forward."""
    is_of_training: bool
    """Whether the trainer has written them."""
    metrics: list[Metric] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    status: dict[str, Any] | None = None
    invalid_values: dict[str, Exception] = field(default_factory=dict)
    """Errors of values that are none, by the value's name."""

    def add(self, record: dict[str, Any]) -> None:
        """Add one record; raises whatever a record that is none leads to."""
        kind, t = record["kind"], record["t"]
        if kind == "metrics":
            values = _record_values(record)
            if "names" not in record:
                of_training = self.is_of_training
                values = {current_curve(k, of_training=of_training): values[k] for k in values}
            self._add_metrics(values, record["step"], t)
        elif kind == "params":
            self.params = self._text_values("parameter", _record_values(record)) | self.params
        elif kind == "tags":
            self.tags |= self._text_values("tag", _record_values(record))
        elif kind == "artifact":
            self._add_artifact(record["path"])
        elif kind == "status":
            if record["value"] not in get_args(Status):
                raise ValueError("no status of a run")
            if is_count(t):
                self.status = {"value": record["value"], "t": t}
            else:
                self.invalid_values[f"status {record['value']}"] = ValueError(
                    "its time is no whole number"
                )
        else:
            raise ValueError(f"a record of kind {kind[:_MAX_KIND_LENGTH]}")

    def _add_metrics(self, values: dict[str, Any], step: object, t: object) -> None:
        for raw_key, value in values.items():
            key = clean_key(raw_key)
            if not is_count(step) or not is_count(t):
                self.invalid_values[f"metric {key}"] = ValueError(
                    "its step or time is no whole number"
                )
                continue
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError):
                self.invalid_values[f"metric {key}"] = ValueError("its value is no number")
                continue
            if step > self.last_steps.get(key, -1):
                self.last_steps[key] = step
                self.metrics.append(Metric(key, number, t, step))

    def _text_values(self, kind: str, values: dict[str, Any]) -> dict[str, str]:
        """Return values that are text or become it, without tags that say which run this is."""
        texts = {}
        for raw_key, value in values.items():
            key = clean_key(raw_key)
            if kind == "tag" and key in OWN_TAGS:
                self.invalid_values[f"tag {key}"] = ValueError("is not for the spool to say")
            elif isinstance(value, str | int | float | None):
                texts[key] = str(value)
            else:
                self.invalid_values[f"{kind} {key}"] = ValueError("its value is no text")
        return texts

    def _add_artifact(self, relative_path: object) -> None:
        if not isinstance(relative_path, str) or len(relative_path) > _MAX_PATH_LENGTH:
            raise ValueError("an artifact without a path")
        if relative_path not in self.artifacts:
            self.artifacts.append(relative_path)


def _records_until(path: Path, end_offset: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of a spool file up to an offset, or somewhat beyond, in chunks."""
    offset = 0
    while offset < end_offset:
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
    return path.stem == TRAINER_WRITERS[0]


def _record_values(record: dict[str, Any]) -> dict[str, Any]:
    values = record["values"]
    if not isinstance(values, dict):
        raise ValueError("values that are none")
    return values
