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
    evaluate_one,
    flush_to_mlflow,
    pending_evaluations,
)
from vssl_dist.jobs.resources import Launch, load_launch
from vssl_dist.jobs.stop import REFUSED
from vssl_dist.locks import held_by_stranger, holder, private_lock
from vssl_dist.run_folder import RunFolder

_log = logging.getLogger("vssl_dist.jobs.evaluation_queue")  # as a process it is __main__
_TRIES = 2
_SUBMIT_WITHIN_S = 120
_IN_A_JOB = "--in-a-job"


class EvaluationSpawner:
    """The trainer's end: starts processes, and on SLURM gives the last ones time to submit."""

    def __init__(self, run_dir: Path, kind: Literal["slurm", "local"]) -> None:
        self.run_dir, self.kind = run_dir, kind
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Have everything that is due evaluated; returns at once and never raises."""
        self.started = [process for process in self.started if process.poll() is None]
        module = [sys.executable, "-P", "-m", "vssl_dist.jobs.evaluation_queue"]
        options = [_IN_A_JOB] if slurm_job() else []
        try:
            with self._log() as log:
                process = subprocess.Popen(
                    [*module, str(self.run_dir), *options],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=outside_jobs(os.environ) | own_code_only(os.environ),
                    start_new_session=True,  # it outlives the trainer, and its Ctrl-C
                )
        except OSError as error:
            _log.warning("no evaluation was started: %s", error)
            return
        self.started.append(process)

    def close(self, timeout_s: float) -> None:
        """On SLURM wait for submissions, which end with this job; elsewhere nothing."""
        if self.kind != "slurm":
            return
        for process in self.started:
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                _log.warning("an evaluation could not be submitted in time")

    def _log(self) -> BinaryIO:
        return open_append(RunFolder(self.run_dir).evaluations_log)


class InProcessRunner:
    """Evaluates in this process, one after the other."""

    def __init__(self, run_dir: Path, launch: Launch) -> None:
        self.run_dir, self.launch = run_dir, launch
        os.nice(10)  # training comes first

    def can_try(self, one: PendingEvaluation) -> bool:
        """Whether it may be tried now."""
        return one.attempts().count < _TRIES

    def process(self, one: PendingEvaluation) -> None:
        """Do it."""
        one.record_attempt(Attempts(one.attempts().count + 1))
        small, threads = self.launch.resources.evaluation, self.launch.cpus_per_rank
        evaluate_one(self.run_dir, one, small.device or self.launch.device, threads, small.ranks)
        flush_to_mlflow(self.run_dir, self.launch.tracking_uri)


class SlurmSubmitter:
    """Submits a job for each evaluation."""

    def __init__(self, run_dir: Path, launch: Launch) -> None:
        self.run_dir, self.launch = run_dir, launch

    def can_try(self, one: PendingEvaluation) -> bool:
        """Whether it may be tried now: no job of an earlier attempt is waiting or at it."""
        from vssl_dist.jobs import slurm

        tried = one.attempts()
        return tried.count < _TRIES and not (tried.job and slurm.is_live(tried.job))

    def process(self, one: PendingEvaluation) -> None:
        """Submit it."""
        from vssl_dist.jobs import slurm

        name = f"{self.run_dir.name}-{one.task.task}-{one.step:08d}"
        small = self.launch.resources.evaluation
        task, device = one.task.model_dump_json(), small.device or self.launch.device
        job = EvalJob(self.run_dir, one.export, one.step, task, device, small.cpus, small.ranks)
        parameters = slurm.evaluation_parameters(name, self.launch)
        # A controller that hangs must not keep later evaluations from being submitted.
        signal.alarm(_SUBMIT_WITHIN_S)
        try:
            job_id = slurm.submit(RunFolder(self.run_dir).evaluation_jobs, parameters, job)
        finally:
            signal.alarm(0)
        one.record_attempt(Attempts(one.attempts().count + 1, job_id))
        _log.info("submitted %s: job %s", name, job_id)


class EvaluationQueue:
    """What is still to do in a run, and doing it."""

    def __init__(
        self, cfg: RunConfig, samples: int, runner: InProcessRunner | SlurmSubmitter
    ) -> None:
        self.cfg, self.samples, self.runner = cfg, samples, runner
        self.failed: set[Path] = set()

    def next(self) -> PendingEvaluation | None:
        """The newest evaluation that may be tried now."""
        fresh = (
            one
            for one in pending_evaluations(self.cfg, self.samples)
            if one.record not in self.failed
        )
        return next((one for one in fresh if self.runner.can_try(one)), None)

    def attempt(self, one: PendingEvaluation) -> None:
        """Take care of one; a failure is reported, and left to a later process."""
        try:
            self.runner.process(one)
        except ConfigError as error:
            self.failed.add(one.record)
            _log.error("evaluation of %s (%s) refused: %s", one.export.name, one.task.task, error)
        except Exception:
            self.failed.add(one.record)
            _log.exception("evaluation of %s (%s) failed:", one.export.name, one.task.task)


def open_queue(run_dir: Path) -> EvaluationQueue:
    """The desk of the run in ``run_dir``."""
    # torch takes seconds: not for a process that finds another one at work.
    from vssl_dist import config
    from vssl_dist.data.store.opening import open_watched
    from vssl_dist.methods import CONFIGS

    cfg = config.load_run(run_dir, methods=CONFIGS)
    launch = load_launch(run_dir)
    runner = InProcessRunner if launch.cluster == "local" else SlurmSubmitter
    train = open_watched(cfg.data.train, timeout_s=cfg.data.timeout_s, who="evaluation")
    return EvaluationQueue(cfg, train.samples, runner(run_dir, launch))


def lock_of(run_dir: Path) -> FileLock:
    """Held by the one process that evaluates, or submits the evaluations of, a run."""
    return private_lock(lock_path(run_dir))


def lock_path(run_dir: Path) -> Path:
    """The file of `lock_of`."""
    return RunFolder(run_dir).exports.evaluating_lock


def drain(run_dir: Path) -> None:
    """Take care of everything that is due in a run, unless another process is at it."""
    lock = lock_of(run_dir)
    desk: EvaluationQueue | None = None
    orders = b""
    while True:
        try:
            with lock.acquire(timeout=0):
                if desk is None or orders != _orders(run_dir):
                    orders = _orders(run_dir)
                    desk = open_queue(run_dir)
                while (one := desk.next()) is not None:
                    desk.attempt(one)
        except Timeout:
            path = lock_path(run_dir)
            if held_by_stranger(path):
                _log.warning(
                    "no evaluations: %s is held by %s: have it stopped", path, holder(path)
                )
            return  # else its holder looks again after it has let go
        if desk.next() is None and orders == _orders(run_dir):
            return


def _orders(run_dir: Path) -> bytes:
    """What a run asks for now: somebody who found this process at work may have added to it."""
    files = (RunFolder(run_dir).config, RunFolder(run_dir).launch)
    return b"".join(file.read_bytes() for file in files if file.is_file())


def main() -> int:
    """``python -m vssl_dist.jobs.evaluation_queue RUN``; 2 after one line that refuses."""
    parser = argparse.ArgumentParser(prog="python -m vssl_dist.jobs.evaluation_queue")
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(_IN_A_JOB, action="store_true", help="started by a rank on SLURM")
    args = parser.parse_args()
    if args.in_a_job:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            # The training job's signals reach every process of its nodes.
            signal.signal(number, signal.SIG_IGN)
    print_any_path()
    logs.configure_log("evaluations")
    try:
        private.secure(args.run_dir)
        drain(args.run_dir.absolute())
    except ConfigError as error:
        _log.error("%s", error)
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
