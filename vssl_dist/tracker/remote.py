"""The MLflow side: its database, and the one run that belongs to a run folder."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import re
import shlex
import time
import uuid
from pathlib import Path
from urllib.parse import quote

from filelock import AcquireReturnProxy, FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Experiment, LifecycleStage, Run, ViewType
from mlflow.exceptions import MlflowException

from vssl_dist.durable import share_with_folder_group, user_name
from vssl_dist.locks import describe_lock_holder, make_private_lock
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker.address import sqlite_file, sqlite_uri
from vssl_dist.tracker.identity import Identity, as_utf8, is_copy_of
from vssl_dist.tracker.intake import is_count
from vssl_dist.tracker.record import TrackingRecord
from vssl_dist.tracker.refusals import RefusedByMlflow
from vssl_dist.tracker.spool import read_records

UUID_TAG = "vssl_dist.run"
_FOLDER_TAG = "vssl_dist.run_dir"
_PARENT_TAGS = ("vssl_dist.parent", "vssl_dist.parent_run")
OWN_TAGS = {UUID_TAG, _FOLDER_TAG, *_PARENT_TAGS}
"""Which run it is: the spool, which may be anybody's, has no say in that."""
_CREATION_LOCK_WAIT_S = 60.0
_PARTIAL_SUFFIX = re.compile(r"\.[0-9a-f]{12}\.new")
"""How the name of a database in the making ends."""
_MAX_CANDIDATE_RUNS = 100
_log = logging.getLogger(__name__)


def connect_client(uri: str) -> MlflowClient:
    """Connect a client; one process at a time makes a database that is not there or empty."""
    database_path = sqlite_file(uri)
    if database_path is None:
        return MlflowClient(tracking_uri=uri)
    database_path.parent.mkdir(parents=True, exist_ok=True)
    if _size_in_bytes(database_path) == 0:
        with _hold_creation_lock(Path(f"{database_path}.lock")):
            _create_database(database_path)
    return MlflowClient(tracking_uri=_without_escapes(uri, database_path))


def _hold_creation_lock(lock_path: Path) -> AcquireReturnProxy[FileLock]:
    """Hold the lock under which a database is made.

    Raises:
        TimeoutError: Somebody else holds it for a minute.
        Refused: It is another user's.
    """
    try:
        return make_private_lock(lock_path).acquire(timeout=_CREATION_LOCK_WAIT_S)
    except Timeout:
        raise TimeoutError(f"{lock_path} is held by {describe_lock_holder(lock_path)}") from None
    except PermissionError as error:
        if not lock_path.exists():
            raise
        owner = user_name(lock_path.lstat().st_uid)
        raise RefusedByMlflow(
            f"{lock_path} belongs to {owner}, who was to make that database: have it removed, or "
            "set MLFLOW_TRACKING_URI to another address"
        ) from error


