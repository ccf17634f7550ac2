"""A real SLURM cluster of virtual nodes, and a tracking server that they can reach."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEVCLUSTER = ROOT / "slurm" / "devcluster"
ADDRESS = "10.77.0.254"
NODES, GPUS = 8, 8


@dataclass(frozen=True)
class Cluster:
    """The cluster that is up: how to talk to it."""

    environment: dict[str, str]
    folder: Path

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command as on the login node."""
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """``python launch/submit.py ARGUMENTS``."""
        return self.run(sys.executable, str(ROOT / "launch" / "submit.py"), *arguments)

    def state(self, job: str) -> str:
        """What accounting says of a job: PENDING, RUNNING, COMPLETED, ..."""
        answer = self.run("sacct", "-n", "-X", "-P", "-o", "State", "-j", job)
        return answer.stdout.strip().partition(" ")[0]

    def restarts(self, job: str) -> int:
        """How often a job was put back into the queue."""
        answer = self.run("scontrol", "-o", "show", "job", job).stdout
        return int(dict(word.partition("=")[::2] for word in answer.split()).get("Restarts", 0))


def wait_until(true: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.3)


def _why_not() -> str | None:
    if os.getuid() != 0:
        return "the virtual SLURM cluster needs root"
    missing = [tool for tool in ("sbatch", "slurmctld", "slurmd") if shutil.which(tool) is None]
    return f"SLURM is not installed ({', '.join(missing)})" if missing else None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Eight nodes with eight fake GPUs each."""
    if reason := _why_not():
        if os.environ.get("VSSL_REQUIRE_SLURM") == "1":
            pytest.fail(f"{reason}, and VSSL_REQUIRE_SLURM=1")
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    # munge wants folders that everybody may enter, which pytest's are not.
    state = Path(tempfile.mkdtemp(prefix="vssl-devcluster-", dir="/tmp"))
    up = [str(DEVCLUSTER / "up.sh"), "-n", str(NODES), "-g", str(GPUS), "-d", str(state)]
    made = subprocess.run(up, capture_output=True, text=True, timeout=300, check=False)
    try:
        assert made.returncode == 0, made.stdout + made.stderr
        environment = {**os.environ, "SLURM_CONF": str(state / "slurm.conf")}
        yield Cluster(environment, folder)
    finally:
        subprocess.run([str(DEVCLUSTER / "down.sh"), "-d", str(state)], timeout=120, check=False)


@pytest.fixture(scope="session")
def tracked(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with a tracking server on the address that its nodes see."""
    uri = f"http://{ADDRESS}:15000"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", ADDRESS, "--port", "15000"),
        *("--workers", "1", "--allowed-hosts", f"{ADDRESS}:15000"),
        *("--backend-store-uri", f"sqlite:///{cluster.folder}/mlflow.db"),
        *("--artifacts-destination", str(cluster.folder / "artifacts")),
    ]
    with (cluster.folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=cluster.folder,
            # Else ten more processes wait for work that nobody gives them.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_until(lambda: _healthy(uri), 120, "the tracking server")
        yield Cluster({**cluster.environment, "MLFLOW_TRACKING_URI": uri}, cluster.folder)
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it has workers
        server.wait()


def _healthy(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
