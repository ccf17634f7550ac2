"""The spool: append-only JSON lines with original timestamps, one file per process.

A record is ``{"kind", "t", ...}`` with ``t`` in milliseconds since 1970 and ``kind`` one of
``metrics`` (step, names, values), ``params`` (values), ``tags`` (values), ``artifact`` (path) and
``status`` (value).  Non-finite metrics are written as the strings ``nan``, ``inf`` and ``-inf``,
so that every line is strict JSON.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vssl_dist.curves import NAMES
from vssl_dist.durable import open_append
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker.identity import settle_identity
from vssl_dist.tracker.intake import is_count, open_safely

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
TRAINER_WRITERS = ("train", "system")
"""Who writes while a run trains; evaluations come and go."""
_MAX_LINE_BYTES = 1 << 24
_CHUNK_BYTES = 1 << 20
_WRITER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_log = logging.getLogger(__name__)


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Flatten nested values to dotted keys and text; blocks in a list are numbered.

    >>> flatten({"optim": {"lr": 0.2, "betas": (0.9, 1)}, "views": [{"blur": None}], "name": "a"})
    {'optim.lr': '0.2', 'optim.betas': '[0.9, 1]', 'views.0.blur': 'null', 'name': 'a'}
    """
    flat_values: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
            value = {str(i): v for i, v in enumerate(value)}
        if isinstance(value, Mapping):
            flat_values |= flatten(value, f"{prefix}{key}.")
        else:
            flat_values[f"{prefix}{key}"] = (
                value if isinstance(value, str) else _value_as_text(value)
            )
    return flat_values


def _value_as_text(value: object) -> str:
    return repr(value) if isinstance(value, float) else json.dumps(value, default=str)


def _json_number(value: float) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)


