"""Environment variables that say whose job a process is; an outer launcher's are not believed.

A command may be typed inside ``salloc``, ``srun --pty``, ``mpirun``, ``torchrun`` or a notebook.
What it starts belongs to this project's launchers alone, which say so in variables of their own:
``VSSL_ATTEMPT`` names the start of a run, ``VSSL_LAUNCHER`` is the process that started a rank of
this machine, ``VSSL_LISTENER`` the socket that its rank 0 inherits, ``VSSL_SLURM_JOB`` the job
that `jobs.training_job` runs in and ``VSSL_LEAD_LOG`` the log of its rank 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_FAMILIES = (
    # Of SLURM and submitit: a job, its steps, and what `sbatch` and `srun` are to do next.
    "SLURM_", "SLURMD_", "SRUN_", "SBATCH_", "SALLOC_", "SUBMITIT_",
    # Of other schedulers.
    "PBS_", "LSB_", "JSM_", "FLUX_", "PALS_", "ALPS_", "SGE_", "COBALT_", "OAR_",
    # Of MPI's launchers: no process of ours speaks MPI.
    "OMPI_", "PMI_", "PMI2_", "PMIX_", "PRTE_", "ORTE_", "HYDI_", "MV2_COMM_WORLD_", "MPI_LOCAL",
    "MPIRUN_", "MPISPAWN_",
    # Of torchrun, accelerate and horovodrun.
    "TORCHELASTIC_", "TORCH_ELASTIC_", "PET_", "ACCELERATE_", "FSDP_", "HOROVOD_",
    # Of a notebook's kernel.
    "JPY_",
)  # fmt: skip
_NAMES = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "MASTER_ADDR",
    "MASTER_PORT", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE",
    "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE",
    # Of LSF and Grid Engine, beside what begins with their names.
    "LS_JOBPID", "PE_HOSTFILE", "NSLOTS", "NHOSTS", "NQUEUES",
    # Where NCCL meets instead of where it is told.
    "NCCL_COMM_ID",
    # `mlflow run` means its own run, a notebook its own pictures.
    "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ACTIVE_MODEL_ID",
    "MPLBACKEND",
    "VSSL_ATTEMPT", "VSSL_LAUNCHER", "VSSL_LISTENER", "VSSL_SLURM_JOB", "VSSL_LEAD_LOG",
}  # fmt: skip
DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
}
"""A user's own defaults for jobs, which outlive any job, and the keys of a profile they are for."""
_CPU_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
_STAY = {
    *DEFAULTS, "SBATCH_CLUSTERS", "SBATCH_WCKEY", "SLURM_CONF", "SLURM_CONF_SERVER",
    "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT",
}  # fmt: skip


def outside_jobs(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that belongs to no job, whoever started the present one.

    What describes the machine or the user stays: paths, CUDA_VISIBLE_DEVICES, NCCL's and gloo's
    settings, the address of the SLURM cluster, and whom it charges.

    >>> inside = {"HOME": "/home/me", "SLURM_JOB_ID": "7", "SLURM_CONF": "/etc/s", "RANK": "3"}
    >>> outside_jobs(inside)
    {'HOME': '/home/me', 'SLURM_CONF': '/etc/s'}
    """
    return {name: value for name, value in environ.items() if not _of_a_job(name)}


def allocator_variables(device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Return settings by which glibc keeps the memory of a step on a CPU for the next step.

    Given back to the system, each page of it is cleared and mapped anew at every step.  They count
    when a process starts.  What ``environ`` sets already is left out.

    >>> allocator_variables("cpu", {"MALLOC_MMAP_MAX_": "9"})
    {'MALLOC_TRIM_THRESHOLD_': '17179869184'}
    >>> allocator_variables("cuda", {})
    {}
    """
    settings = _CPU_ALLOCATOR if device == "cpu" else {}
    return {name: value for name, value in settings.items() if name not in environ}


def in_our_job(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a task of a job which submitit started has of SLURM, and of nobody else.

    >>> in_our_job({"SLURM_JOB_ID": "7", "SUBMITIT_FOLDER": "/run/slurm", "PMI_RANK": "3"})
    {'SLURM_JOB_ID': '7', 'SUBMITIT_FOLDER': '/run/slurm'}
    """
    job_prefixes = ("SLURM_", "SLURMD_", "SUBMITIT_")
    return {k: v for k, v in environ.items() if k.startswith(job_prefixes) or not _of_a_job(k)}


def _of_a_job(name: str) -> bool:
    return name not in _STAY and (name in _NAMES or name.startswith(_FAMILIES))


@contextmanager
def no_job_around(*also: str) -> Iterator[None]:
    """Hide the variables of any job while a library starts something from ``os.environ``.

    Args:
        also: More variables to hide.
    """
    before = dict(os.environ)
    hidden = before.keys() - outside_jobs(before).keys() | {*also} & before.keys()
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update({name: before[name] for name in hidden})


@contextmanager
def hidden_module(name: str) -> Iterator[None]:
    """Let imports of ``name`` fail, unless it is imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]


def slurm_job() -> str | None:
    """Id of the SLURM job in which our launcher started this rank; None: there is none."""
    return os.environ.get("VSSL_SLURM_JOB")
