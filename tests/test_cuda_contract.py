"""Every contract of `CudaContract`: what breaks it runs here, is refused there, and stands beside
a neighbour that a GPU takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.support.cuda_contract import CudaContract, Refused
from tests.support.cuda_kernels import CONTRACTS

INT_MAX = 2**31 - 1
HALF = torch.bfloat16


def _saved(x: Tensor, mean: Tensor | None, invstd: Tensor | None, weight: Tensor) -> None:
    zeros, ones = torch.zeros_like(weight), torch.ones_like(weight)
    torch.ops.aten.native_batch_norm_backward(
        x, x, weight, zeros, ones, mean, invstd, False, 1e-5, [True] * 3
    )


def _norm(x: Tensor, saved: torch.dtype | None, weight: torch.dtype = torch.float32) -> None:
    """The backward pass of a batch norm in ``eval``, with moments of dtype ``saved`` or none."""
    w = torch.ones(3, dtype=weight, device=x.device)
    moment = None if saved is None else w.to(saved)
    _saved(x, moment, moment, w)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _channels_last_3d(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ints(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def _halved(net: nn.Module) -> Callable[[], Any]:
    """``net`` on halves, its parameters in float32: what autocast prevents on a GPU."""
    return lambda: net(torch.randn(2, 4, 3, 3, dtype=HALF))


class Counting(nn.Module):
    """Votes of ``dtype`` for classes, counted by a product of one-hot rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, labels: Tensor) -> Tensor:
        rows = F.one_hot(labels, 3).to(self.dtype)
        return rows.T @ rows


