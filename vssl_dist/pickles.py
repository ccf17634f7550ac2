"""What DeepSpeed pickles into a checkpoint, and how it is read without running any of it.

A pickle names what is called to rebuild it: whoever writes one decides what runs.  Its checksum
proves nothing here, as the manifest may be from the same hand.  So a file is opened only if it
names nothing but what torch holds for safe and what DeepSpeed is known to write: first each is
looked through, which builds nothing and takes no longer however large the tensors are, so that
all ranks refuse together and can say what it was; then torch's unpickler for weights, which can
call nothing else, reads it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from vssl_dist import dist
from vssl_dist.errors import CheckpointError
from vssl_dist.sealed import REMEDY
from vssl_dist.text import printable

_MODEL: frozenset[str] = frozenset()
_SHARD = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
ALLOWED_GLOBALS: Mapping[int, Mapping[str, frozenset[str]]] = {
    0: {"model": _MODEL},
    1: {"model": _MODEL, "shard": _SHARD},
    2: {"model": _MODEL, "shard": _SHARD},
}
"""Globals that a file may name beyond those that torch holds for safe, by ZeRO stage and kind of
file: the same in float32 and under autocast, for every optimizer."""


def expected_files(world_size: int, zero_stage: int) -> dict[str, frozenset[str]]:
    """Return the files that DeepSpeed writes, and the globals that each may name.

    >>> [len(names) for names in expected_files(world_size=2, zero_stage=1).values()]
    [0, 3, 3]
    """
    allowed = ALLOWED_GLOBALS[zero_stage]
    files = {"mp_rank_00_model_states.pt": allowed["model"]}
    if "shard" in allowed:
        shards = (f"zero_pp_rank_{r}_mp_rank_00_optim_states.pt" for r in range(world_size))
        files |= dict.fromkeys(shards, allowed["shard"])
    return files


def scan(folder: Path, files: Mapping[str, frozenset[str]]) -> None:
    """Look through this rank's share of a folder's pickles, building and running nothing.

    Args:
        folder: Folder that DeepSpeed has written.
        files: From `expected_files`; there must be all of them and no others.

    Raises:
        CheckpointError: One line: which file, and what it would run.
    """
    unexpected = files.keys() ^ {path.name for path in folder.iterdir()}
    if unexpected:
        raise CheckpointError(f"{folder}: {printable(min(unexpected))} is missing or odd: {REMEDY}")
    for name in sorted(files)[dist.rank() :: dist.world_size()]:
        if reason := _refusal(folder / name, files[name]):
            raise CheckpointError(f"{folder / name} {reason}: {REMEDY}")


def _refusal(path: Path, allowed: frozenset[str]) -> str | None:
    try:
        foreign = set(get_unsafe_globals_in_checkpoint(str(path))) - allowed
    except Exception as error:  # torch raises nearly anything on what is no such file
        reason = printable((str(error).splitlines() or [""])[0][:120])
        return f"is not what DeepSpeed writes ({type(error).__name__}: {reason})"
    if foreign:
        names = ", ".join(sorted(printable(name[:120]) for name in foreign)[:4])
        return f"would run {names}, which no checkpoint of this program does"
    return None


def load_safely(files: Mapping[str, frozenset[str]], path: str, map_location: Any = None) -> Any:
    """Load one of ``files`` by torch, calling nothing but what that file may name.

    Raises:
        Exception: What torch raises: it names something else, or is no file of `torch.save`.
    """
    with safe_globals([pkgutil.resolve_name(name) for name in files[Path(path).name]]):
        return torch.load(path, map_location=map_location, weights_only=True)
