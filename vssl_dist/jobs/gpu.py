"""Which of the GPUs that a job has on a node is a rank's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from vssl_dist.errors import ConfigError

_ORDINAL = re.compile(r"\s*([+-]?\d+)")


def visible(devices: str) -> list[str]:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES lets CUDA see, by their names in it.

    CUDA reads numbers, or names that begin with ``GPU-`` or ``MIG-``, up to the first that is
    none, and sees nothing where one stands twice.

    >>> visible("4, 6,-1,7"), visible("MIG-a,MIG-b"), visible("NoDevFiles")
    (['4', '6'], ['MIG-a', 'MIG-b'], [])
    """
    kind = next((prefix for prefix in ("GPU-", "MIG-") if devices.startswith(prefix)), "")
    names: list[str] = []
    for word in devices.split(","):
        ordinal = _ORDINAL.match(word)
        if kind and word.strip().startswith(kind):
            name = word.strip()
        elif not kind and ordinal and int(ordinal[1]) >= 0:
            name = str(int(ordinal[1]))
        else:
            break
        if name in names:
            return []
        names.append(name)
    return names


def take_own_gpu(environ: MutableMapping[str, str], present: int | None = None) -> None:
    """Leave this process one GPU, its own among those that the job has on this node.

    It is device 0 then, and DeepSpeed, which takes the GPU of that number, is told so.  Where a
    site shows each rank a single GPU, that is its own, whatever the rank's number.

    Args:
        environ: With LOCAL_RANK, and where it is known LOCAL_WORLD_SIZE; changed.
        present: GPUs of this node; None: nobody knows.

    Raises:
        ConfigError: There are more ranks than GPUs to share out.

    >>> environ = {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}
    >>> take_own_gpu(environ)
    >>> environ
    {'LOCAL_RANK': '0', 'CUDA_VISIBLE_DEVICES': '6'}
    """
    rank = environ.get("LOCAL_RANK", "")
    if not rank.isdecimal():
        raise ConfigError(
            f"LOCAL_RANK={rank!r} is not the number of a rank on its node, by which it takes its "
            "GPU: start ranks with launch/submit.py"
        )
    own, value = int(rank), environ.get("CUDA_VISIBLE_DEVICES")
    size = environ.get("LOCAL_WORLD_SIZE", "")
    ranks = max(own + 1, int(size) if size.isdecimal() else 0)
    if value is not None:
        names = visible(value)
    else:
        names = [rank] if present is None else [str(gpu) for gpu in range(present)]
    if len(names) < ranks and len(names) != 1:
        count = f"{len(names)} GPUs" if names else "no GPU"
        raise ConfigError(
            f"{listed(environ)} shows {count} to LOCAL_RANK={own}, and this node has {ranks} "
            f"rank{'s' * (ranks > 1)}: show each rank its own GPU alone, or all of them to all "
            "(--gpu-bind and --gpus-per-task hide some), or use fewer ranks_per_node"
        )
    environ["CUDA_VISIBLE_DEVICES"] = names[own] if own < len(names) else names[0]
    environ["LOCAL_RANK"] = "0"


def listed(environ: Mapping[str, str]) -> str:
    """CUDA_VISIBLE_DEVICES, for a message."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES ({'unset' if value is None else repr(value)})"