class Prototypes(nn.Module):
    """A layer that has left its weights on ``device``."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.weights = torch.empty(3, 4, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weights.T


def _backward(loss: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], None]:
    def step() -> None:
        loss(torch.rand(shape, requires_grad=True)).sum().backward()

    return step


def _in_order(call: Callable[[], Any], *, only: bool = True) -> Callable[[], Any]:
    """``call`` where only deterministic algorithms are allowed."""

    def under_the_rule() -> Any:
        torch.use_deterministic_algorithms(only)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)

    return under_the_rule


def _resized(side: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    image = torch.ones(1, 3, side, side, dtype=dtype)
    return lambda: F.interpolate(image, (2, 2), mode="bilinear", antialias=True)


BROKEN_AND_SOUND: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "saved moments": (
        lambda: _norm(torch.randn(4, 3), None),
        lambda: _norm(torch.randn(4, 3, 2, 2), None),
    ),
    "types of saved moments": (
        lambda: _norm(_meta(4, 3, dtype=HALF), HALF),
        lambda: _norm(_meta(4, 3, dtype=HALF), torch.float32),
    ),
    "types in batch norm": (
        lambda: _norm(_meta(4, 3, dtype=torch.float64), torch.float64),
        lambda: _norm(_meta(4, 3, dtype=HALF), torch.float32, weight=HALF),
    ),
    "layer norm of one type": (_halved(nn.LayerNorm(3)), _halved(nn.LayerNorm(3).to(HALF))),
    "group norm of one type": (_halved(nn.GroupNorm(2, 4)), _halved(nn.GroupNorm(2, 4).to(HALF))),
    "products of integers": (
        lambda: Counting(torch.int64)(torch.tensor([0, 2, 2])),
        lambda: Counting(torch.float32)(torch.tensor([0, 2, 2])),
    ),
    "products of one type": (
        lambda: F.linear(_meta(2, 3, dtype=HALF), _meta(4, 3)),
        lambda: F.linear(_meta(2, 3, dtype=HALF), _meta(4, 3, dtype=HALF)),
    ),
    "convolutions of integers": (
        lambda: F.conv2d(_ints(1, 1, 4, 4), _ints(1, 1, 3, 3)),
        lambda: F.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)),
    ),
    "convolutions of one type": (
        lambda: F.conv2d(_meta(1, 1, 4, 4, dtype=HALF), _meta(1, 1, 3, 3)),
        lambda: F.conv2d(_meta(1, 1, 4, 4, dtype=HALF), _meta(1, 1, 3, 3, dtype=HALF)),
    ),
    "largest of integers": (
        lambda: nn.MaxPool2d(2)(_ints(1, 1, 4, 4)),
        lambda: nn.MaxPool2d(2)(_ints(1, 1, 4, 4).half()),
    ),
    "averages of integers": (
        lambda: nn.AvgPool2d(2)(_ints(1, 1, 4, 4)),
        lambda: nn.AvgPool2d(2)(_ints(1, 1, 4, 4).float()),
    ),
    "bytes between pixels": (_resized(8, torch.uint8), _resized(8)),
    "antialiased far down": (_resized(512), _resized(128)),
    "histogram of halves": (lambda: torch.rand(9).half().histc(), lambda: torch.rand(9).histc()),
    "gamma function of halves": (
        lambda: torch.igamma(torch.rand(3).half(), torch.rand(3).half()),
        lambda: torch.igamma(torch.rand(3), torch.rand(3)),
    ),
    "distances of halves": (
        lambda: torch.cdist(_meta(3, 4, dtype=HALF), _meta(3, 4, dtype=HALF), p=1),
        lambda: torch.cdist(_meta(3, 4), _meta(3, 4), p=1),
    ),
    "decompositions of halves": (
        lambda: torch.linalg.svdvals(_meta(3, 3, dtype=HALF)),
        lambda: torch.linalg.svdvals(_meta(3, 3)),
    ),
    "least squares": (
        lambda: torch.linalg.lstsq(torch.eye(3), torch.ones(3, 1), driver="gelsd"),
        lambda: torch.linalg.lstsq(torch.eye(3), torch.ones(3, 1), driver="gels"),
    ),
    "kernels for the CPU alone": (
        lambda: torch.histogram(torch.rand(9), 3),
        lambda: torch.histc(torch.rand(9), 3),
    ),
    "longest sort": (lambda: _meta(1, INT_MAX + 1).sort(), lambda: _meta(INT_MAX + 1, 1).sort()),
    "longest dot product": (
        lambda: _meta(INT_MAX + 1).dot(_meta(INT_MAX + 1)),
        lambda: _meta(INT_MAX).dot(_meta(INT_MAX)),
    ),
    "types of classes": (
        lambda: F.cross_entropy(_meta(4, 3), _meta(4, dtype=torch.int32)),
        lambda: F.cross_entropy(_meta(4, 3), _meta(4, dtype=torch.int64)),
    ),
    "types of indexed writes": (
        lambda: _meta(4, 3).index_put((_meta(2, dtype=torch.int64),), _meta(2, 3, dtype=HALF)),
        lambda: _meta(4, 3).index_put((_meta(2, dtype=torch.int64),), _meta(2, 3)),
    ),
    "only in any order": (
        _in_order(_backward(lambda x: F.interpolate(x, (2, 2), mode="bicubic"), 1, 1, 4, 4)),
        _in_order(_backward(lambda x: F.interpolate(x, (2, 2), mode="nearest"), 1, 1, 4, 4)),
    ),
    "one device": (lambda: Prototypes("cpu")(_meta(2, 4)), lambda: Prototypes("meta")(_meta(2, 4))),
    "device of indices": (
        lambda: torch.ones(4)[_meta(2, dtype=torch.int64)],
        lambda: _meta(4)[torch.tensor([0, 3])],
    ),
    "device of generators": (
        lambda: torch.randn(3, generator=torch.Generator(), device="meta"),
        lambda: torch.randn(3, generator=torch.Generator()),
    ),
    "sent from the GPU": (lambda: td.all_reduce(torch.ones(2)), lambda: td.all_reduce(_meta(2))),
    "sent whole": (
        lambda: td.all_reduce(_meta(2, 3).T),
        lambda: td.all_reduce(_channels_last(_meta(2, 3, 4, 4))),
    ),
    "types on the wire": (
        lambda: td.all_reduce(_meta(2, dtype=torch.int16)),
        lambda: td.all_reduce(_meta(2, dtype=torch.int32)),
    ),
}
ON_META = {
    "one device", "device of indices", "device of generators", "sent from the GPU", "sent whole",
    "types on the wire", "types of classes", "types of indexed writes",
}  # fmt: skip
"""Those whose calls take ``meta`` for the GPU, and so may meet the host's memory."""


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    td.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    td.destroy_process_group()


