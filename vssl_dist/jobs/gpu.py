"""The choice of one GPU for each rank among those that a job has on a node."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from vssl_dist.errors import ConfigError

_GPU_NUMBER = re.compile(r"\s*([+-]?\d+)")


def visible_gpus(devices_value: str) -> list[str]:
    """List the GPUs that a value of CUDA_VISIBLE_DEVICES lets CUDA see, by their names in it.

    CUDA reads numbers, or names that begin with ``GPU-`` or ``MIG-``, up to the first that is
    none, and sees nothing where one stands twice.

    >>> visible_gpus("4, 6,-1,7"), visible_gpus("MIG-a,MIG-b"), visible_gpus("NoDevFiles")
    (['4', '6'], ['MIG-a', 'MIG-b'], [])
    """
    name_prefix = next(
        (name_prefix for name_prefix in ("GPU-", "MIG-") if devices_value.startswith(name_prefix)),
        "",
    )
    names: list[str] = []
    for entry in devices_value.split(","):
        number_match = _GPU_NUMBER.match(entry)
        if name_prefix and entry.strip().startswith(name_prefix):
            name = entry.strip()
        elif not name_prefix and number_match and int(number_match[1]) >= 0:
            name = str(int(number_match[1]))
        else:
            break
        if name in names:
            return []
        names.append(name)
    return names


def take_own_gpu(environ: MutableMapping[str, str], num_gpus: int | None = None) -> None:
    """Have this process see one GPU only, its share of those that the job has on this node.

    It is device 0 then, and LOCAL_RANK, by which DeepSpeed takes its GPU, becomes 0.  Where a
    site shows each rank a single GPU, that is its own, whatever the rank's number.

    Args:
        environ: With LOCAL_RANK, and where it is known LOCAL_WORLD_SIZE; changed.
        num_gpus: GPUs of this node; None: nobody knows.

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
    gpu_index = int(local_rank)
    devices_value = environ.get("CUDA_VISIBLE_DEVICES")
    local_world_size = environ.get("LOCAL_WORLD_SIZE", "")
    num_ranks = max(gpu_index + 1, int(local_world_size) if local_world_size.isdecimal() else 0)
    if devices_value is not None:
        gpu_names = visible_gpus(devices_value)
    else:
        gpu_names = [local_rank] if num_gpus is None else [str(gpu) for gpu in range(num_gpus)]
    if len(gpu_names) < num_ranks and len(gpu_names) != 1:
        gpus_text = f"{len(gpu_names)} GPUs" if gpu_names else "no GPU"
        raise ConfigError(
            f"{describe_visible_devices(environ)} shows {gpus_text} to LOCAL_RANK={gpu_index}, "
            f"and this node has {num_ranks} rank{'s' * (num_ranks > 1)}: show each rank its own "
            "GPU alone, or all of them to all (--gpu-bind and --gpus-per-task hide some), or use "
            "fewer ranks_per_node"
        )
    environ["CUDA_VISIBLE_DEVICES"] = (
        gpu_names[gpu_index] if gpu_index < len(gpu_names) else gpu_names[0]
    )
    environ["LOCAL_RANK"] = "0"


def describe_visible_devices(environ: Mapping[str, str]) -> str:
    """Return CUDA_VISIBLE_DEVICES with its value, for a message."""
    value = environ.get("CUDA_VISIBLE_DEVICES")
    return f"CUDA_VISIBLE_DEVICES ({'unset' if value is None else repr(value)})"
