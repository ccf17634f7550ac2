"""Rates of plain networks and their bits from run to run; needs torch and our modules alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.nets import build_net, two_view_loss
from bench.gpu.section import Results, Setting, as_error, measure_step
from vssl_dist.models.determinism import select_kernels


@dataclass(frozen=True)
class Case:
    """One way to train one network."""

    net: str
    rows: int
    deterministic: bool = True
    channels_last: bool = True
    compile: bool = False


_RESNET_CASES = (
    Case("resnet50", 256), Case("resnet50", 256, deterministic=False), Case("resnet50", 64),
    Case("resnet50", 32), Case("resnet50", 512), Case("resnet50", 256, channels_last=False),
    Case("resnet50", 64, deterministic=False), Case("resnet50", 32, deterministic=False),
    Case("resnet50", 256, deterministic=False, channels_last=False),
)  # fmt: skip
_VIT_CASES = (
    Case("vit_small", 256), Case("vit_small", 256, deterministic=False), Case("vit_small", 64),
    Case("vit_small", 32), Case("vit_small", 512),
)  # fmt: skip
_COMPILED_CASES = (
    Case("resnet50", 64, compile=True), Case("vit_small", 64, compile=True),
    Case("resnet50", 256, deterministic=False, compile=True),
)  # fmt: skip
_TINY_CASES = (Case("resnet50", 4), Case("vit_small", 4, deterministic=False))


def measure_models(setting: Setting) -> Results:
    """Images (of two views) per second of forward, backward and SGD in bfloat16; most wanted first.

    ``peak_gib`` is what torch had allocated at most.
    """
    cases = _TINY_CASES if setting.is_dry else _RESNET_CASES + _VIT_CASES + _COMPILED_CASES
    for case in cases:
        if setting.is_over:
            return
        name = "/".join(f"{value}" for value in asdict(case).values())
        try:
            yield name, asdict(case) | _measure_case(case, setting)
        except Exception as error:
            yield name, asdict(case) | as_error(error)


def _measure_case(case: Case, setting: Setting) -> dict[str, Any]:
    side = 32 if setting.is_dry else 224
    select_kernels(case.deterministic, setting.device)
    views = _views([side, side], case, setting)
    net: Any = build_net(case.net, side, setting.is_dry).to(setting.device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)
    if case.compile:
        net = torch.compile(net)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device, torch.bfloat16):
            loss = two_view_loss(net, views)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    on_gpu = setting.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    figures = measure_step(step, setting)
    figures["images_per_s"] = 1000 * case.rows / figures["step_ms"]
    if on_gpu:
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def _views(sides: Sequence[int], case: Case, setting: Setting) -> list[Tensor]:
    views = [torch.randn(case.rows, 3, side, side, device=setting.device) for side in sides]
    if case.channels_last:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    return views


def compare_bits(setting: Setting) -> Results:
    """Whether two trainings from one seed end in the same bits.

    ``vit_small, crops`` also sees images of another size, to which its positions are resized.
    """
    for deterministic in (True, False):
        for name, crop in (("resnet50", 1.0), ("vit_small", 1.0), ("vit_small", 0.5)):
            if setting.is_over:
                return
            title = f"{name}{', crops' if crop < 1 else ''}, deterministic={deterministic}"
            try:
                states = [_trained_state(name, crop, deterministic, setting) for _ in range(2)]
                is_equal = all(map(torch.equal, *states))
                yield title, "equal" if is_equal else "differ"
            except Exception as error:
                yield title, as_error(error)


def _trained_state(name: str, crop: float, deterministic: bool, setting: Setting) -> list[Tensor]:
    side, rows, steps = (32, 4, 2) if setting.is_dry else (224, 64, 5)
    select_kernels(deterministic, setting.device)
    torch.manual_seed(0)
    net = build_net(name, side, setting.is_dry).to(setting.device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        views = _views([side, int(side * crop)], Case(name, rows), setting)
        optimizer.zero_grad()
        with torch.autocast(setting.device, torch.bfloat16):
            loss = two_view_loss(net, views)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return list(net.state_dict().values())
