"""A training job: what each rank does from its first signal handler to its exit code."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import submitit

from vssl_dist import logs
from vssl_dist.config import RunConfig
from vssl_dist.durable import open_append
from vssl_dist.environment import in_our_job
from vssl_dist.errors import ConfigError
from vssl_dist.installed import print_any_path
from vssl_dist.jobs import private
from vssl_dist.jobs.resources import Launch
from vssl_dist.jobs.stop import (
    REFUSAL_PREFIX,
    REFUSED_EXIT_CODE,
    STOPPED_EXIT_CODE,
    StopFlag,
    exit_now,
)
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

if TYPE_CHECKING:
    from vssl_dist.jobs.run_reporter import NullReporter, RunReporter

_log = logging.getLogger(__name__)
_REQUEUE_WAIT_S = 300


@dataclass(frozen=True)
class TrainJob:
    """A training as a job: its resolved configuration as text, from which a node rebuilds the rest.

    Queued jobs are pickles: these fields keep their names.
    """

    config_yaml: str
    launch: Launch

    def __call__(self) -> None:
        """Train as one task of a SLURM job."""
        stop_flag = StopFlag()  # before the slow imports: a signal may come at any time
        print_any_path()
        rendezvous = submitit.helpers.TorchDistributedEnvironment()
        for name in os.environ.keys() - in_our_job(os.environ).keys():
            del os.environ[name]
        os.environ |= job_variables(os.environ)
        rendezvous.export(set_cuda_visible_devices=False, overwrite=True)
        logs.configure_log_output(rank_log_name())
        if self.launch.nodes == 1:
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # which no other machine reaches
        exit_code = run_rank(self, stop_flag)
        if exit_code == STOPPED_EXIT_CODE:
            _leave_slurm(stop_flag)
        if exit_code:
            exit_now(exit_code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Requeue this job as it is: what it has done is in the run's checkpoints."""
        return submitit.helpers.DelayedSubmission(self)


def run_rank(job: TrainJob, stop_flag: StopFlag) -> int:
    """Train as one rank, with ``RANK``, ``WORLD_SIZE`` ... in the environment.

    Returns:
        0 when the run is finished, `STOPPED_EXIT_CODE` when it was told to stop and has saved,
        `REFUSED_EXIT_CODE` when machine, data, configuration or checkpoints are not what they must
        be.
    """
    device = job.launch.device
    os.environ["DS_ACCELERATOR"] = device
    # DeepSpeed calls what torch has renamed; no user of ours can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Not above: signals must find their handlers before torch takes its seconds.
    import torch

    from vssl_dist import config
    from vssl_dist.jobs import machine
    from vssl_dist.methods import CONFIGS

    cfg = config.loads(job.config_yaml, methods=CONFIGS)
    torch.set_num_threads(job.launch.cpus_per_rank)
    try:
        private.secure_run_folder(cfg.dir)
    except ConfigError as error:  # nothing is written into a folder of others
        _log.error("%s", _refusal_text(error))
        return REFUSED_EXIT_CODE
    try:
        _log.info("%s: %s", _rank_and_host(), machine.prepare_device(device, os.environ))
    except ConfigError as error:
        return _report_refusal(cfg.dir, error)
    return _train(cfg, job.launch, stop_flag)


def _train(cfg: RunConfig, launch: Launch, stop_flag: StopFlag) -> int:
    """Join the process group, train, and turn what ends it into an exit code; see `run_rank`."""
    import torch

    from vssl_dist import dist
    from vssl_dist.errors import CheckpointError, DataError
    from vssl_dist.jobs.run_reporter import NullReporter, open_reporter
    from vssl_dist.train import Preempted, train

    device = launch.device
    reporter: RunReporter | NullReporter = NullReporter()
    try:
        dist.init(device)
        reporter = open_reporter(cfg, launch)
        train(
            cfg,
            device=device,
            should_stop=stop_flag,
            on_export=reporter.on_export,
            log=reporter.log,
        )
    except Preempted:
        # Before the group is gone: every rank has to leave the way that rank 0 does.
        stop_flag.is_final = dist.broadcast(stop_flag.only_sigterm)
        torch.distributed.destroy_process_group()
        reporter.close("KILLED", timeout_s=last_curves_wait_s(launch))
        return STOPPED_EXIT_CODE
    except (ConfigError, DataError, CheckpointError) as error:
        exit_code = _report_refusal(cfg.dir, error)
        reporter.close("FAILED", timeout_s=5)
        return exit_code
    except Exception:
        note_failure(cfg.dir, f"{_rank_and_host()} failed first:\n{traceback.format_exc()}")
        _log.error("training failed; what was raised follows")  # when: a traceback has no time
        reporter.close("FAILED", timeout_s=5)
        raise
    torch.distributed.destroy_process_group()
    reporter.close("FINISHED", timeout_s=60)
    return 0


