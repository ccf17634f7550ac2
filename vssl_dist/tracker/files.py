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

_SQLITE_MAGIC = b"SQLite format 3\0"
_MLFLOW_TABLES = {"experiments", "runs", "metrics", "params", "tags"}
_ADDRESS_REMEDY = "set MLFLOW_TRACKING_URI to another address"
_NO_LOCKS_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def why_no_locks(folder: Path) -> str | None:
    """Say why files below a folder, which need not exist, cannot be locked, or return ``None``.

    A folder's own locks are the kernel's, so one of its files is asked.  Where there is none yet
    nothing can be known without writing.
    """
    existing_folder = folder if folder.is_dir() else nearest_folder(folder)
    try:
        with os.scandir(existing_folder) as entries:
            file_paths = (entry.path for entry in entries if entry.is_file(follow_symlinks=False))
            descriptor = os.open(next(file_paths, existing_folder), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None  # whoever wants to write there says more
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS_ERRNOS:
            return f"the file system of {existing_folder} has no locks ({error.strerror})"
    finally:
        os.close(descriptor)
    return None


def look_at_database(file: Path, tracking_query: TrackingQuery, timeout_s: float) -> TrackingReport:
    """Report what keeps an sqlite database from taking the run."""
    try:
        return next(_database_obstacles(file, tracking_query, timeout_s), TrackingReport())
    except sqlite3.OperationalError as error:
        # Locked, or busy with a rollback: both pass.
        return tracking_query.report_unreachable(error)
    except (OSError, ValueError, sqlite3.Error) as error:
        return TrackingReport(f"tracking to {file}: {error}: {_ADDRESS_REMEDY}")


def _database_obstacles(
    file: Path, tracking_query: TrackingQuery, timeout_s: float
) -> Iterator[TrackingReport]:
    folder = nearest_folder(file)
    if not folder.is_dir():
        yield TrackingReport(f"tracking to {file}: {folder} is no folder: {_ADDRESS_REMEDY}")
    # sqlite keeps its journal beside the database.
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        yield TrackingReport(
            f"tracking to {file}: no right to write in {folder}: {_ADDRESS_REMEDY}"
        )
    if reason := why_no_locks(folder):
        yield TrackingReport(f"tracking to {file}: {reason}, which sqlite needs: {_ADDRESS_REMEDY}")
    try:
        file.lstat()  # which also says that no file can have this name
    except FileNotFoundError:
        return
    if not file.is_file():
        yield TrackingReport(f"tracking to {file}: is no file: {_ADDRESS_REMEDY}")
    if not os.access(file, os.R_OK | os.W_OK, effective_ids=True):
        yield TrackingReport(f"tracking to {file}: no right to write into it: {_ADDRESS_REMEDY}")
    if file.stat().st_size:
        yield from _read_database(file, tracking_query, timeout_s)


def _read_database(
    file: Path, tracking_query: TrackingQuery, timeout_s: float
) -> Iterator[TrackingReport]:
    with file.open("rb") as database_file:
        header_bytes = database_file.read(20)
    if not header_bytes.startswith(_SQLITE_MAGIC):
        yield TrackingReport(f"tracking to {file}: is no sqlite database: {_ADDRESS_REMEDY}")
        return
    uri = f"file:{quote(os.fsencode(file.absolute()))}?mode=ro"
    if header_bytes[18] == 2:  # a write-ahead log, which readers would open for writing, too
        write_ahead_log = file.with_name(f"{file.name}-wal")
        uri += (
            "&readonly_shm=1"
            if write_ahead_log.exists() and write_ahead_log.stat().st_size
            else "&immutable=1"
        )
    with closing(sqlite3.connect(uri, uri=True, timeout=timeout_s / 2)) as connection:
        yield from _schema_obstacles(connection, tracking_query)


def _schema_obstacles(
    connection: sqlite3.Connection, tracking_query: TrackingQuery
) -> Iterator[TrackingReport]:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    schema_version = ""
    if "alembic_version" in tables:
        schema_version = next(
            (v for (v,) in connection.execute("SELECT version_num FROM alembic_version")), ""
        )
    if not tables >= {"experiments", "runs"}:
        # MLflow makes its tables beside those of others, unless they are called the same.
        clashing_tables = sorted(tables & _MLFLOW_TABLES) + ["alembic_version"] * bool(
            schema_version
        )
        if clashing_tables:
            yield TrackingReport(
                f"the database {tracking_query.uri} is another program's, or MLflow was stopped "
                f"while it made it (it has {', '.join(clashing_tables)}): {_ADDRESS_REMEDY}"
            )
        return
    newest_schema, earlier_schemas = schema_history()
    if newest_schema and schema_version != newest_schema:
        is_older = not schema_version or schema_version in earlier_schemas
        yield TrackingReport(
            _schema_mismatch_text(
                tracking_query.uri, schema_version or "of no version", newest_schema, is_older
            )
        )
        return
    deleted_experiments = connection.execute(
        "SELECT experiment_id FROM experiments WHERE name = ? AND lifecycle_stage = 'deleted'",
        (tracking_query.experiment,),
    )
    for (experiment_id,) in deleted_experiments:
        yield tracking_query.experiment_in_bin(experiment_id)
    deleted_runs = connection.execute(
        "SELECT run_uuid FROM runs WHERE lifecycle_stage = 'deleted' AND run_uuid"
        " IN (SELECT run_uuid FROM tags WHERE key = 'vssl_dist.run' AND value = ?)",
        (tracking_query.uuid,),
    )
    for (run_id,) in deleted_runs:
        yield tracking_query.run_in_bin(run_id)
    foreign_runs = connection.execute(
        "SELECT run_uuid FROM runs WHERE run_uuid = ? AND run_uuid"
        " NOT IN (SELECT run_uuid FROM tags WHERE key = 'vssl_dist.run' AND value = ?)",
        (tracking_query.run_id, tracking_query.uuid),
    )
    for _ in foreign_runs:
        yield tracking_query.run_of_another()


def _schema_mismatch_text(uri: str, schema_version: str, newest_schema: str, is_older: bool) -> str:
    mismatch_text = (
        f"the database {uri} has schema {schema_version}, the installed MLflow wants "
        f"{newest_schema}: "
    )
    if is_older:
        return (
            f"{mismatch_text}copy the file, then `mlflow db upgrade '{uri}'`, or {_ADDRESS_REMEDY}"
        )
    return f"{mismatch_text}it is of a newer MLflow, install that, or {_ADDRESS_REMEDY}"


def schema_history() -> tuple[str, set[str]]:
    """Return the newest schema of the installed MLflow's databases, and all that went before.

    They stand in its migrations, one file each, as ``revision`` and ``down_revision``.
    """
    mlflow_spec = find_spec("mlflow")
    if mlflow_spec is None or mlflow_spec.origin is None:
        return "", set()
    folder = Path(mlflow_spec.origin).parent / "store" / "db_migrations" / "versions"
    revisions: set[str] = set()
    replaced_revisions: set[str] = set()
    for file in folder.glob("*.py"):
        text = file.read_text()
        for revision_set, variable_name in (
            (revisions, r"revision"),
            (replaced_revisions, r"down_revision"),
        ):
            if assignment := re.search(rf"^{variable_name}(?:\s*:[^=]+)?\s*=\s*(.+)$", text, re.M):
                revision_set |= set(re.findall(r"[\"']([0-9a-f]+)[\"']", assignment[1]))
    newest = revisions - replaced_revisions
    return (newest.pop(), revisions) if len(newest) == 1 else ("", revisions)


def nearest_folder(path: Path) -> Path:
    """Return the first of a path's parents that is there."""
    return next((parent for parent in path.parents if os.path.lexists(parent)), Path("/"))
