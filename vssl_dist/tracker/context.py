"""Where a run's numbers come from: commit, user, program and machines."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import vssl_dist
from vssl_dist.environment import slurm_job
from vssl_dist.installed import commit


def run_tags(world_size: int, hosts: Sequence[str]) -> dict[str, str]:
    """Return the tags that MLflow shows beside a run: commit, user, program, machines."""
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
    commit_id = commit()
    return tags | ({"mlflow.source.git.commit": commit_id} if commit_id else {})
