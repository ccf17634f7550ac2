"""Where the numbers go, and from where they come."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vssl_dist
from vssl_dist.environment import slurm_job
from vssl_dist.installed import commit

_SQLITE = "sqlite:///"


def default_tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or a database in the current folder, where ``mlflow ui`` looks.

    The path of a database is made absolute, so that a job that starts in another folder writes
    to the same one.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}mlflow.db"
    path = database(uri)
    return uri if path is None else f"{_SQLITE}{path}"


def database(uri: str) -> Path | None:
    """The absolute path of the sqlite file behind ``uri``, ``None`` for anything else.

    >>> database("http://127.0.0.1:5000") is None
    True
    >>> str(database("sqlite:////data/mlflow.db"))
    '/data/mlflow.db'
    """
    return Path(uri.removeprefix(_SQLITE)).absolute() if uri.startswith(_SQLITE) else None


def check_tracking(uri: str, hosts: int) -> str | None:
    """One line that says why ``uri`` cannot serve jobs on ``hosts`` machines, or ``None``.

    >>> check_tracking("sqlite:////home/me/mlflow.db", hosts=1) is None
    True
    >>> check_tracking("http://login1:5000", hosts=8) is None
    True
    """
    if uri.startswith(_SQLITE):
        if hosts <= 1:
            return None
        return (
            f"tracking to {uri} with jobs on {hosts} hosts: sqlite takes writers of one machine "
            "only; start `mlflow server` and set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    if "://" not in uri or uri.startswith("file:"):
        return (
            f"MLFLOW_TRACKING_URI={uri}: MLflow no longer writes to plain folders; "
            "use http://HOST:PORT or sqlite:////absolute/path/mlflow.db"
        )
    return None


def run_tags(world_size: int, hosts: Sequence[str]) -> dict[str, str]:
    """What MLflow shows beside a run: commit, user, program, machines."""
    tags = {
        "mlflow.source.name": Path(sys.argv[0]).name or "python",
        "mlflow.source.type": "LOCAL",
        "vssl_dist.version": vssl_dist.__version__,
        "vssl_dist.world_size": str(world_size),
        "vssl_dist.hosts": ",".join(hosts),
    }
    if job := slurm_job():
        tags["vssl_dist.slurm_job"] = job
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):
        # A container may run as a user id without a name.
        tags["mlflow.user"] = str(os.getuid())
    code = commit()
    return tags | ({"mlflow.source.git.commit": code} if code else {})
