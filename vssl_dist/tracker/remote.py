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

from vssl_dist.durable import share_with_group_of_folder, user_name
from vssl_dist.locks import describe_lock_holder, make_private_lock
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker.address import sqlite_file, sqlite_uri
from vssl_dist.tracker.identity import Identity, as_utf8, is_copy_of
from vssl_dist.tracker.intake import is_count
from vssl_dist.tracker.record import Record
from vssl_dist.tracker.refusals import Refused
from vssl_dist.tracker.spool import read_records

UUID_TAG = "vssl_dist.run"
_FOLDER_TAG = "vssl_dist.run_dir"
_PARENT_TAGS = ("vssl_dist.parent", "vssl_dist.parent_run")
OWN_TAGS = {UUID_TAG, _FOLDER_TAG, *_PARENT_TAGS}
"""Which run it is: the spool, which may be anybody's, has no say in that."""
_MAKING_S = 60.0
_NEW = re.compile(r"\.[0-9a-f]{12}\.new")
"""How the name of a database in the making ends."""
_CANDIDATES = 100
_log = logging.getLogger(__name__)


def connect(uri: str) -> MlflowClient:
    """Connect a client; one process at a time makes a database that is not there or empty."""
    file = sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    if _size(file) == 0:
        with _alone(Path(f"{file}.lock")):
            _create_database(file)
    return MlflowClient(tracking_uri=_without_escapes(uri, file))


def _alone(lock: Path) -> AcquireReturnProxy[FileLock]:
    """Hold the lock under which a database is made.

    Raises:
        TimeoutError: Somebody else holds it for a minute.
        Refused: It is another user's.
    """
    try:
        return make_private_lock(lock).acquire(timeout=_MAKING_S)
    except Timeout:
        raise TimeoutError(f"{lock} is held by {describe_lock_holder(lock)}") from None
    except PermissionError as error:
        if not lock.exists():
            raise
        owner = user_name(lock.lstat().st_uid)
        raise Refused(
            f"{lock} belongs to {owner}, who was to make that database: have it removed, or set "
            "MLFLOW_TRACKING_URI to another address"
        ) from error


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _without_escapes(uri: str, file: Path) -> str:
    """Return an address without ``%XX``, which MLflow does not read when it makes folders.

    The folder stays open as long as the process lives: MLflow keeps its connections for as long.
    """
    if "%" not in uri.partition("?")[0]:
        return uri
    number = _opened(file.parent)
    uri_query = uri.partition("?")[2]
    return sqlite_uri(Path(f"/proc/self/fd/{number}", file.name), uri_query)


@functools.cache
def _opened(folder: Path) -> int:
    """Open a folder, once: MLflow keeps a store for each address that it has seen."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


def _create_database(file: Path) -> None:
    """Make an empty database beside its place, then put it there.

    It takes MLflow seconds and hundreds of statements, and one that was killed half-way it can
    neither finish nor use.
    """
    for leftover in file.parent.glob(f"{glob.escape(file.name)}.*.new"):
        if _NEW.fullmatch(leftover.name.removeprefix(file.name)):
            leftover.unlink()
    # Another name each time: of one that MLflow has seen in this process it makes no tables again.
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.new")
    uri = _without_escapes(sqlite_uri(partial), partial)
    MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
    share_with_group_of_folder(partial)
    if file.exists() and _size(file) == 0:
        # Removed while this process had it: sqlite makes an empty one.
        partial.replace(file)
        return
    try:
        # `mlflow ui` may have made one meanwhile; it does not know our lock.
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(partial)
    except OSError:  # a file system without hard links
        if not file.exists():
            partial.rename(file)
    partial.unlink(missing_ok=True)


def find_or_create(client: MlflowClient, run_dir: Path, identity: Identity, record: Record) -> str:
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
        named = _existing(client, record.run_id)
        if named is not None and _is_of(named, run_dir, identity):
            return record.run_id
        if named is not None:
            _log.warning("MLflow run %s is another run's: this one gets its own", record.run_id)
    experiment = _experiment(client, record.experiment, record.tracking_uri)
    candidates = client.search_runs(
        [experiment],
        f"tags.`{UUID_TAG}` = '{identity.uuid}'",
        run_view_type=ViewType.ALL,
        max_results=_CANDIDATES,
    )
    own_run = next(
        (candidate for candidate in candidates if _is_of(candidate, run_dir, identity)), None
    )
    if own_run is not None:
        run_id: str = own_run.info.run_id
    else:
        run = client.create_run(
            experiment,
            start_time=_began(run_dir),
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


def _is_of(run: Run, run_dir: Path, identity: Identity) -> bool:
    """Whether an MLflow run is this folder's, and not that of one which it is a copy of."""
    tags = run.data.tags
    is_same = tags.get(UUID_TAG) == identity.uuid
    return is_same and not is_copy_of(tags.get(_FOLDER_TAG, ""), run_dir, identity.uuid)


def _existing(client: MlflowClient, run_id: str) -> Run | None:
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # A database that was made anew: the spool can fill that one, too.
        return None


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    existing = client.get_experiment_by_name(name)
    if existing is None:
        file = sqlite_file(uri)
        # Beside the database, whatever folder this process happens to run in.
        folder = file.parent / "mlruns" / quote(name, safe="") if file else None
        location = folder.as_uri() if folder else None
        try:
            created: str = client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            existing = client.get_experiment_by_name(name)
        else:
            if folder:
                _make_for_all(folder)
            return created
    assert existing is not None
    return _active(existing, uri)


def _make_for_all(folder: Path) -> None:
    """Make the folder of artifacts, in which each user who shares the database makes some."""
    with contextlib.suppress(OSError):  # an upload will say what is wrong
        for path in (folder.parent, folder):
            if not path.exists():
                path.mkdir(parents=True)
                share_with_group_of_folder(path)


def _active(experiment: Experiment, uri: str) -> str:
    experiment_id: str = experiment.experiment_id
    if experiment.lifecycle_stage != LifecycleStage.ACTIVE:
        raise Refused(
            f"MLflow's experiment {experiment.name} at {uri} is in the bin: MLFLOW_TRACKING_URI="
            f"{shlex.quote(uri)} mlflow experiments restore --experiment-id {experiment_id}"
        )
    return experiment_id


def _began(run_dir: Path) -> int:
    """Return when the first record was written: the run began then, not when a server was found."""
    times = []
    for path in RunFolder(run_dir).list_spool_files():
        with contextlib.suppress(OSError):
            times += [record["t"] for record in read_records(path, 0)[0][:1]]
    return min(filter(is_count, times), default=int(time.time() * 1000))
