"""Loss and backward of the recipes as rank 0 of 64 GPUs meets them, on a machine without any.

Whole networks on ``meta``, a process group that only pretends, and `CudaContract` around it all:
every call that a CUDA kernel would refuse is an error here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.cuda_autocast import autocast_of_cuda
from bench.sync_norm_reference import registered_kernels
from tests.support.cuda_contract import CudaContract, EagerMode, Refused
from vssl_dist import config
from vssl_dist.config import OnlineConfig
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.methods.base import MicroStep
from vssl_dist.models.norm import SyncBatchNorm, synchronise
from vssl_dist.online_probe import OnlineProbe
from vssl_dist.optim import build_optimizer
from vssl_dist.teacher import Teacher

WORLD = 64
FILES = {path.stem: path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")}
FAST = sorted(name for name in FILES if name.startswith(("cifar10_", "in1k_")))
REST = sorted(set(FILES) - set(FAST))
NAMES = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)]
ALWAYS_FUSED = {"in1k_dino"} | {
    f"{dataset}_{method}"
    for dataset in ("cifar10", "cifar100", "stl10")
    for method in ("dino", "supervised")
}
"""A ViT without batch norm, and ResNets without any in their heads, not in channels_last."""
FLAT_NORMS = {
    "in1k_vje": 108, "in1k_vssl": 110, "in1k_byol": 110, "in1k_simclr": 110, "in1k_vicreg": 110,
    "in1k_moco_v3": 112, "in1k_barlow_twins": 112, "in1k_simsiam": 114, "in1k_supervised": 53,
    "in1k_moco_v3_vit_s": 10, "in1k_dino": 0,
}  # fmt: skip
"""Calls in one step: a ResNet-50 has 53 per view, the rest stand in heads."""


class MetaNoise:
    """Draws that take no memory."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, device="meta")


@dataclass(frozen=True)
class Step:
    """What one recipe's loss and backward did."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    trained_norms: int
    """Views that synchronised norms saw through which a gradient flows."""
    flat_norms: int
    """Those whose values of one place lie side by side: rows, or images in channels_last."""
    calls: Counter[str]
    """Calls in the backward pass."""
    refusal_of_old: str | None
    """Why a GPU refuses the backward pass as it once was."""


@pytest.fixture(scope="module", autouse=True)
def _many_gpus() -> Iterator[None]:
    td.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    td.destroy_process_group()
    step.cache_clear()


@cache
def step(name: str, cuda_kernels: bool = True) -> Step:
    """Loss and backward of the recipe ``name`` on one of `WORLD` GPUs.

    ``cuda_kernels``: as on GPUs today; without, as it once was there and is on CPUs.
    """
    cfg = config.load(FILES[name], methods=CONFIGS)
    rows = max(cfg.optim.global_batch // (WORLD * cfg.optim.accumulate), 1)
    with torch.device("meta"):
        method = build_method(cfg.method, cfg.data.image_size, cfg.data.sides)
        views = [torch.empty(rows, 3, side, side) for side in cfg.data.sides]
        labels = torch.empty(rows, dtype=torch.int64)
    if cfg.engine.channels_last:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    student = method.student = synchronise(method.student).train()
    layouts: list[bool] = []
    for layer in (*student.modules(), *(method.teacher.modules() if method.teacher else ())):
        if isinstance(layer, SyncBatchNorm):
            layer.cuda_kernels = cuda_kernels
    for layer in student.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.register_forward_pre_hook(
                lambda norm, inputs: layouts.extend([_flat(inputs[0])] * norm.views)
            )
    with registered_kernels("Meta"), CudaContract(gpu="meta") as gpu:
        teacher = None
        if method.teacher is not None:
            method.teacher = synchronise(method.teacher).train()
            teacher = Teacher(method.teacher, student)
        if cfg.engine.autocast != "none":
            for net in filter(None, (student, method.teacher)):
                autocast_of_cuda(net)
        out = method.loss(views, MicroStep(MetaNoise(), 1.0, labels))
        refusal = None if cuda_kernels or not layouts else _refusal_as_it_was(out.loss)
        student.zero_grad()
        gpu.calls.clear()
        out.loss.backward()
        if teacher is not None:
            teacher.update(0.99)
    return Step(
        out.loss,
        {n: p.grad for n, p in student.named_parameters() if p.requires_grad},
        len(layouts),
        sum(layouts),
        gpu.calls.copy(),
        refusal,
    )


def _flat(x: Tensor) -> bool:
    return x.stride(1) == 1


def _refusal_as_it_was(loss: Tensor) -> str | None:
    """Why the backward pass is refused that hands the kernel no saved moments."""
    with _WithoutMoments():
        try:
            loss.backward(retain_graph=True)
        except Refused as refused:
            return str(refused)
    return None


class _WithoutMoments(EagerMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            args = (*args[:5], None, None, *args[7:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_takes_every_call_of_loss_and_backward(name: str) -> None:
    done = step(name)
    assert done.loss.dtype == torch.float32
    assert {g.dtype for g in done.gradients.values() if g is not None} == {torch.float32}
    assert [n for n, g in done.gradients.items() if g is None] == []
    for kernel in ("batch_norm_backward_reduce", "batch_norm_backward_elemt"):
        assert done.calls[f"aten::{kernel}"] == done.trained_norms, "a batch norm was not looked at"
    assert done.calls["aten::native_batch_norm_backward"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_with_deterministic_algorithms_a_gpu_takes_every_call_too(name: str) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        done = step.__wrapped__(name)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [n for n, g in done.gradients.items() if g is None] == []


@pytest.mark.parametrize("name", NAMES)
def test_without_saved_moments_it_refused_each_network_with_a_flat_norm(name: str) -> None:
    done = step(name, cuda_kernels=False)
    assert done.calls["aten::native_batch_norm_backward"] == done.trained_norms
    assert done.flat_norms == FLAT_NORMS.get(name, done.flat_norms)
    assert (done.refusal_of_old is None) == (done.flat_norms == 0) == (name in ALWAYS_FUSED)
    if done.refusal_of_old is not None:
        assert "saved moments: save_mean and save_invstd" in done.refusal_of_old
        assert "Normalization.cu" in done.refusal_of_old


@pytest.mark.parametrize("name", ["cifar10_simsiam", "in1k_vje", "in1k_byol"])
def test_a_gpu_takes_every_call_of_the_optimizers(name: str) -> None:
    optim = config.load(FILES[name], methods=CONFIGS).optim
    with torch.device("meta"):
        student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    for parameter in student.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer = build_optimizer(optim, student)
    with CudaContract(gpu="meta") as gpu:
        optimizer.step()
        optimizer.step()
    assert gpu.calls


def test_a_gpu_takes_every_call_of_the_online_probe() -> None:
    probe = OnlineProbe(OnlineConfig(), classes=10, total_steps=2)
    features = torch.empty(8, 16, device="meta", dtype=torch.bfloat16)
    labels = torch.empty(8, dtype=torch.int64, device="meta")
    with CudaContract(gpu="meta") as gpu:
        probe.step(features, labels, 1)
        probe.step(features, labels, 2)
    assert gpu.calls["c10d::allgather_"] == 4
