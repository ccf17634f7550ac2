"""The machine under a rank: what it has, and whether torch can use its GPU.

Reading the machine is apart from the conclusions, so that these can be tested without a GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path

from vssl_dist.errors import ConfigError
from vssl_dist.jobs.gpu import describe_visible_devices, take_own_gpu

_OLDEST_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""The oldest driver for any program of each major version of CUDA."""
_CPU_REMEDY = (
    "stay on the CPU (device: cpu in the profile, --device cpu, or CUDA_VISIBLE_DEVICES= where "
    "the command chooses)"
)
_KERNEL_MODULE_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of this machine."""

    newest_cuda: tuple[int, int]
    """Newest version of CUDA that the driver supports, as major and minor."""
    release: str = "of an unknown release"
    """Release of the driver, such as ``580.65.06``."""
    num_gpus: int | None = None
    """GPUs that this process may use, whatever CUDA_VISIBLE_DEVICES says; None if unknown."""


@dataclass(frozen=True)
class Wheel:
    """The installed build of torch."""

    version: str
    cuda: str | None
    """Version of CUDA that torch is built for, such as ``13.0``; None: for the CPU alone."""
    nccl: str = ""
    """Version of NCCL that is built into torch."""


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process has taken."""

    name: str
    free_bytes: int
    """Free memory in bytes."""
    total_bytes: int
    """Whole memory in bytes."""
    visible_devices: str
    """Value of CUDA_VISIBLE_DEVICES."""