def _report_refusal(run_dir: Path, error: Exception) -> int:
    """Log in one line what the user has to mend, and leave it in the failure file."""
    refusal_text = _refusal_text(error)
    note_failure(run_dir, f"{REFUSAL_PREFIX}{refusal_text}")
    _log.error("%s", refusal_text)
    return REFUSED_EXIT_CODE


def _refusal_text(error: Exception) -> str:
    return f"{printable(str(error))} ({_rank_and_host()})"


def job_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Name job, attempt and leading log in this program's own variables, for a rank on SLURM.

    Args:
        environ: Of a task of a job that submitit has started.

    >>> task = {"SUBMITIT_FOLDER": "/run/slurm", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    >>> job_variables(task)["VSSL_ATTEMPT"]
    '7.2'
    """
    job = environ["SLURM_JOB_ID"]
    run_dir = Path(environ["SUBMITIT_FOLDER"]).parent
    return {
        "VSSL_SLURM_JOB": job,
        "VSSL_ATTEMPT": f"{job}.{environ.get('SLURM_RESTART_COUNT', '0')}",
        "VSSL_LEAD_LOG": str(RunFolder(run_dir).slurm_log_path(job)),
    }


def last_curves_wait_s(launch: Launch) -> float:
    """Return how many seconds the last curves of a stopped run are waited for.

    On SLURM the scheduler is waiting, elsewhere a user, who can end it by another Ctrl-C.
    """
    return 3 if launch.cluster == "slurm" else 30


def attempt_name() -> str:
    """Return the name of this start of the job: a requeued job begins a new attempt."""
    return os.environ.get("VSSL_ATTEMPT") or str(os.getpid())


def note_failure(run_dir: Path, text: str) -> None:
    """Write down why a rank failed, unless another rank was first: later ones only lost a peer.

    Never raises: the failure itself is what has to be heard of.

    Args:
        run_dir: The run's folder.
        text: A refusal's line, or a traceback.
    """
    path = RunFolder(run_dir).failure_path(attempt_name())
    with suppress(OSError, ValueError):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except FileExistsError:
        return  # another rank was first
    except (OSError, ValueError) as error:  # the disk may be the reason for the failure
        _log.warning("%s could not be written: %s", path, error)
    log = os.environ.get("VSSL_LEAD_LOG")
    if log and os.environ.get("RANK", "0") != "0":
        # Rank 0's log is the one that people follow.
        line = logs.format_log_entry(
            rank_log_name(), "ERROR", text.removeprefix(REFUSAL_PREFIX).rstrip()
        )
        with suppress(OSError, ValueError), open_append(Path(log)) as file:
            file.write(f"{line}\n".encode(errors="backslashreplace"))


def rank_log_name() -> str:
    """Return the name of this rank in the lines of its log."""
    return f"rank {os.environ.get('RANK', '0')}"


def _rank_and_host() -> str:
    return f"{rank_log_name()} on {socket.gethostname()}"


def _leave_slurm(stop_flag: StopFlag) -> NoReturn:
    """End this task of a stopped job; rank 0 puts the job back into the queue."""
    if stop_flag.is_final:
        sys.exit(0)
    if os.environ["RANK"] == "0":
        stop_flag.requeue()
        sys.exit(0)
    # A rank that ended before could be taken for the end of the job.  The requeue ends it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_REQUEUE_WAIT_S)
    sys.exit(1)
