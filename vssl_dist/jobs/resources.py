"""What a run asks of the machine: profiles (``slurm/*.yaml``) and one resolved launch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, model_validator

from vssl_dist.confidential import hidden, in_command, in_setting, in_text
from vssl_dist.config import Model, load_block, refuse_no_file
from vssl_dist.errors import ConfigError
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_WORD = r"^[A-Za-z0-9._:/=,+@%-]{1,128}$"

# submitit writes these into a shell script as they are: a newline would be a command.
Word = Annotated[str, Field(pattern=_WORD)]
"""A value that can stand in an sbatch script."""
Hosts = Annotated[str, Field(pattern=r"^[A-Za-z0-9._,\[\]-]{1,1024}$")]
"""SLURM's notation for nodes, such as ``gpu[01-08],big3``."""
Line = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:/=,+@% -]{1,256}$")]
"""One plain command, such as ``module load cuda/13.0`` or ``source /site/env.sh``."""
Lines = Annotated[
    tuple[Line, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}$")]
Interface = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,14}$")]
"""A network interface, such as ``ib0``."""
Positive = Annotated[int, Field(gt=0)]
Device = Literal["cuda", "cpu"]


class EvaluationResources(Model):
    """One evaluation job, of which each milestone gets one."""

    partition: Word | None = None
    """Where not given, this and the next three are the training job's."""
    account: Word | None = None
    """Whom SLURM charges."""
    qos: Word | None = None
    """Its quality of service."""
    device: Device | None = None
    """``cuda`` or ``cpu``."""
    ranks: Positive = 1
    """Processes that share a pass over images, each with a GPU and ``cpus`` cores of its own."""
    cpus: Positive = 8
    """Cores of each."""
    mem_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory in GB; 0 is all of the node's, null is the partition's default."""
    minutes: Positive = 60
    """Time limit."""


class Resources(Model):
    """A profile: the machine's side of a run.  The science is in ``configs/``."""

    partition: Word | None = None
    """SLURM's ``--partition``, like the next ones; null: the site's default."""
    account: Word | None = None
    """Whom SLURM charges."""
    qos: Word | None = None
    """Quality of service."""
    constraint: Word | None = None
    """Features that every node must have."""
    reservation: Word | None = None
    """Of nodes, by its name."""
    nodelist: Hosts | None = None
    """These nodes, such as ``gpu[01-08],big3``."""
    exclude: Hosts | None = None
    """Not these."""
    exclusive: bool = False
    """Take whole nodes."""
    ranks_per_node: Positive = 8
    """Processes per node, on ``cuda`` one per GPU."""
    device: Literal["auto", "cuda", "cpu"] = "cuda"
    """``auto`` is for ``--local``: a login node cannot see what the compute nodes have."""
    gpus_per_node: Annotated[int, Field(ge=0)] | None = None
    """GPUs to ask for; where not given, one per rank on ``cuda`` and none on ``cpu``."""
    cpus_per_rank: Positive | None = None
    """Cores per rank; where not given, 8 on SLURM and an equal share of this machine locally."""
    mem_gb: Annotated[int, Field(ge=0)] | None = None
    """Memory per node; 0 is all of it, none is the partition's default."""
    minutes: Positive = 1440
    """Time limit of one job; SLURM's end of it is survived by a checkpoint and a requeue."""
    signal_delay_s: Positive = 300
    """SLURM's warning before it ends the job: longer than one vote and one checkpoint take."""
    interface: Interface | None = None
    """Network interface by which ranks talk, such as ``ib0``; null: what gloo and NCCL choose, and
    on a single machine the loopback, which no other machine reaches."""
    setup: Lines = ()
    """Commands that the batch script runs first; longer ones go into a file to ``source``."""
    env: dict[Name, Word] = Field(default={})
    """Variables of every rank.  Secrets do not belong here: export them before submitting."""
    evaluation: EvaluationResources = EvaluationResources()
    """Of each evaluation's own job."""

    @property
    def gpus(self) -> int:
        """GPUs per node to ask for."""
        if self.gpus_per_node is not None:
            return self.gpus_per_node
        return self.ranks_per_node if self.device == "cuda" else 0

    @model_validator(mode="after")
    def _rules_between_fields(self) -> Resources:
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