class Spool:
    """Append-only file of one process, one record a line.

    A line reaches the operating system before the call returns, in one append: ``kill -9`` loses
    nothing, and at worst tears the last line, which the next writer ends and readers skip.  A
    full disk is reported once and never raised: tracking does not end a training.

    Within one writer a curve only moves forward: of a key that is written again for a step that
    it has already reached (a resumed run redoes steps) only the first value is shown.  So a
    process that reports steps in any order, such as an evaluation, takes a writer per step.

    Args:
        run_dir: The run's folder; ``run_dir/spool`` is created.
        writer: Name of the file, the same for the same role after a resume; letters, digits,
            ``.``, ``_`` and ``-``.
    """

    def __init__(self, run_dir: Path, writer: str) -> None:
        if not _WRITER_NAME.fullmatch(writer):
            raise ValueError(f"spool writer {writer!r}: use letters, digits, '.', '_' and '-'")
        self.run_dir = run_dir.absolute()
        self.path = RunFolder(self.run_dir).spool_file_path(writer)
        settle_identity(self.run_dir)
        self._lock = threading.Lock()
        self._file = open_append(self.path)
        self._is_line_torn = self._ends_in_torn_line()
        self._has_warned = False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars of a training step; NaN and infinities are accepted."""
        json_numbers = {key: _json_number(value) for key, value in values.items()}
        # Without the number they would be taken for names of earlier versions and renamed.
        record = {"kind": "metrics", "step": int(step), "names": NAMES, "values": json_numbers}
        self._append_record(record)

    def params(self, values: Mapping[str, object]) -> None:
        """Write what the run was started with, nested or flat; the first value of a key stays."""
        self._append_record({"kind": "params", "values": flatten(values)})

    def tags(self, values: Mapping[str, object]) -> None:
        """Write labels of the run; the last value of a key stays."""
        self._append_record({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def artifact(self, path: Path) -> None:
        """Ask for a file to be uploaded; it must stay where it is until it is."""
        path = path.absolute()
        is_inside_run = path.is_relative_to(self.run_dir)
        # Relative, so that a run folder that was moved can still be replayed.
        stored_path = path.relative_to(self.run_dir) if is_inside_run else path
        self._append_record({"kind": "artifact", "path": str(stored_path)})

    def status(self, value: Status) -> None:
        """Write the status of the run.

        Only the trainer does, or its flusher if it dies without a word: an evaluation that flushes
        last replays that and adds none of its own.
        """
        self._append_record({"kind": "status", "value": value})

    def last_step(self) -> int:
        """Return the step of the last metrics in this file, -1 if there are none."""
        steps = (r.get("step") for r in all_records(self.path) if r["kind"] == "metrics")
        return max(filter(is_count, steps), default=-1)

    def close(self) -> None:
        """Close the file; nothing is pending."""
        self._file.close()

    def _ends_in_torn_line(self) -> bool:
        size = self._file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        self._file.seek(size - 1)
        return self._file.read(1) != b"\n"

    def _append_record(self, record: dict[str, Any]) -> None:
        record = {"kind": record.pop("kind"), "t": time.time_ns() // 1_000_000} | record
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._lock:
            line = b"\n" + line if self._is_line_torn else line
            try:
                self._is_line_torn = self._file.write(line) != len(line)
            except OSError as error:
                self._is_line_torn = True
                self._warn_once(error)
            else:
                if self._is_line_torn:
                    self._warn_once(OSError("the line could not be written whole"))

    def _warn_once(self, error: OSError) -> None:
        if not self._has_warned:
            _log.warning("%s: metrics are being lost: %s", self.path, error)
        self._has_warned = True


def mark_unfinished_failed(run_dir: Path, trainer_began_at: float) -> None:
    """Note ``FAILED`` for a trainer that died without a word on how its run stands.

    Args:
        run_dir: The run's folder.
        trainer_began_at: A time in seconds since 1970 at which that trainer had begun: a later one,
            which has taken the run up again, speaks for itself.
    """
    for path in RunFolder(run_dir).list_spool_files():
        status_records = [
            r for r in all_records(path) if r["kind"] == "status" and is_count(r["t"])
        ]
        last_status = status_records[-1] if status_records else {}
        if last_status.get("value") == "RUNNING" and last_status["t"] <= 1000 * trainer_began_at:
            spool = Spool(run_dir, path.stem)
            spool.status("FAILED")
            spool.close()


@dataclass(frozen=True)
class SpoolChunk:
    """Chunk of whole lines of a spool file."""

    records: list[dict[str, Any]]
    offset: int
    """Offset at which the next chunk begins."""
    num_broken_lines: int = 0
    """Lines that are no records: torn by a crash, or nothing that we have written."""


def read_chunk(path: Path, offset: int, max_bytes: int | None = _CHUNK_BYTES) -> SpoolChunk:
    """Read whole lines of a spool file from a byte offset on.

    A line without an end is not whole yet and stays for the next call, unless it is longer than
    any record.

    Args:
        path: The file.
        offset: Where to begin: 0 or where an earlier stretch ended.
        max_bytes: Stop after so many bytes, at the end of a line; ``None`` reads all.

    Raises:
        OSError: It is no regular file, or a link of another user.
    """
    records, num_broken_lines = [], 0
    with open_safely(path) as file:
        if offset > file.seek(0, os.SEEK_END):
            offset = 0
        start_offset = file.seek(offset)
        while line := file.readline(_MAX_LINE_BYTES):
            if not line.endswith(b"\n") and len(line) < _MAX_LINE_BYTES:
                break
            offset += len(line)
            record = _parse_record(line)
            if record is not None:
                records.append(record)
            elif line.strip():
                num_broken_lines += 1
            if max_bytes is not None and offset - start_offset >= max_bytes:
                break
    return SpoolChunk(records, offset, num_broken_lines)


def read_records(
    path: Path, offset: int, max_bytes: int | None = _CHUNK_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """The records of a `read_chunk`, and where it ends."""
    chunk = read_chunk(path, offset, max_bytes)
    return chunk.records, chunk.offset


def all_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every record of a spool file; none of one that cannot be read."""
    offset = -1
    chunk = SpoolChunk([], 0)
    while offset != chunk.offset:
        offset = chunk.offset
        try:
            chunk = read_chunk(path, offset)
        except OSError:
            return
        yield from chunk.records


def _parse_record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if "t" in record else None
