"""What a section is, and how its steps are timed and their launches counted; needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Results = Iterator[tuple[str, Any]]
"""What a section has measured so far: a name and a value that JSON can hold."""
NUM_KERNELS = 15
"""Kernels of a profile that are named."""


@dataclass(frozen=True)
class Setting:
    """Where and how long a section runs."""

    device: str
    """``"cuda"`` or ``"cpu"``."""
    is_dry: bool
    """Whether sizes are tiny, to see that the section runs at all."""
    end_s: float
    """When to begin nothing more, by `time.monotonic`."""

    @property
    def is_over(self) -> bool:
        """Whether the section's time is used up."""
        return time.monotonic() > self.end_s

    def synchronise(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure_step(step: Callable[[], Any], setting: Setting, repeats: int = 10) -> dict[str, Any]:
    """Time a step, then profile one.

    How long the host takes to issue a step cannot be read off a clock: its queue holds about a
    thousand launches, and a host that is ahead waits for room.  So the share of the time in which
    kernels run tells who waits for whom.

    Args:
        step: What is timed.
        setting: Where it runs; on a CPU operators are counted in place of launches.
        repeats: Steps between two looks at the clock.

    Returns:
        ``step_ms``; ``launches`` of one step; ``kernel_ms``, the sum over its kernels;
        ``busy_share`` of the step in which they run; and the slowest ``kernels``.
    """
    milliseconds = step_ms(step, setting, repeats)
    profiled = profile_step(step, setting)
    busy_share = profiled["kernel_ms"] / milliseconds
    return {"step_ms": milliseconds, "busy_share": busy_share} | profiled


def step_ms(step: Callable[[], Any], setting: Setting, repeats: int = 10) -> float:
    """Milliseconds of a step, from its first launch to the device's last result."""
    warm_up, repeats = (1, 1) if setting.is_dry else (3, repeats)
    for _ in range(warm_up):
        step()
    setting.synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    setting.synchronise()
    return 1000 * (time.perf_counter() - start) / repeats


def profile_step(step: Callable[[], Any], setting: Setting) -> dict[str, Any]:
    """Launches of one step, and the kernels that take most of it; see `measure_step`."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = setting.device == "cuda"
    step()
    setting.synchronise()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as profiler:
        step()
        setting.synchronise()
    averages: Sequence[Any] = profiler.key_averages()
    word = "LaunchKernel" if on_gpu else "aten::"
    launches = sum(average.count for average in averages if word in average.key)
    if on_gpu:
        # Ranges that someone named, such as an optimizer's step, hold kernels that are listed too.
        kernels = [
            a
            for a in averages
            if "CUDA" in str(a.device_type)
            and not getattr(a, "is_user_annotation", False)
            and not a.key.startswith("Optimizer.")
        ]
        ms_by_name = {a.key: a.self_device_time_total / 1000 for a in kernels}
    else:
        ms_by_name = {a.key: a.self_cpu_time_total / 1000 for a in averages}
    slowest = sorted(ms_by_name.items(), key=lambda item: -item[1])[:NUM_KERNELS]
    return {
        "launches": launches,
        "kernel_ms": sum(ms_by_name.values()),
        "kernels": {name[:120]: round(ms, 4) for name, ms in slowest},
    }


def as_error(error: BaseException) -> dict[str, str]:
    """The result of a measurement that ended in an error: its first line."""
    text = str(error).strip().partition("\n")[0]
    return {"error": f"{type(error).__name__}: {text}"[:300]}
