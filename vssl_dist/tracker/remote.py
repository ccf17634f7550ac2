"""The MLflow side: its database, and the one run that belongs to a run folder."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException

from vssl_dist.durable import publish
from vssl_dist.tracker.context import database
from vssl_dist.tracker.spool import read, run_file, spool_folder

_UUID_TAG = "vssl_dist.run"


def connect(uri: str) -> MlflowClient:
    """A client; a database that is not there yet is made, by one process at a time."""
    file = database(uri)
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=300):
            _create_database(file)
    return MlflowClient(tracking_uri=uri)


def _create_database(file: Path) -> None:
    """Make an empty database beside its place, then put it there.

    It takes MLflow seconds and hundreds of statements, and one that was killed half-way it can
    neither finish nor use.
    """
    partial = file.with_name(f"{file.name}.new")
    partial.unlink(missing_ok=True)
    MlflowClient(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
    # `mlflow ui` may have made one meanwhile; it does not know our lock.
    with contextlib.suppress(FileExistsError):
        file.hardlink_to(partial)
    partial.unlink()


def find_or_create(client: MlflowClient, run_dir: Path, facts: dict[str, str]) -> str:
    """The id of the MLflow run of this folder, written down in its ``mlflow_run.json``.

    The run is looked for by its tag before it is made: a kill between making it and writing its
    id down does not make a second one.

    Args:
        client: Connected to ``facts["tracking_uri"]``.
        run_dir: The run's folder.
        facts: What ``mlflow_run.json`` says.
    """
    stored = facts.get("run_id")
    if stored is not None and _exists(client, stored):
        return stored
    experiment = _experiment(client, facts["experiment"], facts["tracking_uri"])
    found = client.search_runs(
        [experiment],
        f"tags.`{_UUID_TAG}` = '{facts['uuid']}'",
        run_view_type=ViewType.ALL,
        max_results=1,
    )
    if found:
        run_id: str = found[0].info.run_id
    else:
        tags = {_UUID_TAG: facts["uuid"], "vssl_dist.run_dir": str(run_dir)}
        run = client.create_run(
            experiment, start_time=_began(run_dir), run_name=run_dir.name, tags=tags
        )
        run_id = run.info.run_id
    publish(run_file(run_dir), json.dumps(facts | {"run_id": run_id}).encode())
    return run_id


def _exists(client: MlflowClient, run_id: str) -> bool:
    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # A database that was made anew: the spool can fill that one, too.
        return False
    return True


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        file = database(uri)
        # Beside the database, whatever folder this process happens to run in.
        place = (file.parent / "mlruns" / quote(name, safe="")).as_uri() if file else None
        try:
            created: str = client.create_experiment(name, artifact_location=place)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
        else:
            return created
    assert found is not None
    experiment_id: str = found.experiment_id
    return experiment_id


def _began(run_dir: Path) -> int:
    """When the first record was written: the run began then, not when a server was found."""
    first = (read(p, 0)[0][:1] for p in spool_folder(run_dir).glob("*.jsonl"))
    return min((r[0]["t"] for r in first if r), default=int(time.time() * 1000))