def _why_secret(raw: dict[Any, Any]) -> str | None:
    """What is wrong with a profile that would have a secret written into run folders."""
    place = next(_secret_places(raw), None)
    if place is None:
        return None
    return (
        f"{place} looks like a secret, which would be written into the run folder: "
        "export it in the shell that submits instead"
    )


def _secret_places(raw: dict[Any, Any], where: str = "") -> Iterator[str]:
    """The keys of a profile under which there is a secret."""
    for key, value in raw.items():
        place = f"{where}{printable(hidden(str(key)))}"
        if in_text(str(key)) or (where == "env." and in_setting(str(key), str(value))):
            yield place
        elif isinstance(value, dict):
            yield from _secret_places(value, f"{place}.")
        elif any(in_command(line) for line in _lines(value)):
            yield place


def _lines(value: Any) -> Iterator[str]:
    """What stands under a key, however many lists are around it."""
    if not isinstance(value, list | tuple | dict):
        yield str(value)
        return
    for one in value.items() if isinstance(value, dict) else value:
        yield from _lines(one)


class Launch(Model):
    """One launch of a run, resolved: all that ranks and evaluations are told about the machine."""

    cluster: Literal["slurm", "local"]
    nodes: Positive
    ranks_per_node: Positive
    cpus_per_rank: Positive
    device: Device
    tracking_uri: str
    resources: Resources

    @property
    def world_size(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.ranks_per_node


def meeting_place(interface: str | None) -> dict[str, str]:
    """Variables that have gloo and NCCL use one network interface and no other.

    >>> meeting_place("ib0")
    {'GLOO_SOCKET_IFNAME': 'ib0', 'NCCL_SOCKET_IFNAME': '=ib0'}
    """
    if interface is None:
        return {}
    # NCCL takes a bare name for the beginning of several.
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def load_profile(path: Path) -> Resources:
    """Read ``slurm/NAME.yaml``.

    Raises:
        ConfigError: One line that names the file, the key and the remedy.
    """
    return load_block(path, Resources, check=_why_secret)


def on_slurm(profile: Resources, nodes: int, tracking_uri: str) -> Launch:
    """The launch of a profile on ``nodes`` nodes of a cluster."""
    if profile.device == "auto":
        raise ConfigError("device: auto is for --local; a profile for SLURM says cuda or cpu")
    return Launch(
        cluster="slurm",
        nodes=nodes,
        ranks_per_node=profile.ranks_per_node,
        cpus_per_rank=profile.cpus_per_rank or 8,
        device=profile.device,
        tracking_uri=tracking_uri,
        resources=profile,
    )


def on_this_machine(profile: Resources, ranks: int | None, gpus: int, tracking_uri: str) -> Launch:
    """The launch of a profile on this machine.

    Args:
        profile: ``device: auto`` takes the GPUs if there are any.
        ranks: How many; None is one per GPU, or two on the CPU.
        gpus: How many this machine has.
        tracking_uri: Where the curves go.
    """
    device: Device = "cuda" if profile.device == "auto" and gpus else "cpu"
    if profile.device != "auto":
        device = profile.device
    if profile.setup:
        raise ConfigError("setup: these lines are for batch scripts; --local runs in this shell")
    if device == "cuda" and (ranks or 1) > gpus:
        raise ConfigError(
            f"--local {ranks or ''}: torch sees {gpus} GPUs here and every rank needs its own: "
            "use fewer ranks, or a profile with device: cpu"
        )
    ranks = ranks or (gpus if device == "cuda" else 2)
    cores = len(os.sched_getaffinity(0))
    return Launch(
        cluster="local",
        nodes=1,
        ranks_per_node=ranks,
        cpus_per_rank=profile.cpus_per_rank or max(cores // ranks, 1),
        device=device,
        tracking_uri=tracking_uri,
        resources=profile,
    )


def dump_launch(launch: Launch) -> str:
    """The launch as YAML that `load_launch` reads back to an equal one."""
    text: str = yaml.safe_dump(launch.model_dump(mode="json"), sort_keys=False)
    return text


def load_launch(run_dir: Path) -> Launch:
    """The launch of the run in ``run_dir``, as its last submission wrote it.

    Raises:
        ConfigError: The folder holds no run.
    """
    path = RunFolder(run_dir).launch
    refuse_no_file(path)
    return load_block(path, Launch)
