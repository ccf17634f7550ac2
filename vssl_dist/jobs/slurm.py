"""SLURM through submitit: parameters of jobs, the batch script, submission, and living jobs."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import submitit

from vssl_dist.environment import DEFAULTS, allocator_variables, no_job_around, outside_jobs
from vssl_dist.errors import ConfigError, SubmissionError
from vssl_dist.installed import own_code_only
from vssl_dist.jobs import private
from vssl_dist.jobs.resources import Launch, interface_variables
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

# submitit counts every SIGUSR2 of a job of at most 10 minutes as a time-out, and ends the run
# when it has counted this many.
_MAX_TIMEOUTS = 10_000
_PLAIN_PATH_PATTERN = re.compile(r"[A-Za-z0-9._/=,+@-]+")
_ENDED_STATES = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "TIMEOUT",
)  # fmt: skip


def why_no_slurm() -> str | None:
    """Say in one line why nothing can be submitted from this machine; None if it can."""
    for program in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(program) is None:
            return f"there is no SLURM on this machine ({program} is not on the PATH)"
    try:
        ping = _run_slurm_command("scontrol", "ping")
        is_up = ping.returncode == 0 and " UP" in ping.stdout
    except subprocess.TimeoutExpired:
        is_up = False
    return None if is_up else "SLURM's controller does not answer (`scontrol ping` says more)"


def is_job_live(job: str) -> bool:
    """Whether SLURM still has the job: pending, running, or on its way back into the queue.

    When SLURM cannot be asked the answer is yes: two jobs in one run folder are worse than one
    refusal too many.
    """
    try:
        squeue = _run_slurm_command(
            "squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}"
        )
    except (OSError, subprocess.TimeoutExpired):
        return True
    if squeue.returncode:
        return "Invalid job id" not in squeue.stderr
    job_states = squeue.stdout.split()
    return any(state not in _ENDED_STATES for state in job_states)


def train_parameters(name: str, launch: Launch) -> dict[str, Any]:
    """Return the parameters of a training job, by sbatch's names for them."""
    profile = launch.resources
    variables = {"OMP_NUM_THREADS": str(launch.cpus_per_rank)}
    variables |= allocator_variables(launch.device, os.environ)
    variables |= interface_variables(profile.interface) | profile.env
    return _without_none(
        job_name=name,
        nodes=launch.nodes,
        ntasks_per_node=launch.ranks_per_node,
        cpus_per_task=launch.cpus_per_rank,
        gpus_per_node=profile.gpus or None,
        partition=profile.partition,
        account=profile.account,
        qos=profile.qos,
        constraint=profile.constraint,
        nodelist=profile.nodelist,
        exclude=profile.exclude,
        exclusive=profile.exclusive or None,
        mem=None if profile.mem_gb is None else f"{profile.mem_gb}GB",
        time=profile.minutes,
        signal_delay_s=profile.signal_delay_s,
        setup=[*profile.setup, *_export_lines(variables)],
        # One dead rank ends the job instead of leaving the others in a collective; since 22.05
        # srun does not take the number of cores from sbatch.  Rank 0 ends last: it submits the
        # last evaluations and sends the last curves, however short the site's WaitTime is.
        srun_args=[
            "--kill-on-bad-exit=1",
            "--wait=0",
            f"--cpus-per-task={launch.cpus_per_rank}",
        ],
        additional_parameters=_without_none(requeue=True, reservation=profile.reservation),
        stderr_to_stdout=True,
    )


def evaluation_parameters(name: str, launch: Launch) -> dict[str, Any]:
    """Return the parameters of an evaluation job of one process, by sbatch's names for them."""
    profile = launch.resources
    evaluation = profile.evaluation
    device = evaluation.device or launch.device
    variables = {"OMP_NUM_THREADS": str(evaluation.cpus)}
    variables |= allocator_variables(device, os.environ) | profile.env
    return _without_none(
        job_name=name,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=evaluation.cpus * evaluation.ranks,
        gpus_per_node=evaluation.ranks if device == "cuda" else None,
        partition=evaluation.partition or profile.partition,
        account=evaluation.account or profile.account,
        qos=evaluation.qos or profile.qos,
        constraint=profile.constraint,
        exclude=profile.exclude,
        mem=None if evaluation.mem_gb is None else f"{evaluation.mem_gb}GB",
        time=evaluation.minutes,
        setup=[*profile.setup, *_export_lines(variables)],
        srun_args=[f"--cpus-per-task={evaluation.cpus * evaluation.ranks}"],
        additional_parameters=_without_none(reservation=profile.reservation),
        stderr_to_stdout=True,
    )


