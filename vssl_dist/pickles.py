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
from vssl_dist.sealed import CHECKPOINT_REMEDY
from vssl_dist.text import printable

_EXTRA_MODEL_GLOBALS: frozenset[str] = frozenset()
_EXTRA_SHARD_GLOBALS = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)
EXTRA_GLOBALS_BY_ZERO_STAGE: Mapping[int, Mapping[str, frozenset[str]]] = {
    0: {"model": _EXTRA_MODEL_GLOBALS},
    1: {"model": _EXTRA_MODEL_GLOBALS, "shard": _EXTRA_SHARD_GLOBALS},
    2: {"model": _EXTRA_MODEL_GLOBALS, "shard": _EXTRA_SHARD_GLOBALS},
}
"""Globals that a file may name beyond those that torch holds for safe, by ZeRO stage and kind of
file: the same in float32 and under autocast, for every optimizer."""


def allowed_globals_by_file(world_size: int, zero_stage: int) -> dict[str, frozenset[str]]:
    """Return the files that DeepSpeed writes, and the globals that each may name.

    >>> [len(names) for names in allowed_globals_by_file(world_size=2, zero_stage=1).values()]
    [0, 3, 3]
    """
    globals_by_kind = EXTRA_GLOBALS_BY_ZERO_STAGE[zero_stage]
    globals_by_file = {"mp_rank_00_model_states.pt": globals_by_kind["model"]}
    if "shard" in globals_by_kind:
        shard_file_names = (
            f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world_size)
        )
        globals_by_file |= dict.fromkeys(shard_file_names, globals_by_kind["shard"])
    return globals_by_file


def check_pickle_globals(folder: Path, globals_by_file: Mapping[str, frozenset[str]]) -> None:
    """Look through this rank's share of a folder's pickles, building and running nothing.

    Args:
        folder: Folder that DeepSpeed has written.
        globals_by_file: From `allowed_globals_by_file`; there must be all of them and no others.

    Raises:
        CheckpointError: One line: which file, and what it would run.
    """
    unexpected_names = globals_by_file.keys() ^ {path.name for path in folder.iterdir()}
    if unexpected_names:
        raise CheckpointError(
            f"{folder}: {printable(min(unexpected_names))} is missing or odd: {CHECKPOINT_REMEDY}"
        )
    for name in sorted(globals_by_file)[dist.rank() :: dist.world_size()]:
        if reason := _why_refused(folder / name, globals_by_file[name]):
            raise CheckpointError(f"{folder / name} {reason}: {CHECKPOINT_REMEDY}")


def _why_refused(path: Path, allowed_globals: frozenset[str]) -> str | None:
    try:
        foreign_globals = set(get_unsafe_globals_in_checkpoint(str(path))) - allowed_globals
    except Exception as error:  # torch raises nearly anything on what is no such file
        reason = printable((str(error).splitlines() or [""])[0][:120])
        return f"is not what DeepSpeed writes ({type(error).__name__}: {reason})"
    if foreign_globals:
        shown_globals = ", ".join(sorted(printable(name[:120]) for name in foreign_globals)[:4])
        return f"would run {shown_globals}, which no checkpoint of this program does"
    return None


def load_with_allowed_globals(
    globals_by_file: Mapping[str, frozenset[str]], path: str, map_location: Any = None
) -> Any:
    """Load one of ``globals_by_file`` by torch, calling nothing but what that file may name.

    Raises:
        Exception: What torch raises: it names something else, or is no file of `torch.save`.
    """
    with safe_globals([pkgutil.resolve_name(name) for name in globals_by_file[Path(path).name]]):
        return torch.load(path, map_location=map_location, weights_only=True)
