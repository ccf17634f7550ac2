"""See what this machine lacks before a run does: a line for each thing that a run needs.

    vssl doctor                         # here
    vssl doctor --out /scratch/me/runs  # where runs are to lie
    vssl doctor --need gpu,slurm        # their absence is a fault, too

Nothing is kept and each look ends by itself.  The exit code is 0 where all is well, else 2 with the
first remedy as the last line.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

from vssl_dist.cli.program import arguments
from vssl_dist.confidential import redact_secrets
from vssl_dist.errors import ConfigError
from vssl_dist.installed import NEEDED, has_dali
from vssl_dist.jobs import machine
from vssl_dist.jobs.slurm import why_no_slurm
from vssl_dist.text import printable, say
from vssl_dist.tracker import (
    NO_TRACKING,
    check_tracking,
    default_tracking_uri,
    probe_tracking,
    why_no_locks,
)

REFUSED = 2
_WITHIN_S = 20.0
"""More than the looks take that end by themselves."""
_LEAST_FREE = 5 * 10**9
"""Bytes that a few checkpoints of a ResNet-50 take."""


@dataclass(frozen=True)
class Finding:
    """The result of one look: a line of the report."""

    text: str
    fault: bool = False
    """Whether a run would fail for it; the text then ends with the remedy."""
    absent: bool = False
    """Whether something is missing that runs can do without."""

    @property
    def state(self) -> str:
        """The verdict in one word."""
        return "FAULT" if self.fault else "-" if self.absent else "ok"


Look = Callable[[], Finding]


def python() -> Finding:
    """The interpreter; `require_packages` has seen that all packages are there."""
    return Finding(f"Python {platform.python_version()} with its {len(NEEDED)} packages")


def gpu(needed: bool) -> Finding:
    """The driver, the GPUs, and whether this torch can use them."""
    import torch

    wheel, driver = machine.read_wheel(), machine.read_driver()
    reason = machine.why_no_cuda(wheel, driver)
    if reason is None:
        assert driver is not None
        count = torch.cuda.device_count()
        devices = (
            f"{count} GPUs, driver {driver.release}, torch {wheel.version} for CUDA {wheel.cuda}"
        )
        if count:
            return Finding(devices)
        return Finding(f"{devices}: CUDA_VISIBLE_DEVICES shows none: list one", fault=needed)
    # Where there is no driver there is no GPU that somebody might be waiting for.
    return Finding(reason, fault=needed or driver is not None, absent=True)


def dali(needed: bool) -> Finding:
    """Whether images can be decoded by DALI."""
    if not has_dali():
        return Finding(
            "not installed, so images are decoded by Pillow on the CPU: "
            "pip install '.[cuda13]' (or cuda12) brings it",
            fault=needed,
            absent=True,
        )
    try:
        import_module("vssl_dist.data.backends.dali")
    except Exception as error:
        return Finding(f"cannot be imported ({error}): data.backend=reference does without", True)
    builds = [*distributions(name="nvidia-dali-cuda130")]
    builds += distributions(name="nvidia-dali-cuda120")
    return Finding(", ".join(f"{d.name} {d.version}" for d in builds) or "DALI of its own build")


def compiler() -> Finding:
    """The C++ compiler, with which torch and DeepSpeed build what a machine needs."""
    names = [name for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++") if name]
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        return Finding(f"none of {', '.join(names)} is on the PATH: install g++", fault=True)
    return Finding(path)


def disk(out: Path) -> Finding:
    """Space, permission, locks and hard links where runs are to lie."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return Finding(f"{folder}: is no folder: name another with --out", fault=True)
    free = shutil.disk_usage(folder).free
    space = f"{folder}: {free / 1e9:.0f} GB free"
    if free < _LEAST_FREE:
        return Finding(f"{space}: make room, or use another folder (out=...)", fault=True)
    if reason := why_no_locks(folder):
        return Finding(f"{reason}: use another folder (out=...)", fault=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".vssl-doctor-", dir=folder) as trial:
            first = Path(trial) / "a"
            first.mkdir()
            with tempfile.NamedTemporaryFile(dir=first) as file:
                os.link(file.name, Path(trial) / "b")
    except OSError as error:
        why = error.strerror or error
        return Finding(
            f"{folder}: no file with a second name can be made there ({why}): "
            "use another folder (out=...)",
            fault=True,
        )
    return Finding(f"{space}, locks and hard links")


def slurm(needed: bool) -> Finding:
    """The programs of SLURM and its controller."""
    reason = why_no_slurm()
    if reason is None:
        return Finding("takes jobs")
    has_sbatch = shutil.which("sbatch") is not None
    return Finding(
        f"{reason}: --local [N] runs on this machine instead", needed or has_sbatch, absent=True
    )


def tracking(out: Path) -> Finding:
    """The address that curves go to, and whether it answers."""
    try:
        uri = default_tracking_uri()
    except ConfigError as error:
        return Finding(str(error), fault=True)
    if problem := check_tracking(uri, num_hosts=1):
        return Finding(problem, fault=True)
    if uri == NO_TRACKING:
        return Finding(
            "none: curves wait in each run's spool until vssl track sends them", absent=True
        )
    answer = probe_tracking(uri, out / "doctor")
    if answer.problem:
        return Finding(answer.problem, fault=True)
    if answer.passing_problem:
        return Finding(
            f"MLflow at {uri} does not answer: start it, or set MLFLOW_TRACKING_URI to another "
            "address",
            fault=True,
        )
    return Finding(uri)


def take_look(name: str, look: Look) -> Finding:
    """Take a look, which ends within a time whatever goes wrong in it."""
    findings: list[Finding] = []

    def see() -> None:
        try:
            findings.append(look())
        except Exception as error:  # a look is no reason for a traceback
            text = " ".join(str(error).split())
            findings.append(Finding(f"cannot be seen ({type(error).__name__}: {text})", True))

    # A daemon: a look that hangs, as on a dead file server, must not keep this process alive.
    thread = threading.Thread(target=see, name=name, daemon=True)
    thread.start()
    thread.join(_WITHIN_S)
    return findings[0] if findings else Finding(f"no answer within {_WITHIN_S:g} s", fault=True)


def main(argv: Sequence[str]) -> int:
    """Print the report; exit code 0, 2 (something is at fault) or 130 (Ctrl-C)."""
    args = arguments("doctor", argv)
    needs = [name.strip() for name in args.need.split(",")]
    looks: dict[str, Look] = {
        "python": python,
        "gpu": lambda: gpu("gpu" in needs),
        "dali": lambda: dali("gpu" in needs),
        "compiler": compiler,
        "disk": lambda: disk(args.out),
        "slurm": lambda: slurm("slurm" in needs),
        "tracking": lambda: tracking(args.out),
    }
    error_line = None
    try:
        for name, look in looks.items():
            finding = take_look(name, look)
            line = printable(redact_secrets(finding.text))
            say(f"{finding.state:<6}{name:<10}{line}")
            if finding.fault and error_line is None:
                error_line = f"error: {name}: {line}"
    except KeyboardInterrupt:
        return 130
    if error_line is None:
        return 0
    say(error_line, to_stderr=True)
    return REFUSED