def batch_script_text(folder: Path, parameters: Mapping[str, Any]) -> str:
    """Return the text of the batch script that `submit` would write.

    Nothing is written, and SLURM need not be installed: a dry run can be read anywhere.
    """
    executor = _WithoutSlurm(folder, max_num_timeout=_MAX_TIMEOUTS)
    executor.update_parameters(**_with_owner_check(folder, parameters))
    # The pinned submitit has no public name for the text that it submits.
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "dry-run")
    return text


def submit(folder: Path, parameters: Mapping[str, Any], job: Callable[[], object]) -> str:
    """Submit a picklable job to SLURM.

    Args:
        folder: Holds the script, the pickle and the logs (``JOB_RANK_log.out``); all nodes see it.
        parameters: From `train_parameters` or `evaluation_parameters`.
        job: Called without arguments by every task.

    Returns:
        The job's id.

    Raises:
        ConfigError: The folder is not this user's.
        SubmissionError: SLURM refused it.
    """
    private.make_private_folder(folder)
    executor = submitit.SlurmExecutor(folder, max_num_timeout=_MAX_TIMEOUTS)
    executor.update_parameters(**_with_owner_check(folder, parameters))
    try:
        # submitit echoes what sbatch says, which the exception says again.
        with no_job_around(*_overridden_defaults(parameters)), redirect_stderr(io.StringIO()):
            submitted_job = executor.submit(job)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        sbatch_error = printable(" ".join(str(error).split()))
        raise SubmissionError(f"sbatch refused the job: {sbatch_error[:300]}") from error
    return str(submitted_job.job_id)


def check_script_path(path: Path) -> None:
    """Refuse a run folder whose name SLURM or a shell would read as something else.

    Raises:
        ConfigError: It has spaces, quotes, percent signs or the like.
    """
    if not _PLAIN_PATH_PATTERN.fullmatch(str(path)):
        raise ConfigError(
            f"out: {str(path)!r} cannot stand in a batch script: use letters, digits and ._/=,+@-"
        )


def _with_owner_check(folder: Path, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Add lines to a job's script that end it where ``folder`` is not this user's any more.

    Nodes unpickle what lies there.  Who may write in the folder above the run can put another in
    its place while a job waits: not one that belongs to this user, but a link to one.
    """
    run_dir, *subfolders = _folders_from_run(folder)
    owned_paths_text = " ".join(shlex.quote(str(path)) for path in (run_dir, *subfolders))
    refusal_command = (
        'echo "error: $place is not yours, and nodes run what they find there" >&2; exit 2'
    )
    check_lines = [
        "export PYTHONSAFEPATH=1",
        *_code_first_lines(own_code_only({})["PYTHONPATH"]),
        f'for place in {owned_paths_text}; do [ -O "$place" ] || {{ {refusal_command}; }}; done',
        f"place={shlex.quote(str(run_dir))}; [ ! -L $place ] || {{ {refusal_command}; }}",
    ]
    # submitit's default, a wckey of its own name, is unknown to clusters that check them.
    return {**parameters, "setup": [*parameters.get("setup", ()), *check_lines], "wckey": None}


def _folders_from_run(folder: Path) -> list[Path]:
    """List the run's folder and those on the way to the one that holds a job's pickle."""
    num_parents = 2 if folder == RunFolder(folder.parent.parent).evaluation_jobs_folder else 1
    return [*reversed(folder.parents[:num_parents]), folder]


def _code_first_lines(code_path_text: str) -> list[str]:
    """Return shell lines that put this code first in PYTHONPATH and drop empty entries.

    Modules and the user's lines may have added to it.  An empty entry would be the folder that
    the job starts in.
    """
    return [
        f'PYTHONPATH=$(printf %s {shlex.quote(code_path_text)}:"$PYTHONPATH" | tr -s :)',
        "PYTHONPATH=${PYTHONPATH#:}",
        "export PYTHONPATH=${PYTHONPATH%:}",
    ]


class _WithoutSlurm(submitit.SlurmExecutor):  # type: ignore[misc]
    """An executor that claims to work where there is no SLURM, so that it writes its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2  # whatever is above 0: submitit refuses where it finds no srun


def _run_slurm_command(*command: str) -> subprocess.CompletedProcess[str]:
    # A user's SQUEUE_PARTITION, say, would hide a job that lives.
    environ = {k: v for k, v in outside_jobs(os.environ).items() if not k.startswith("SQUEUE_")}
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=30, check=False
    )


def _without_none(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _export_lines(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={value}" for name, value in sorted(variables.items())]


def _overridden_defaults(parameters: Mapping[str, Any]) -> list[str]:
    """List the user's variables for sbatch that the script decides: sbatch would prefer them."""
    keys = {*parameters, *parameters.get("additional_parameters", {})}
    return [name for name, key in DEFAULTS.items() if key in keys]
