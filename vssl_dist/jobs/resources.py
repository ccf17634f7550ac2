"""What a run asks of the machine: profiles (``slurm/*.yaml``) and one resolved launch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from vssl_dist.confidential import (
    has_secret_in_command,
    has_secret_in_setting,
    has_secret_in_text,
    redact_secrets,
)
from vssl_dist.config import Model, load_block, refuse_no_file
from vssl_dist.errors import ConfigError
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_SCRIPT_WORD_PATTERN = r"^[A-Za-z0-9._:/=,+@%-]{1,128}$"

# submitit writes these into a shell script as they are: a newline would be a command.
ScriptWord = Annotated[str, Field(pattern=_SCRIPT_WORD_PATTERN)]
"""A value that can stand in an sbatch script as it is."""
SlurmNodeList = Annotated[str, Field(pattern=r"^[A-Za-z0-9._,\[\]-]{1,1024}$")]
"""SLURM's notation for nodes, such as ``gpu[01-08],big3``."""
ShellLine = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/=,+@% -]{1,256}$")]
"""One plain command, such as ``module load cuda/13.0`` or ``source /site/env.sh``."""
ShellLines = Annotated[
    tuple[ShellLine, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
InterfaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")]
"""A network interface, such as ``ib0``."""
PositiveInt = Annotated[int, Field(gt=0)]
Device = Literal["cuda", "cpu"]


class EvaluationResources(Model):
    """What one evaluation job asks of SLURM; each evaluation of a milestone is such a job."""

    partition: ScriptWord | None = None
    """SLURM's ``--partition`` of an evaluation job; null: the training job's."""
    account: ScriptWord | None = None
    """Account that SLURM charges for an evaluation; null: the training job's."""
    qos: ScriptWord | None = None
    """Quality of service of an evaluation job; null: the training job's."""
    device: Device | None = None
    """Whether evaluations run on ``cuda`` or ``cpu``; null: as the training does."""
    ranks: PositiveInt = 1
    """Processes that share a pass over images, each with a GPU and ``cpus`` cores of its own."""
    cpus: PositiveInt = 8
    """Cores of each process of an evaluation."""
    mem_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory of an evaluation job in GB; 0: all of the node's, null: the partition's default."""
    minutes: PositiveInt = 60
    """Time limit of an evaluation job in minutes."""


class Resources(Model):
    """A profile: what a run asks of the machine.  What it computes is in ``configs/``."""

    partition: ScriptWord | None = None
    """SLURM's ``--partition``; null: the site's default."""
    account: ScriptWord | None = None
    """Account that SLURM charges; null: the user's default."""
    qos: ScriptWord | None = None
    """Quality of service of the job; null: the site's default."""
    constraint: ScriptWord | None = None
    """Features that every node must have, in SLURM's notation."""
    reservation: ScriptWord | None = None
    """Name of a reservation of nodes to run in."""
    nodelist: SlurmNodeList | None = None
    """Nodes that the job must have, such as ``gpu[01-08],big3``."""
    exclude: SlurmNodeList | None = None
    """Nodes that the job must not have."""
    exclusive: bool = False
    """Whether the job takes whole nodes."""
    ranks_per_node: PositiveInt = 8
    """Processes per node; on ``cuda`` each has a GPU of its own."""
    device: Literal["auto", "cuda", "cpu"] = "cuda"
    """Where ranks compute; ``auto``, for ``--local`` only, takes the GPUs if there are any."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs to ask for per node; null: one per rank on ``cuda``, none on ``cpu``."""
    cpus_per_rank: PositiveInt | None = None
    """Cores per rank; null: 8 on SLURM, an equal share of this machine with ``--local``."""
    mem_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory per node in GB; 0: all of it, null: the partition's default."""
    minutes: PositiveInt = 1440
    """Time limit of one job in minutes; a run that needs more is saved, requeued and goes on."""
    signal_delay_s: PositiveInt = 300
    """Seconds between SLURM's warning and its end of a job: enough for a vote and a checkpoint."""
    interface: InterfaceName | None = None
    """Network interface by which ranks talk, such as ``ib0``; null: what gloo and NCCL choose, and
    on a single machine the loopback, which no other machine reaches."""
    setup: ShellLines = ()
    """Commands that the batch script runs first; put longer ones into a file and ``source`` it."""
    env: dict[VariableName, ScriptWord] = Field(default={})
    """Environment variables of every rank.  Secrets do not belong here: export them before
    submitting."""
    evaluation: EvaluationResources = EvaluationResources()
    """What the job of each evaluation asks for."""

    @property
    def gpus(self) -> int:
        """GPUs per node to ask for."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return self.ranks_per_node if self.device == "cuda" else 0

    @model_validator(mode="after")
    def _check_field_pairs(self) -> Resources:
        if self.device == "cuda" and self.gpus < self.ranks_per_node:
            raise ValueError(
                f"gpus_per_node={self.gpus} is less than ranks_per_node={self.ranks_per_node}: "
                "every rank has a GPU of its own"
            )
        if self.signal_delay_s >= self.minutes * 60:
            raise ValueError(
                f"signal_delay_s={self.signal_delay_s} is not less than the job's "
                f"minutes={self.minutes}: it would be told to stop as it starts"
            )
        return self


def _why_secret(profile_values: dict[Any, Any]) -> str | None:
    """Say in one line which key of a profile holds a secret; None if there is none."""
    secret_key = next(_secret_keys(profile_values), None)
    if secret_key is None:
        return None
    return (
        f"{secret_key} looks like a secret, which would be written into the run folder: "
        "export it in the shell that submits instead"
    )


def _secret_keys(profile_values: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a profile that hold a secret."""
    for key, value in profile_values.items():
        dotted_key = f"{prefix}{printable(redact_secrets(str(key)))}"
        if has_secret_in_text(str(key)) or (
            prefix == "env." and has_secret_in_setting(str(key), str(value))
        ):
            yield dotted_key
        elif isinstance(value, dict):
            yield from _secret_keys(value, f"{dotted_key}.")
        elif any(has_secret_in_command(line) for line in _scalar_texts(value)):
            yield dotted_key


def _scalar_texts(value: object) -> Iterator[str]:
    """Yield every scalar under a key as text, however many lists are around it."""
    if not isinstance(value, list | tuple | dict):
        yield str(value)
        return
    for item in value.items() if isinstance(value, dict) else value:
        yield from _scalar_texts(item)


class Launch(Model):
    """One launch of a run, resolved: all that ranks and evaluations know of the machine."""

    cluster: Literal["slurm", "local"]
    nodes: PositiveInt
    ranks_per_node: PositiveInt
    cpus_per_rank: PositiveInt
    device: Device
    tracking_uri: str
    resources: Resources

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def interface_variables(interface: str | None) -> dict[str, str]:
    """Return variables that have gloo and NCCL use one network interface and no other.

    >>> interface_variables("ib0")
    {'GLOO_SOCKET_IFNAME': 'ib0', 'NCCL_SOCKET_IFNAME': '=ib0'}
    """
    if interface is None:
        return {}
    # Without the equals sign NCCL would take the name for the beginning of several.
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def load_profile(path: Path) -> Resources:
    """Read a machine's profile, ``slurm/NAME.yaml``.

    Raises:
        ConfigError: One line that names the file, the key and the remedy.
    """
    return load_block(path, Resources, check=_why_secret)


def resolve_for_slurm(profile: Resources, num_nodes: int, tracking_uri: str) -> Launch:
    """Resolve a profile to a launch on ``num_nodes`` nodes of a cluster."""
    if profile.device == "auto":
        raise ConfigError("device: auto is for --local; a profile for SLURM says cuda or cpu")
    return Launch(
        cluster="slurm",
        nodes=num_nodes,
        ranks_per_node=profile.ranks_per_node,
        cpus_per_rank=profile.cpus_per_rank or 8,
        device=profile.device,
        tracking_uri=tracking_uri,
        resources=profile,
    )


def resolve_for_this_machine(
    profile: Resources, num_ranks: int | None, num_gpus: int, tracking_uri: str
) -> Launch:
    """Resolve a profile to a launch on this machine.

    Args:
        profile: ``device: auto`` takes the GPUs if there are any.
        num_ranks: How many; None is one per GPU, or two on the CPU.
        num_gpus: How many this machine has.
        tracking_uri: Where the curves go.
    """
    device: Device = "cuda" if profile.device == "auto" and num_gpus else "cpu"
    if profile.device != "auto":
        device = profile.device
    if profile.setup:
        raise ConfigError("setup: these lines are for batch scripts; --local runs in this shell")
    if device == "cuda" and (num_ranks or 1) > num_gpus:
        raise ConfigError(
            f"--local {num_ranks or ''}: torch sees {num_gpus} GPUs here and every rank needs "
            "its own: use fewer ranks, or a profile with device: cpu"
        )
    num_ranks = num_ranks or (num_gpus if device == "cuda" else 2)
    num_cores = len(os.sched_getaffinity(0))
    return Launch(
        cluster="local",
        nodes=1,
        ranks_per_node=num_ranks,
        cpus_per_rank=profile.cpus_per_rank or max(num_cores // num_ranks, 1),
        device=device,
        tracking_uri=tracking_uri,
        resources=profile,
    )


def dump_launch(launch: Launch) -> str:
    """Write a launch as YAML, which `load_launch` reads back to an equal one."""
    text: str = yaml.safe_dump(launch.model_dump(mode="json"), sort_keys=False)
    return text


def load_launch(run_dir: Path) -> Launch:
    """Read the launch of the run in ``run_dir``, as its last submission wrote it.

    Raises:
        ConfigError: The folder holds no run.
    """
    path = RunFolder(run_dir).launch_path
    refuse_no_file(path)
    return load_block(path, Launch)