def read_driver() -> Driver | None:
    """Ask the driver about itself, without touching a GPU; None where there is no driver."""
    try:
        cuda_library = ctypes.CDLL("libcuda.so.1")
        newest_number = ctypes.c_int(0)
        if cuda_library.cuDriverGetVersion(ctypes.byref(newest_number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    newest_cuda = newest_number.value // 1000, newest_number.value % 1000 // 10
    release, num_gpus = _read_nvml()
    return Driver(newest_cuda, release or _read_kernel_module() or Driver.release, num_gpus)


def _read_kernel_module() -> str | None:
    """Read the driver's release from its kernel module: containers may lack NVML."""
    try:
        release_match = re.search(r"\d+\.\d+(\.\d+)?", _KERNEL_MODULE_FILE.read_text())
    except OSError:
        return None
    return release_match and release_match[0]


def _read_nvml() -> tuple[str | None, int | None]:
    """Ask NVML for the release, and the number of GPUs that the kernel lets this process open."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() != 0:
            return None, None
        release_buffer, gpu_count = ctypes.create_string_buffer(96), ctypes.c_uint(0)
        nvml.nvmlSystemGetDriverVersion(release_buffer, len(release_buffer))
        is_counted = nvml.nvmlDeviceGetCount_v2(ctypes.byref(gpu_count)) == 0
        handle_errors = [
            nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(i), ctypes.byref(ctypes.c_void_p()))
            for i in range(gpu_count.value)
        ]
        nvml.nvmlShutdown()
    except (OSError, AttributeError):
        return None, None
    return release_buffer.value.decode() or None, handle_errors.count(0) if is_counted else None


def read_wheel() -> Wheel:
    """Describe the torch that this process has imported, or imports now."""
    import torch

    version, cuda = str(torch.__version__), torch.version.cuda
    if cuda is None:
        return Wheel(version, None)
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    return Wheel(version, cuda, ".".join(map(str, nccl)))


def why_no_cuda(wheel: Wheel, driver: Driver | None) -> str | None:
    """Say in one line why torch cannot use any GPU of this machine; None if it can.

    >>> why_no_cuda(Wheel("2.13.0", "13.0"), Driver((13, 1), "590.44.01", num_gpus=8)) is None
    True
    """
    if wheel.cuda is None:
        return (
            f"torch {wheel.version} is built without CUDA: `make install` from PyPI brings the one "
            f"with it, or {_CPU_REMEDY}"
        )
    cuda_major = int(wheel.cuda.partition(".")[0])
    needed_driver_text = (
        f"torch {wheel.version} is built for CUDA {wheel.cuda} and needs an NVIDIA driver"
    )
    needed_driver_text += (
        f" of {_OLDEST_DRIVERS[cuda_major]} or newer"
        if cuda_major in _OLDEST_DRIVERS
        else f" for CUDA {cuda_major}"
    )
    if driver is None:
        return (
            f"{needed_driver_text}, and here is none (no libcuda.so.1): install one, or "
            f"{_CPU_REMEDY}"
        )
    if driver.newest_cuda[0] < cuda_major:
        return (
            f"{needed_driver_text}, and the one here is {driver.release}, for CUDA "
            f"{driver.newest_cuda[0]}.{driver.newest_cuda[1]} at most: have it "
            f"updated, or {_CPU_REMEDY}"
        )
    if driver.num_gpus == 0:
        return f"the NVIDIA driver shows this process no GPU: ask the scheduler, or {_CPU_REMEDY}"
    return None


def check_device(device: str) -> None:
    """Refuse CUDA where torch cannot use it; the CPU is never refused.

    Raises:
        ConfigError: One line that says what is missing and the remedy.
    """
    if device == "cpu":
        return
    import torch

    if reason := why_no_cuda(read_wheel(), read_driver()):
        raise ConfigError(reason)
    if torch.cuda.device_count() == 0:
        raise ConfigError(
            f"{describe_visible_devices(os.environ)} shows no GPU: list one, or {_CPU_REMEDY}"
        )


def prepare_device(device: str, environ: MutableMapping[str, str]) -> str:
    """Take this rank's GPU before anything else looks for one, and make sure that it works.

    Args:
        device: ``cuda`` or ``cpu``.
        environ: Changed, see `take_own_gpu`; that of this process, as CUDA reads it.

    Returns:
        What this rank runs on, in one line.

    Raises:
        ConfigError: It cannot run on that device; one line says why.
    """
    if device == "cpu":
        return describe_hardware(read_wheel(), None, None)
    wheel, driver = read_wheel(), read_driver()
    if reason := why_no_cuda(wheel, driver):
        raise ConfigError(reason)
    take_own_gpu(environ, driver.num_gpus if driver else None)
    return describe_hardware(wheel, driver, open_gpu(environ["CUDA_VISIBLE_DEVICES"]))


def open_gpu(visible_devices: str) -> Gpu:
    """Ask the GPU for its name and memory; from then on this process uses it.

    Args:
        visible_devices: Value of CUDA_VISIBLE_DEVICES, for messages.

    Raises:
        ConfigError: It does not answer.
    """
    import torch

    try:
        free_bytes, total_bytes = torch.cuda.mem_get_info()
        return Gpu(torch.cuda.get_device_name(), free_bytes, total_bytes, visible_devices)
    except RuntimeError as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={visible_devices}: this GPU cannot be used: {first_line}"
        ) from error


def describe_hardware(wheel: Wheel, driver: Driver | None, gpu: Gpu | None) -> str:
    """Describe in one line what a rank runs on: GPU and driver if any, torch, cores, threads."""
    import torch

    num_cores, num_threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    cores_text = (
        f"{num_cores} core{'s' * (num_cores > 1)}, {num_threads} thread{'s' * (num_threads > 1)}"
    )
    if driver is None or gpu is None:
        return f"CPU, torch {wheel.version}, {cores_text}"
    return (
        f"{gpu.name}, {gpu.total_bytes / 2**30:.1f} GiB ({gpu.free_bytes / 2**30:.1f} free), "
        f"driver {driver.release}, torch {wheel.version} for CUDA {wheel.cuda}, NCCL {wheel.nccl}, "
        f"CUDA_VISIBLE_DEVICES={gpu.visible_devices}, {cores_text}"
    )
