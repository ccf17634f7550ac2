"""A training job: what each rank does from its first signal handler to its exit code."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import submitit

from vssl_dist.jobs.resources import Launch
from vssl_dist.jobs.stop import REFUSAL, REFUSED, STOPPED, StopFlag

if TYPE_CHECKING:
    from vssl_dist.jobs.observer import Observer, Silent

_UNTIL_REQUEUED_S = 300


@dataclass(frozen=True)
class TrainJob:
    """Picklable: holds the resolved configuration as text, rebuilds everything on the worker."""

    config_yaml: str
    launch: Launch

    def __call__(self) -> None:
        """Run as one task of a SLURM job."""
        stop = StopFlag()  # before the slow imports: a signal may come at any time
        submitit.helpers.TorchDistributedEnvironment().export(
            set_cuda_visible_devices=False, overwrite=True
        )
        code = run_rank(self, stop)
        if code == STOPPED:
            _leave_slurm(stop)
        if code:
            sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The job after a requeue: the same; what it has done is in the run's checkpoints."""
        return submitit.helpers.DelayedSubmission(self)


def take_own_gpu(environ: MutableMapping[str, str]) -> None:
    """Leave this process one GPU, its own among those that the job has on this node.

    It is device 0 then, and DeepSpeed, which takes the GPU of that number, is told so.

    >>> environ = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}
    >>> take_own_gpu(environ)
    >>> environ
    {'LOCAL_RANK': '0', 'CUDA_VISIBLE_DEVICES': '6'}
    """
    local = int(environ["LOCAL_RANK"])
    given = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
    environ["CUDA_VISIBLE_DEVICES"] = given[local] if given else str(local)
    environ["LOCAL_RANK"] = "0"


def run_rank(job: TrainJob, stop: StopFlag) -> int:
    """Train as one rank, with ``RANK``, ``WORLD_SIZE`` ... in the environment.

    Returns:
        0 when the run is finished, `STOPPED` when it was told to stop and has saved, `REFUSED`
        when data, configuration or checkpoints are not what they must be.
    """
    device = job.launch.device
    if device == "cuda":
        take_own_gpu(os.environ)
    os.environ["DS_ACCELERATOR"] = device
    # DeepSpeed calls what torch has renamed; no user of ours can do anything about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Not above: signals must find their handlers before torch takes its seconds.
    import torch

    from vssl_dist import config, dist
    from vssl_dist.checkpoint import CheckpointError
    from vssl_dist.config import ConfigError
    from vssl_dist.data.shards import DataError
    from vssl_dist.jobs.observer import Silent, observe
    from vssl_dist.methods import CONFIGS
    from vssl_dist.train import Preempted, train

    cfg = config.loads(job.config_yaml, methods=CONFIGS)
    torch.set_num_threads(job.launch.cpus_per_rank)
    observer: Observer | Silent = Silent()
    try:
        dist.init(device)
        observer = observe(cfg, job.launch)
        train(cfg, device=device, should_stop=stop, on_export=observer.on_export, log=observer.log)
    except Preempted:
        stop.final = dist.broadcast(stop.only_terminated)
        torch.distributed.destroy_process_group()
        observer.close("KILLED", timeout_s=stopping_s(job.launch))
        return STOPPED
    except (ConfigError, DataError, CheckpointError) as error:
        note_failure(cfg.dir, line := f"{REFUSAL}{error} ({_this_rank()})")
        print(line, file=sys.stderr, flush=True)
        observer.close("FAILED", timeout_s=5)
        return REFUSED
    except Exception:
        note_failure(cfg.dir, f"{_this_rank()} failed first:\n{traceback.format_exc()}")
        observer.close("FAILED", timeout_s=5)
        raise
    torch.distributed.destroy_process_group()
    observer.close("FINISHED", timeout_s=60)
    return 0


def stopping_s(launch: Launch) -> float:
    """What the last curves of a stopped run are given: on SLURM the scheduler is waiting, here a
    user, who can end it by another Ctrl-C."""
    return 3 if launch.cluster == "slurm" else 30


def attempt() -> str:
    """Names this start of the job: a requeued one begins a new attempt."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return os.environ.get("VSSL_ATTEMPT", str(os.getpid()))
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def failure_file(run_dir: Path, attempt_name: str) -> Path:
    """Where the first rank to fail says why."""
    return run_dir / "logs" / f"failure-{attempt_name}.txt"


def note_failure(run_dir: Path, text: str) -> None:
    """Leave the reason of the rank that failed first: the others only lost a peer."""
    path = failure_file(run_dir, attempt())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
        if "SLURM_JOB_ID" in os.environ and os.environ["RANK"] != "0":
            # Rank 0's log is the one that people follow.
            log = submitit.JobEnvironment().paths.folder / f"{os.environ['SLURM_JOB_ID']}_0_log.out"
            with log.open("a") as file:
                file.write(f"{text.rstrip()}\n")
    except OSError:
        return  # somebody was first, or the disk is the reason for the failure


def _this_rank() -> str:
    return f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()}"


def _leave_slurm(stop: StopFlag) -> NoReturn:
    """End this task of a stopped job; rank 0 puts the job back into the queue."""
    if stop.final:
        sys.exit(0)
    if os.environ["RANK"] == "0":
        stop.requeue()
        sys.exit(0)
    # A rank that ended before could be taken for the end of the job.  The requeue ends it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_UNTIL_REQUEUED_S)
    sys.exit(1)
