"""Deterministic kernels on a GPU: who sets them, and what stands in where torch has none."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.cuda_contract import CudaContract, Refused
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.determinism import resize_by_products, select_kernels

VIT = "vit_tiny_patch16_224"


@pytest.fixture(autouse=True)
def _flags_as_they_were() -> Iterator[None]:
    deterministic, benchmark = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, benchmark


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    return monkeypatch


@pytest.mark.parametrize("deterministic", [True, False])
def test_on_cuda_all_flags_follow_the_key(
    deterministic: bool, environment: pytest.MonkeyPatch
) -> None:
    select_kernels(deterministic, "cuda")
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic == deterministic
    assert torch.backends.cudnn.benchmark != deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic


def test_a_workspace_that_the_user_chose_stays(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    select_kernels(True, "cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_on_a_cpu_no_operation_changes(environment: pytest.MonkeyPatch) -> None:
    select_kernels(True, "cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


@pytest.mark.parametrize("size", [(6, 6), (2, 9), (20, 14), (14, 14)])
def test_resizing_by_products_is_torchs_own_and_so_is_its_gradient(size: tuple[int, int]) -> None:
    image = torch.randn(1, 5, 14, 14, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(1, 5, *size, dtype=torch.float64)
    theirs = F.interpolate(image, size, mode="bicubic", antialias=True)
    (their_gradient,) = torch.autograd.grad(theirs, image, gradient)
    ours = resize_by_products(image, size)
    (our_gradient,) = torch.autograd.grad(ours, image, gradient)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=0, atol=1e-12)


def _vit() -> Any:
    torch.manual_seed(0)
    return build_backbone(VIT, 64, any_size=True)[0].eval()


def _crop_gradients(vit: Any, images: torch.Tensor) -> list[torch.Tensor]:
    vit.zero_grad()
    vit(images).square().sum().backward()
    return [p.grad.clone() for p in vit.parameters() if p.grad is not None]


def test_a_vit_resizes_its_positions_deterministically_where_that_is_asked() -> None:
    vit, crops = _vit(), torch.randn(2, 3, 32, 32)
    usual = vit(crops)
    usual_gradients = _crop_gradients(vit, crops)
    with CudaContract() as gpu:
        _crop_gradients(vit, crops)
    assert gpu.calls["aten::_upsample_bicubic2d_aa_backward"] == 1
    torch.use_deterministic_algorithms(True)
    with CudaContract() as gpu:
        gradients = _crop_gradients(vit, crops)
    assert gpu.calls["aten::_upsample_bicubic2d_aa_backward"] == 0
    torch.testing.assert_close(vit(crops), usual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, usual_gradients, rtol=1e-4, atol=1e-4)


def test_without_it_a_vit_would_be_refused() -> None:
    vit, crops = _vit(), torch.randn(2, 3, 32, 32)
    del vit._pos_embed
    torch.use_deterministic_algorithms(True)
    with CudaContract(), pytest.raises(Refused, match="only in any order"):
        _crop_gradients(vit, crops)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_copy_of_a_vit_uses_its_own_positions(deterministic: bool) -> None:
    vit, crops = _vit(), torch.randn(2, 3, 32, 32)
    teacher = copy.deepcopy(vit)
    torch.use_deterministic_algorithms(deterministic)
    before = teacher(crops)
    with torch.no_grad():
        vit.pos_embed.add_(torch.randn_like(vit.pos_embed))
    assert torch.equal(teacher(crops), before)
    assert not torch.allclose(vit(crops), before)
