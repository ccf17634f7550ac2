"""What other launchers leave in the environment of the commands that are typed inside them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

SALLOC = {
    "SLURM_JOB_ID": "4242", "SLURM_JOBID": "4242", "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_NODELIST": "gpu[01-02]", "SLURM_NTASKS": "16", "SLURM_NPROCS": "16", "SLURM_NNODES": "2",
    "SLURM_MEM_PER_CPU": "100", "SLURM_CPUS_PER_TASK": "1", "SLURM_TASKS_PER_NODE": "8(x2)",
    "SLURM_JOB_ACCOUNT": "theirs", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "5", "SLURM_EXPORT_ENV": "NONE", "SBATCH_CPU_BIND": "quiet,none",
    "SBATCH_MEM_PER_NODE": "1", "SBATCH_TIMELIMIT": "1", "SBATCH_ARRAY_INX": "0-9",
}  # fmt: skip
SRUN_PTY = SALLOC | {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SRUN_DEBUG": "3",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.2.3", "PMI_RANK": "3", "PMI_SIZE": "16", "PMI_FD": "9",
    "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.4242.0", "PMIX_SERVER_URI41": "x;tcp4://1:2",
}  # fmt: skip
SUBMITIT = SALLOC | {"SUBMITIT_EXECUTOR": "slurm", "SUBMITIT_FOLDER": "/dev/null/of/others"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_UNIVERSE_SIZE": "16", "OMPI_MCA_ess": "env",
    "PMIX_RANK": "3", "PRTE_LAUNCHED": "1", "ORTE_JOB": "1",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "16", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "8"}
MVAPICH = {"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "16"}
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "ROLE_RANK": "3", "ROLE_NAME": "default", "ROLE_WORLD_SIZE": "16",
    "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_ERROR_FILE": "/dev/null/error.json",
    "PET_NNODES": "2",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "16", "LOCAL_RANK": "3", "LOCAL_SIZE": "8", "CROSS_RANK": "1",
    "CROSS_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500",
}  # fmt: skip
ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_USE_FSDP": "true", "NODE_RANK": "1"}
NOTEBOOK = {
    "JPY_PARENT_PID": "1", "JPY_SESSION_NAME": "a.ipynb",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}  # fmt: skip
MLFLOW_RUN = {"MLFLOW_RUN_ID": "0" * 32, "MLFLOW_EXPERIMENT_ID": "7"}
OURS = {
    "VSSL_ATTEMPT": "old", "VSSL_LAUNCHER": "1", "VSSL_LISTENER": "3", "VSSL_SLURM_JOB": "4242",
    "VSSL_LEAD_LOG": "/dev/null/log.out",
}  # fmt: skip
LAUNCHERS: Mapping[str, Mapping[str, str]] = {
    "salloc": SALLOC, "srun --pty": SRUN_PTY, "submitit": SUBMITIT, "Open MPI": OPEN_MPI,
    "MPICH": MPICH, "MVAPICH": MVAPICH, "torchrun": TORCHRUN, "deepspeed": DEEPSPEED,
    "accelerate": ACCELERATE, "notebook": NOTEBOOK, "mlflow run": MLFLOW_RUN, "ours": OURS,
}  # fmt: skip
HOSTILE = {name: value for theirs in LAUNCHERS.values() for name, value in theirs.items()}
"""All of them at once."""
INNOCENT = {
    "HOME": "/home/me", "PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "4,6", "TMPDIR": "/tmp",
    "NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0", "TORCH_NCCL_BLOCKING_WAIT": "1",
    "MLFLOW_TRACKING_URI": "http://tracker:5000", "MLFLOW_TRACKING_TOKEN": "t",
    "OMP_PLACES": "cores",
    "SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "big", "SLURM_TIME_FORMAT": "standard",
    "SBATCH_ACCOUNT": "us", "SBATCH_QOS": "long", "VSSL_TEST_DATA": "/data", "PYTHONPATH": "/code",
}  # fmt: skip
"""What describes the machine and the user, not a job."""


def of_process(pid: int) -> dict[str, str]:
    """The environment with which a process was started, as the kernel has it."""
    while not (text := Path(f"/proc/{pid}/environ").read_bytes()):
        time.sleep(0.01)  # a program that has only just been loaded shows none yet
    words = text.decode().split("\0")
    return dict(word.split("=", 1) for word in words if word)
