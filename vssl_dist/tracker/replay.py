"""From the spool into MLflow, again and again without a double."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import LifecycleStage, Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from vssl_dist.tracker.cursor import Cursor, Progress
from vssl_dist.tracker.remote import connect, find_or_create
from vssl_dist.tracker.spool import read, run_file, spool_folder

_METRICS, _PARAMS = 1000, 100
_KEY, _PARAM, _TAG = 250, 6000, 5000
_log = logging.getLogger(__name__)


def clean_key(key: str) -> str:
    """A key as MLflow takes it: no strange characters, no path tricks, at most 250 long.

    >>> clean_key("knn/top1_k20_t0.07"), clean_key("../a//b?")
    ('knn/top1_k20_t0.07', 'a/b_')
    """
    parts = re.sub(r"[^\w\-. /]", "_", key).split("/")
    return "/".join(p for p in parts if p not in ("", ".", ".."))[:_KEY].rstrip("/") or "_"


class _Batch(NamedTuple):
    """What one request carries."""

    metrics: Sequence[Metric] = ()
    params: Sequence[Param] = ()
    tags: Sequence[RunTag] = ()

    def within_limits(self) -> Iterator[_Batch]:
        """The same in requests of at most 1000 metrics, 100 parameters and 100 tags."""
        for start in range(0, max(len(self.params), len(self.tags)), _PARAMS):
            stretch = slice(start, start + _PARAMS)
            yield _Batch((), self.params[stretch], self.tags[stretch])
        for start in range(0, len(self.metrics), _METRICS):
            yield _Batch(self.metrics[start : start + _METRICS])

    def singles(self) -> Iterator[_Batch]:
        """The same, one thing at a time."""
        yield from (_Batch(metrics=[m]) for m in self.metrics)
        yield from (_Batch(params=[p]) for p in self.params)
        yield from (_Batch(tags=[t]) for t in self.tags)


class Replayer:
    """Brings one run's spool into its MLflow run.  Only the holder of the lease has one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        facts = json.loads(run_file(run_dir).read_text())
        self._client = connect(facts["tracking_uri"])
        self.run_id = find_or_create(self._client, run_dir, facts)
        self._cursor = Cursor.load(run_dir, self.run_id)
        # MLflow refuses another value for a parameter that it has: the first one stays.
        self._params = set(self._run().data.params)

    def flush(self) -> None:
        """Send what is new; raises whatever MLflow raises, and may then simply be called again."""
        for path in sorted(spool_folder(self.run_dir).glob("*.jsonl")):
            while self._flush_some(path):
                pass
        for place in list(self._cursor.artifacts):
            self._upload(place)
            self._cursor.artifacts.remove(place)
            self._cursor.save()

    def _flush_some(self, path: Path) -> bool:
        """Send one stretch of a file, then move the cursor; a crash between sends it twice."""
        done = self._cursor.files.get(path.name, Progress())
        records, offset = read(path, done.offset)
        if offset == done.offset:
            return False
        after = Progress(offset, dict(done.last))
        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        artifacts, status = list(self._cursor.artifacts), None
        for record in records:
            kind = record["kind"]
            if kind == "metrics":
                metrics += _forward(record, after.last)
            elif kind == "params":
                params = {clean_key(k): v for k, v in record["values"].items()} | params
            elif kind == "tags":
                tags |= {clean_key(k): v for k, v in record["values"].items()}
            elif kind == "artifact":
                artifacts += [p for p in [record["path"]] if p not in artifacts]
            elif kind == "status":
                status = record
        new = {k: v for k, v in params.items() if k not in self._params}
        self._send(
            _Batch(
                metrics,
                [Param(k, v[:_PARAM]) for k, v in new.items()],
                [RunTag(k, v[:_TAG]) for k, v in tags.items()],
            )
        )
        self._params |= new.keys()
        if status is not None:
            self._set_status(status)
        self._cursor.files[path.name], self._cursor.artifacts = after, artifacts
        self._cursor.save()
        return True

    def _send(self, batch: _Batch) -> None:
        for part in batch.within_limits():
            try:
                self._log_batch(part)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                self._send_singly(part)

    def _send_singly(self, batch: _Batch) -> None:
        """One value that MLflow will never take must not hold up all others for ever."""
        self._run()
        for single in batch.singles():
            try:
                self._log_batch(single)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                _log.warning("MLflow refuses %s: %s", single, error)

    def _log_batch(self, batch: _Batch) -> None:
        self._client.log_batch(self.run_id, batch.metrics, batch.params, batch.tags)

    def _upload(self, place: str) -> None:
        path = self.run_dir / place
        if path.is_file():
            self._client.log_artifact(self.run_id, str(path))
        else:
            _log.warning("artifact %s is not there: skipped", path)

    def _set_status(self, record: dict[str, Any]) -> None:
        if record["value"] == "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.run_id, record["value"], end_time=record["t"])

    def _run(self) -> Any:
        run = self._client.get_run(self.run_id)
        if run.info.lifecycle_stage != LifecycleStage.ACTIVE:
            raise RuntimeError(f"run {self.run_id} was deleted in MLflow: restore it there")
        return run


def _forward(record: dict[str, Any], last: dict[str, int]) -> Iterator[Metric]:
    """The metrics of a record that move their curve forward."""
    step = record["step"]
    for raw, value in record["values"].items():
        key = clean_key(raw)
        if step > last.get(key, -1):
            last[key] = step
            yield Metric(key, float(value), record["t"], step)
