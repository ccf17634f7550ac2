"""A look at an sqlite database and the folders around it; nothing is written, not even a lock."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from vssl_dist.tracker.report import TrackingQuery, TrackingReport

_MAGIC = b"SQLite format 3\0"
_MLFLOWS = {"experiments", "runs", "metrics", "params", "tags"}
_ANOTHER = "set MLFLOW_TRACKING_URI to another address"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def why_no_locks(folder: Path) -> str | None:
    """Say why files below a folder, which need not exist, cannot be locked, or return ``None``.

    A folder's own locks are the kernel's, so one of its files is asked.  Where there is none yet
    nothing can be known without writing.
    """
    nearest = folder if folder.is_dir() else nearest_folder(folder)
    try:
        with os.scandir(nearest) as entries:
            files = (entry.path for entry in entries if entry.is_file(follow_symlinks=False))
            descriptor = os.open(next(files, nearest), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # whoever wants to write there says more
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return f"the file system of {nearest} has no locks ({error.strerror})"
    finally:
        os.close(descriptor)
    return None


def look_at_database(file: Path, question: TrackingQuery, timeout_s: float) -> TrackingReport:
    """Report what keeps an sqlite database from taking the run."""
    try:
        return next(_obstacles(file, question, timeout_s), TrackingReport())
    except sqlite3.OperationalError as error:
        # Locked, or busy with a rollback: both pass.
        return question.away(error)
    except (OSError, ValueError, sqlite3.Error) as error:
        return TrackingReport(f"tracking to {file}: {error}: {_ANOTHER}")


def _obstacles(file: Path, question: TrackingQuery, timeout_s: float) -> Iterator[TrackingReport]:
    folder = nearest_folder(file)
    if not folder.is_dir():
        yield TrackingReport(f"tracking to {file}: {folder} is no folder: {_ANOTHER}")
    # sqlite keeps its journal beside the database.
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        yield TrackingReport(f"tracking to {file}: no right to write in {folder}: {_ANOTHER}")
    if reason := why_no_locks(folder):
        yield TrackingReport(f"tracking to {file}: {reason}, which sqlite needs: {_ANOTHER}")
    try:
        file.lstat()  # which also says that no file can have this name
    except FileNotFoundError:
        return
    if not file.is_file():
        yield TrackingReport(f"tracking to {file}: is no file: {_ANOTHER}")
    if not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
        yield TrackingReport(f"tracking to {file}: no right to write into it: {_ANOTHER}")
    if file.stat().st_size:
        yield from _read(file, question, timeout_s)


def _read(file: Path, question: TrackingQuery, timeout_s: float) -> Iterator[TrackingReport]:
    with file.open("rb") as opened:
        head = opened.read(20)
    if not head.startswith(_MAGIC):
        yield TrackingReport(f"tracking to {file}: is no sqlite database: {_ANOTHER}")
        return
    uri = f"file:{quote(os.fsencode(file.absolute()))}?mode=ro"
    if head[18] == 2:  # a write-ahead log, which readers would open for writing, too
        log = file.with_name(f"{file.name}-wal")
        uri += "&readonly_shm=1" if log.exists() and log.stat().st_size else "&immutable=1"
    with closing(sqlite3.connect(uri, uri=True, timeout=timeout_s / 2)) as base:
        yield from _inside(base, question)


def _inside(base: sqlite3.Connection, question: TrackingQuery) -> Iterator[TrackingReport]:
    tables = {name for (name,) in base.execute("SELECT name FROM sqlite_master")}
    version = ""
    if "alembic_version" in tables:
        version = next((v for (v,) in base.execute("SELECT version_num FROM alembic_version")), "")
    if not tables >= {"experiments", "runs"}:
        # MLflow makes its tables beside those of others, unless they are called the same.
        in_the_way = sorted(tables & _MLFLOWS) + ["alembic_version"] * bool(version)
        if in_the_way:
            yield TrackingReport(
                f"the database {question.uri} is another program's, or MLflow was stopped while "
                f"it made it (it has {', '.join(in_the_way)}): {_ANOTHER}"
            )
        return
    newest, earlier = schema_history()
    if newest and version != newest:
        is_older = not version or version in earlier
        yield TrackingReport(
            _of_another_version(question.uri, version or "of no version", newest, is_older)
        )
        return
    binned = base.execute(
        "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'",
        (question.experiment,),
    )
    for (experiment_id,) in binned:
        yield question.experiment_in_bin(experiment_id)
    deleted = base.execute(
        "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'deleted' AND run_uuid"
        " IN (SELECT run_uuid FROM tags WHERE key = 'vssl_dist.run' AND value = ?)",
        (question.uuid,),
    )
    for (run_id,) in deleted:
        yield question.run_in_bin(run_id)
    of_another = base.execute(
        "SELECT run_uuid FROM runs WHERE run_uuid = ? AND run_uuid"
        " NOT IN (SELECT run_uuid FROM tags WHERE key = 'vssl_dist.run' AND value = ?)",
        (question.run_id, question.uuid),
    )
    for _ in of_another:
        yield question.run_of_another()


def _of_another_version(uri: str, version: str, newest: str, is_older: bool) -> str:
    facts = f"the database {uri} has schema {version}, the installed MLflow wants {newest}: "
    if is_older:
        return f"{facts}copy the file, then `mlflow db upgrade '{uri}'`, or {_ANOTHER}"
    return f"{facts}it is of a newer MLflow, install that, or {_ANOTHER}"


def schema_history() -> tuple[str, set[str]]:
    """Return the newest schema of the installed MLflow's databases, and all that went before.

    They stand in its migrations, one file each, as ``revision`` and ``down_revision``.
    """
    spec = find_spec("mlflow")
    if spec is None or spec.origin is None:
        return "", set()
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    revisions: set[str] = set()
    replaced: set[str] = set()
    for file in folder.glob("*.py"):
        text = file.read_text()
        for names, line in ((revisions, r"revision"), (replaced, r"down_revision")):
            if statement := re.search(rf"^{line}(?:\s*:[^=]+)?\s*=\s*(.+)$", text, re.M):
                names |= set(re.findall(r"[\"']([0-9a-f]+)[\"']", statement[1]))
    newest = revisions - replaced
    return (newest.pop(), revisions) if len(newest) == 1 else ("", revisions)


def nearest_folder(path: Path) -> Path:
    """Return the first of a path's parents that is there."""
    return next((parent for parent in path.parents if os.path.lexists(parent)), Path("/"))
