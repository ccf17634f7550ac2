"""Evaluations beside a training that never waits for them.

At each export rank 0 starts a process of this module and forgets it.  One at a time works on a
run: it looks for exports that lack a result, newest first, and evaluates them itself (on this
machine) or submits a small job for each (on SLURM).  Results lie beside the exports, so nothing
is lost when one of these processes is: the next one finds what is still to do.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO, Literal

from filelock import FileLock, Timeout

from vssl_dist import logs
from vssl_dist.config import RunConfig
from vssl_dist.durable import open_append
from vssl_dist.environment import outside_jobs, slurm_job
from vssl_dist.errors import ConfigError
from vssl_dist.installed import own_code_only, print_any_path
from vssl_dist.jobs import private
from vssl_dist.jobs.evaluation_job import (
    Attempts,
    EvalJob,
    PendingEvaluation,
    evaluate_export,
    flush_to_mlflow,
    pending_evaluations,
)
from vssl_dist.jobs.resources import Launch, load_launch
from vssl_dist.jobs.stop import REFUSED_EXIT_CODE
from vssl_dist.locks import describe_lock_holder, is_held_by_other_user, make_private_lock
from vssl_dist.run_folder import RunFolder

_log = logging.getLogger("vssl_dist.jobs.evaluation_queue")  # as a process it is __main__
_MAX_EVALUATION_TRIES = 2
_SBATCH_TIMEOUT_S = 120
_IN_A_JOB_FLAG = "--in-a-job"


class EvaluationSpawner:
    """Starts evaluation processes for a trainer; on SLURM the last ones get time to submit."""

    def __init__(self, run_dir: Path, cluster: Literal["slurm", "local"]) -> None:
        self.run_dir = run_dir
        self.cluster = cluster
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start a process for all pending evaluations; returns at once and never raises."""
        self.processes = [process for process in self.processes if process.poll() is None]
        module_command = [sys.executable, "-P", "-m", "vssl_dist.jobs.evaluation_queue"]
        options = [_IN_A_JOB_FLAG] if slurm_job() else []
        try:
            with self._log() as log:
                process = subprocess.Popen(
                    [*module_command, str(self.run_dir), *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=outside_jobs(os.environ) | own_code_only(os.environ),
                    start_new_session=True,  # it outlives the trainer, and its Ctrl-C
                )
        except OSError as error:
            _log.warning("no evaluation was started: %s", error)
            return
        self.processes.append(process)

    def close(self, timeout_s: float) -> None:
        """Wait on SLURM for submissions, which would end with this job; elsewhere do nothing."""
        if self.cluster != "slurm":
            return
        for process in self.processes:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                _log.warning("an evaluation could not be submitted in time")

    def _log(self) -> BinaryIO:
        return open_append(RunFolder(self.run_dir).evaluations_log_path)


class InProcessRunner:
    """Runs evaluations in this process, one after the other."""

    def __init__(self, run_dir: Path, launch: Launch) -> None:
        self.run_dir = run_dir
        self.launch = launch
        os.nice(10)  # training comes first

    def can_try(self, pending: PendingEvaluation) -> bool:
        """Whether an attempt at this evaluation is left."""
        return pending.read_attempts().count < _MAX_EVALUATION_TRIES

    def process(self, pending: PendingEvaluation) -> None:
        """Evaluate the export and send its metrics."""
        pending.record_attempt(Attempts(pending.read_attempts().count + 1))
        resources = self.launch.resources.evaluation
        evaluate_export(
            self.run_dir,
            pending,
            resources.device or self.launch.device,
            threads=self.launch.cpus_per_rank,
            ranks=resources.ranks,
        )
        flush_to_mlflow(self.run_dir, self.launch.tracking_uri)


class SlurmSubmitter:
    """Submits a job for each evaluation."""

    def __init__(self, run_dir: Path, launch: Launch) -> None:
        self.run_dir = run_dir
        self.launch = launch

    def can_try(self, pending: PendingEvaluation) -> bool:
        """Whether an attempt is left and no job of an earlier one is waiting or running."""
        from vssl_dist.jobs import slurm

        attempts = pending.read_attempts()
        return attempts.count < _MAX_EVALUATION_TRIES and not (
            attempts.job and slurm.is_job_live(attempts.job)
        )

    def process(self, pending: PendingEvaluation) -> None:
        """Submit a job for the evaluation."""
        from vssl_dist.jobs import slurm

        name = f"{self.run_dir.name}-{pending.task.task}-{pending.step:08d}"
        resources = self.launch.resources.evaluation
        job = EvalJob(
            self.run_dir,
            pending.export,
            pending.step,
            task_json=pending.task.model_dump_json(),
            device=resources.device or self.launch.device,
            threads=resources.cpus,
            ranks=resources.ranks,
        )
        parameters = slurm.evaluation_parameters(name, self.launch)
        # A controller that hangs must not keep later evaluations from being submitted.  No handler
        # is set: the alarm ends this process, and with it the lock.
        signal.alarm(_SBATCH_TIMEOUT_S)
        try:
            job_id = slurm.submit(RunFolder(self.run_dir).evaluation_jobs_folder, parameters, job)
        finally:
            signal.alarm(0)
        pending.record_attempt(Attempts(pending.read_attempts().count + 1, job_id))
        _log.info("submitted %s: job %s", name, job_id)


class EvaluationQueue:
    """The pending evaluations of a run, tried one by one by a runner."""

    def __init__(
        self, cfg: RunConfig, samples: int, runner: InProcessRunner | SlurmSubmitter
    ) -> None:
        self.cfg = cfg
        self.samples = samples
        self.runner = runner
        self.failed_attempts_paths: set[Path] = set()
        """Attempt files of evaluations that failed in this process."""

    def next_pending(self) -> PendingEvaluation | None:
        """Find the newest evaluation that may be tried now."""
        for pending in pending_evaluations(self.cfg, self.samples):
            # What failed in this process is left to a later one.
            if pending.attempts_path not in self.failed_attempts_paths and self.runner.can_try(
                pending
            ):
                return pending
        return None

    def try_evaluation(self, pending: PendingEvaluation) -> None:
        """Try one evaluation; a failure is logged and left to a later process."""
        name, task = pending.export.name, pending.task.task
        try:
            self.runner.process(pending)
        except ConfigError as error:
            self.failed_attempts_paths.add(pending.attempts_path)
            _log.error("evaluation of %s (%s) refused: %s", name, task, error)
        except Exception:
            self.failed_attempts_paths.add(pending.attempts_path)
            _log.exception("evaluation of %s (%s) failed:", name, task)


def open_queue(run_dir: Path) -> EvaluationQueue:
    """Open the queue of the run in ``run_dir``, as its present configuration and launch say."""
    # torch takes seconds: not for a process that finds another one at work.
    from vssl_dist import config
    from vssl_dist.data.store.opening import read_manifest_watched
    from vssl_dist.methods import CONFIGS

    cfg = config.load_run(run_dir, methods=CONFIGS)
    launch = load_launch(run_dir)
    runner = InProcessRunner if launch.cluster == "local" else SlurmSubmitter
    train = read_manifest_watched(cfg.data.train, timeout_s=cfg.data.timeout_s, who="evaluation")
    return EvaluationQueue(cfg, train.samples, runner(run_dir, launch))


def evaluation_lock(run_dir: Path) -> FileLock:
    """Return the lock of the one process that evaluates a run, or submits its evaluations."""
    return make_private_lock(RunFolder(run_dir).export_folder.evaluating_lock_path)


def try_all_pending(run_dir: Path) -> None:
    """Try every pending evaluation of a run, unless another process is doing that."""
    lock = evaluation_lock(run_dir)
    queue: EvaluationQueue | None = None
    config_and_launch = b""
    while True:
        try:
            with lock.acquire(timeout=0):
                if queue is None or config_and_launch != _config_and_launch_bytes(run_dir):
                    config_and_launch = _config_and_launch_bytes(run_dir)
                    queue = open_queue(run_dir)
                while (pending := queue.next_pending()) is not None:
                    queue.try_evaluation(pending)
        except Timeout:
            path = RunFolder(run_dir).export_folder.evaluating_lock_path
            if is_held_by_other_user(path):
                _log.warning(
                    "no evaluations: %s is held by %s: have it stopped",
                    path,
                    describe_lock_holder(path),
                )
            return  # else its holder looks again after it has let go
        # A process that came while this one had the lock has left: its evaluations are tried here.
        if queue.next_pending() is None and config_and_launch == _config_and_launch_bytes(run_dir):
            return


def _config_and_launch_bytes(run_dir: Path) -> bytes:
    """Read the run's config and launch as text: a submission may change them meanwhile."""
    files = (RunFolder(run_dir).config_path, RunFolder(run_dir).launch_path)
    return b"".join(file.read_bytes() for file in files if file.is_file())


def main() -> int:
    """Run ``python -m vssl_dist.jobs.evaluation_queue RUN``; returns 2 after a refusal."""
    parser = argparse.ArgumentParser(prog="python -m vssl_dist.jobs.evaluation_queue")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(_IN_A_JOB_FLAG, action="store_true", help="started by a rank on SLURM")
    args = parser.parse_args()
    if args.in_a_job:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            # The training job's signals reach every process of its nodes.
            signal.signal(number, signal.SIG_IGN)
    print_any_path()
    logs.configure_log_output("evaluations")
    try:
        private.secure_run_folder(args.run_dir)
        try_all_pending(args.run_dir.absolute())
    except ConfigError as error:
        _log.error("%s", error)
        return REFUSED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
