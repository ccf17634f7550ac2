"""The trainer's end of the flusher: start it, and close it within a bound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import TracebackType

import vssl_dist
from vssl_dist.durable import publish
from vssl_dist.environment import outside_jobs
from vssl_dist.tracker.cursor import flushed
from vssl_dist.tracker.spool import run_file, spool_folder

_GENTLE = {
    # mlflow's own defaults block a call to a dead server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
_DRAIN_S = 10.0


class Flusher:
    """A process that replays the run's spool into its MLflow run while the trainer lives.

    At most one of a run's flushers works, the one that holds the lease ``spool/flusher.lock``;
    the others wait and take over when it ends, however it ends.  The caller is never blocked:
    `start` spawns, `close` waits no longer than it is told to.  When the trainer dies the process
    sees its standard input end, drains for a few seconds and leaves.  Whatever could not be sent
    stays in the spool for the next flusher of this run.

    Args:
        run_dir: The run's folder.
        experiment: MLflow's name for the group of runs; created if need be.
        tracking_uri: See `default_tracking_uri`.
        system_every_s: Seconds between samples of processor, memory, disk, network and GPUs of
            this machine, written to the spool as ``system/...``; ``None`` for none.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: str,
        tracking_uri: str,
        *,
        system_every_s: float | None = None,
    ) -> None:
        self.run_dir = run_dir.absolute()
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.system_every_s = system_every_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Spawn the process; returns in milliseconds."""
        spool_folder(self.run_dir).mkdir(parents=True, exist_ok=True)
        self._remember()
        code = str(Path(vssl_dist.__file__).parents[1])
        path = os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")]))
        arguments = [str(self.run_dir)]
        if self.system_every_s is not None:
            arguments += ["--system", str(self.system_every_s)]
        with (spool_folder(self.run_dir) / "flusher.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vssl_dist.tracker", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=_GENTLE | outside_jobs(os.environ) | {"PYTHONPATH": path},
                # Signals meant for the trainer (a preemption, Ctrl-C) are not for this one.
                start_new_session=True,
            )

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what is left and end the process, within ``timeout_s`` seconds.

        Returns:
            Whether everything in the spool has reached MLflow.
        """
        deadline = time.monotonic() + timeout_s
        ended = self._end(deadline)
        if ended is not None and ended < 0 and time.monotonic() < deadline:
            # Somebody killed it (out of memory, say); one more may have better luck.
            self.start()
            ended = self._end(deadline)
        return ended == 0

    def _end(self, deadline: float) -> int | None:
        """The process's exit code, ``None`` if there is none or it did not end in time."""
        process, self._process = self._process, None
        if process is None:
            return None
        seconds = max(0.0, deadline - time.monotonic())
        try:
            process.communicate(f"close {seconds}\n".encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            # Replays are idempotent: it may be stopped anywhere.
            process.kill()
            process.communicate()
            return None
        return process.returncode

    def __enter__(self) -> Flusher:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(_DRAIN_S)

    def _remember(self) -> None:
        """Write down which MLflow run this is before there is one, so that it is made once."""
        path = run_file(self.run_dir)
        facts = json.loads(path.read_text()) if path.exists() else {"uuid": uuid.uuid4().hex}
        wanted = {"experiment": self.experiment, "tracking_uri": self.tracking_uri}
        if facts | wanted == facts:
            return
        # At another address the run is looked for by its uuid, and made if it is not there.
        facts.pop("run_id", None)
        publish(path, json.dumps(facts | wanted).encode())


def flush_once(run_dir: Path, timeout_s: float = 600.0) -> bool:
    """Bring a run's spool to MLflow: what an evaluation that ends after the trainer calls.

    If another flusher holds the lease this waits until that one has sent everything.  A machine
    that is merely busy has all of the time; a server that is away is given up after half a minute.

    Returns:
        Whether nothing is left to send; true also of a run that never had a tracker.
    """
    path = run_file(run_dir)
    if not path.exists() or flushed(run_dir):
        return True
    facts = json.loads(path.read_text())
    flusher = Flusher(run_dir, facts["experiment"], facts["tracking_uri"])
    flusher.start()
    return flusher.close(timeout_s)