def _size_in_bytes(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _without_escapes(uri: str, database_path: Path) -> str:
    """Return an address without ``%XX``, which MLflow does not read when it makes folders.

    The folder stays open as long as the process lives: MLflow keeps its connections for as long.
    """
    if "%" not in uri.partition("?")[0]:
        return uri
    folder_descriptor = _open_folder_once(database_path.parent)
    uri_query = uri.partition("?")[2]
    return sqlite_uri(Path(f"/proc/self/fd/{folder_descriptor}", database_path.name), uri_query)


@functools.cache
def _open_folder_once(folder: Path) -> int:
    """Open a folder, once: MLflow keeps a store for each address that it has seen."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _create_database(database_path: Path) -> None:
    """Make an empty database beside its place, then put it there.

    It takes MLflow seconds and hundreds of statements, and one that was killed half-way it can
    neither finish nor use.
    """
    for leftover_path in database_path.parent.glob(f"{glob.escape(database_path.name)}.*.new"):
        if _PARTIAL_SUFFIX.fullmatch(leftover_path.name.removeprefix(database_path.name)):
            leftover_path.unlink()
    # Another name each time: of one that MLflow has seen in this process it makes no tables again.
    partial_path = database_path.with_name(f"{database_path.name}.{uuid.uuid4().hex[:12]}.new")
    uri = _without_escapes(sqlite_uri(partial_path), partial_path)
    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    share_with_folder_group(partial_path)
    if database_path.exists() and _size_in_bytes(database_path) == 0:
        # Removed while this process had it: sqlite makes an empty one.
        partial_path.replace(database_path)
        return
    try:
        # `mlflow ui` may have made one meanwhile; it does not know our lock.
        with contextlib.suppress(FileExistsError):
            database_path.hardlink_to(partial_path)
    except OSError:  # a file system without hard links
        if not database_path.exists():
            partial_path.rename(database_path)
    partial_path.unlink(missing_ok=True)


def find_or_create_run(
    client: MlflowClient, run_dir: Path, identity: Identity, record: TrackingRecord
) -> str:
    """Find or create the MLflow run of a folder and write its id into ``mlflow_run.json``.

    The run is looked for by its tag before it is made: a kill between making it and writing its
    id down does not make a second one.  A run that bears another folder's mark is that folder's,
    whatever is written down here: this one gets a run of its own.

    Args:
        client: Connected to ``record.tracking_uri``.
        run_dir: The run's folder.
        identity: Which run that is.
        record: What has been written down of its MLflow runs.
    """
    if record.run_id is not None:
        recorded_run = _run_if_exists(client, record.run_id)
        if recorded_run is not None and _is_run_of(recorded_run, run_dir, identity):
            return record.run_id
        if recorded_run is not None:
            _log.warning("MLflow run %s is another run's: this one gets its own", record.run_id)
    experiment_id = _find_or_create_experiment(client, record.experiment, record.tracking_uri)
    tagged_runs = client.search_runs(
        [experiment_id],
        f"tags.`{UUID_TAG}` = '{identity.uuid}'",
        run_view_type=ViewType.ALL,
        max_results=_MAX_CANDIDATE_RUNS,
    )
    own_run = next(
        (tagged_run for tagged_run in tagged_runs if _is_run_of(tagged_run, run_dir, identity)),
        None,
    )
    if own_run is not None:
        run_id: str = own_run.info.run_id
    else:
        run = client.create_run(
            experiment_id,
            start_time=_run_start_ms(run_dir),
            run_name=as_utf8(run_dir.name),
            tags={UUID_TAG: identity.uuid} | own_tags(run_dir, identity, record.tracking_uri),
        )
        run_id = run.info.run_id
    record.runs[record.tracking_uri] = run_id
    record.save(run_dir)
    return run_id


def own_tags(run_dir: Path, identity: Identity, uri: str) -> dict[str, str]:
    """Return the tags that say where a run is, and what it is a copy of."""
    tags = {_FOLDER_TAG: as_utf8(str(run_dir))}
    if (parent := identity.parent) is not None:
        values = as_utf8(parent.name), parent.runs.get(uri, parent.uuid)
        tags |= dict(zip(_PARENT_TAGS, values, strict=True))
    return tags


def _is_run_of(run: Run, run_dir: Path, identity: Identity) -> bool:
    """Whether an MLflow run is this folder's, and not that of one which it is a copy of."""
    tags = run.data.tags
    has_same_uuid = tags.get(UUID_TAG) == identity.uuid
    return has_same_uuid and not is_copy_of(tags.get(_FOLDER_TAG, ""), run_dir, identity.uuid)


def _run_if_exists(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # A database that was made anew: the spool can fill that one, too.
        return None


def _find_or_create_experiment(client: MlflowClient, name: str, uri: str) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        database_path = sqlite_file(uri)
        # Beside the database, whatever folder this process happens to run in.
        artifact_folder = (
            database_path.parent / "mlruns" / quote(name, safe="") if database_path else None
        )
        artifact_uri = artifact_folder.as_uri() if artifact_folder else None
        try:
            created_id: str = client.create_experiment(name, artifact_location=artifact_uri)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
        else:
            if artifact_folder:
                _make_shared_folder(artifact_folder)
            return created_id
    assert experiment is not None
    return _active_experiment_id(experiment, uri)


def _make_shared_folder(folder: Path) -> None:
    """Make the folder of artifacts, in which each user who shares the database makes some."""
    with contextlib.suppress(OSError):  # an upload will say what is wrong
        for path in (folder.parent, folder):
            if not path.exists():
                path.mkdir(parents=True)
                share_with_folder_group(path)


def _active_experiment_id(experiment: Experiment, uri: str) -> str:
    experiment_id: str = experiment.experiment_id
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise RefusedByMlflow(
            f"MLflow's experiment {experiment.name} at {uri} is in the bin: MLFLOW_TRACKING_URI="
            f"{shlex.quote(uri)} mlflow experiments restore --experiment-id {experiment_id}"
        )
    return experiment_id


def _run_start_ms(run_dir: Path) -> int:
    """Return when the first record was written: the run began then, not when a server was found."""
    record_times_ms = []
    for path in RunFolder(run_dir).list_spool_files():
        with contextlib.suppress(OSError):
            record_times_ms += [record["t"] for record in read_records(path, 0)[0][:1]]
    return min(filter(is_count, record_times_ms), default=int(time.time() * 1000))
