"""The choice of one GPU for each rank among those that a job has on a node."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from vssl_dist.errors import ConfigError

_ORDINAL = re.compile(r"\s*([+-]?\d+)")


def visible_gpus(devices: str) -> list[str]:
    """List the GPUs that a value of CUDA_VISIBLE_DEVICES lets CUDA see, by their names in it.

    CUDA reads numbers, or names that begin with ``GPU-`` or ``MIG-``, up to the first that is
    none, and sees nothing where one stands twice.

    >>> visible_gpus("4, 6,-1,7"), visible_gpus("MIG-a,MIG-b"), visible_gpus("NoDevFiles")
    (['4', '6'], ['MIG-a', 'MIG-b'], [])
    """
    prefix = next((prefix for prefix in ("GPU-", "MIG-") if devices.startswith(prefix)), "")
    names: list[str] = []
    for word in devices.split(","):
        ordinal = _ORDINAL.match(word)
        if prefix and word.strip().startswith(prefix):
            name = word.strip()
        elif not prefix and ordinal and int(ordinal[1]) >= 0:
            name = str(int(ordinal[1]))
        else:
            break
        if name in names:
            return []
        names.append(name)
    return names


def take_own_gpu(environ: MutableMapping[str, str], present: int | None = None) -> None:
    """Have this process see one GPU only, its share of those that the job has on this node.

    It is device 0 then, and LOCAL_RANK, by which DeepSpeed takes its GPU, becomes 0.  Where a
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
    local_rank = environ.get("LOCAL_RANK", "")
    if not local_rank.isdecimal():
        raise ConfigError(
            f"LOCAL_RANK={local_rank!r} is not the number of a rank on its node, by which it takes "
            "its GPU: start ranks with launch/submit.py"
        )
    position = int(local_rank)
    devices = environ.get("CUDA_VISIBLE_DEVICES")
    size = environ.get("LOCAL_WORLD_SIZE", "")
    ranks = max(position + 1, int(size) if size.isdecimal() else 0)
    if devices is not None:
        names = visible_gpus(devices)
    else:
        names = [local_rank] if present is None else [str(gpu) for gpu in range(present)]
    if len(names) < ranks and len(names) != 1:
        count = f"{len(names)} GPUs" if names else "no GPU"
        raise ConfigError(
            f"{visible_devices(environ)} shows {count} to LOCAL_RANK={position}, and this node has "
            f"{ranks} rank{'s' * (ranks > 1)}: show each rank its own GPU alone, or all of them to "
            "all (--gpu-bind and --gpus-per-task hide some), or use fewer ranks_per_node"
        )
    environ["CUDA_VISIBLE_DEVICES"] = names[position] if position < len(names) else names[0]
    environ["LOCAL_RANK"] = "0"


def visible_devices(environ: Mapping[str, str]) -> str:
    """Return CUDA_VISIBLE_DEVICES with its value, for a message."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES ({'unset' if value is None else repr(value)})"