def test_each_contract_is_tried() -> None:
    names = [contract.name for contract in CONTRACTS]
    assert len(names) == len(set(names)) >= 12
    assert set(BROKEN_AND_SOUND) == set(names)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_what_a_gpu_refuses_runs_here_and_is_caught_by_its_contract_alone(contract: Any) -> None:
    broken, sound = BROKEN_AND_SOUND[contract.name]
    gpu = "meta" if contract.name in ON_META else "cpu"
    broken()
    with CudaContract(gpu=gpu), pytest.raises(Refused, match=f"{contract.name}: ") as refused:
        broken()
    assert str(refused.value).endswith(f"({contract.source})")
    others = [other for other in CONTRACTS if other is not contract]
    with CudaContract(others, gpu=gpu):
        broken()
    with CudaContract(gpu=gpu):
        sound()


@pytest.mark.parametrize(
    ("refused", "call"),
    [
        (True, lambda: _norm(_channels_last(torch.randn(4, 3, 2, 2)), None)),
        (True, lambda: _norm(torch.randn(4, 3, 1, 1), None)),
        (True, lambda: _norm(_channels_last_3d(_meta(4, 3, 2, 2, 2)), None)),
        (True, lambda: _norm(_meta(2**12, 3, 2**9, 2**9), None)),
        (False, lambda: _norm(torch.randn(4, 3), torch.float32)),
        (False, lambda: _norm(torch.randn(4, 3, 2, 2).flip(1).transpose(2, 3), None)),
        (
            True,
            lambda: F.interpolate(_meta(1, 3, 256, 256), (2, 2), mode="bicubic", antialias=True),
        ),
        (
            False,
            lambda: F.interpolate(_meta(1, 3, 256, 2), (96, 2), mode="bicubic", antialias=True),
        ),
        (True, _in_order(lambda: torch.rand(3).cumsum(0))),
        (False, _in_order(lambda: torch.arange(3).cumsum(0))),
        (True, _in_order(lambda: torch.arange(3).bincount(torch.rand(3)))),
        (False, _in_order(lambda: torch.arange(3).bincount())),
        (False, lambda: torch.rand(3).cumsum(0)),
    ],
)
def test_the_line_between_what_is_refused_and_what_is_taken(
    refused: bool, call: Callable[[], Any]
) -> None:
    call()
    with CudaContract():
        if refused:
            with pytest.raises(Refused):
                call()
        else:
            call()


@pytest.mark.parametrize(
    ("refused", "call"),
    [
        (True, lambda: torch.tensor(0.0).add_(_meta(3).sum())),
        (False, lambda: _meta(3).add_(torch.tensor(1.0))),
        (False, lambda: _meta(3).copy_(torch.ones(3))),
        (True, lambda: F.embedding(torch.tensor([0]), _meta(4, 3))),
        (True, lambda: _meta(4, 3).gather(0, torch.tensor([[0]]))),
        (True, lambda: _meta(4).index_put_((torch.tensor([0]),), torch.ones(1))),
        (False, lambda: _meta(4).index_put_((torch.tensor([0]),), torch.tensor(1.0))),
        (False, lambda: torch.ones(3) + torch.ones(3)),
        (True, lambda: _meta(3).normal_(generator=torch.Generator())),
        (True, lambda: td.broadcast(torch.ones(2), 0)),
        (True, lambda: td.all_gather_single(_meta(4, 3), _meta(3, 2).T)),
        (False, lambda: td.broadcast(_meta(2, dtype=torch.float8_e4m3fn), 0)),
        (False, lambda: td.broadcast(_channels_last_3d(_meta(2, 3, 4, 4, 4)), 0)),
        (
            False,
            lambda: torch._foreach_addcmul_([_meta(3)], [_meta(3)], [_meta(3)], torch.ones(1)),
        ),
    ],
)
def test_only_numbers_copies_and_indices_come_from_the_host(
    refused: bool, call: Callable[[], Any]
) -> None:
    call()
    with CudaContract(gpu="meta"):
        if refused:
            with pytest.raises(Refused):
                call()
        else:
            call()


def test_convolutions_on_meta_have_the_layout_of_cudnn() -> None:
    layouts = []
    for x in (_meta(2, 3, 4, 4), _channels_last(_meta(2, 3, 4, 4))):
        with CudaContract(gpu="meta"):
            y = F.conv2d(x, _meta(5, 3, 1, 1))
        layouts.append(y.is_contiguous(memory_format=torch.channels_last))
    assert layouts == [False, True]
