"""Two gloo ranks against torch's own batch norm on the batch of both."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.cuda_contract import CudaContract, EagerMode
from tests.support.ranks import run_ranks
from vssl_dist import dist
from vssl_dist.models.norm import SyncBatchNorm, synchronise

WORLD = 2


class Case:
    """One layer and the batch that both ranks share."""

    def __init__(self, norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.norm = norm.to(wide)
        if norm.affine:
            nn.init.normal_(norm.weight, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)
        # A mean far beside the deviation: what sums of squares would drown in.
        self.x = (torch.randn(shape, generator=generator) * 2 + 30).to(dtype)
        self.weights = torch.randn(shape, generator=generator).to(dtype)


CASES = {
    "vectors": Case(nn.BatchNorm1d(5), (8, 5), torch.float64),
    "images": Case(nn.BatchNorm2d(5), (8, 5, 3, 4), torch.float64),
    "without affine": Case(nn.BatchNorm1d(5, affine=False), (8, 5), torch.float64),
    "average of all": Case(nn.BatchNorm2d(5, momentum=None), (8, 5, 2, 2), torch.float64),
    "no running stats": Case(nn.BatchNorm1d(5, track_running_stats=False), (8, 5), torch.float64),
    "one row per rank": Case(nn.BatchNorm1d(5), (2, 5), torch.float64),
    "float32": Case(nn.BatchNorm2d(5), (8, 5, 3, 4), torch.float32),
    "bfloat16": Case(nn.BatchNorm2d(5), (8, 5, 3, 4), torch.bfloat16),
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


def _two_steps(norm: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Forward twice (another batch the second time), backward through both; then ``eval``."""
    first = x.clone().requires_grad_()
    second = (x * 1.5 + 1).requires_grad_()
    outputs = norm(first), norm(second)
    loss = sum((output * weights).double().square().sum() for output in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert first.grad is not None
    assert second.grad is not None
    found = {"output": outputs[1].detach(), "grad 1": first.grad, "grad 2": second.grad}
    found |= {name: p.grad for name, p in norm.named_parameters() if p.grad is not None}
    found |= {name: b.clone() for name, b in norm.named_buffers()}
    found["eval"] = norm.eval()(x).detach()
    return found


class SavedMoments(EagerMode):
    """Batch norm's backward pass by the formula of CUDA's kernel for rows and channels_last.

    It reads the saved moments; the CPU's kernel reads the running statistics instead.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.native_batch_norm_backward.default:
            return func(*args, **(kwargs or {}))
        grad, x, weight, _, _, mean, invstd, *_ = args
        across, shape = (0, *range(2, x.dim())), (1, -1, *(1 for _ in range(2, x.dim())))
        grad_bias = grad.to(mean.dtype).sum(across)
        grad_weight = (grad * (x - mean.view(shape))).sum(across) * invstd
        grad_x = grad * (weight * invstd).view(shape)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _on_this_rank() -> bytes:
    found = {}
    for name, case in CASES.items():
        rows = slice(dist.rank() * len(case.x) // WORLD, (dist.rank() + 1) * len(case.x) // WORLD)
        for kernels in (CudaContract(), SavedMoments()):
            net = synchronise(nn.Sequential(copy.deepcopy(case.norm)))
            with kernels:
                steps = _two_steps(net[0], case.x[rows], case.weights[rows])
            found[f"{name}, {type(kernels).__name__}"] = steps
    channels_last = CASES["images"].x.to(memory_format=torch.channels_last)[dist.rank() :: 2]
    layer = synchronise(nn.Sequential(nn.BatchNorm2d(5).double()))
    output = layer(channels_last)
    found["layout"] = {
        "kept": torch.tensor(output.is_contiguous(memory_format=torch.channels_last)),
        "mean": output.mean((0, 2, 3)).detach(),
    }
    return pickle.dumps(found)  # by value: shared tensors would die with this process


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    return [pickle.loads(found) for found in run_ranks(_on_this_rank, WORLD)]


@pytest.mark.parametrize("kernels", [CudaContract, SavedMoments])
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_on_the_global_batch(
    name: str, kernels: type, ranks: list[Any]
) -> None:
    case = CASES[name]
    want = _two_steps(copy.deepcopy(case.norm), case.x, case.weights)
    one, two = (rank[f"{name}, {kernels.__name__}"] for rank in ranks)
    bound = TOLERANCE[case.x.dtype]
    assert set(one) == set(want)
    for key, value in want.items():
        if key in ("output", "grad 1", "grad 2", "eval"):
            got = torch.cat([one[key], two[key]])
        elif key in ("weight", "bias"):
            got = one[key] + two[key]  # the gradient of the sum of both ranks' losses
        else:
            got = one[key]
            assert torch.equal(one[key], two[key]), f"{key} differs between the ranks"
        torch.testing.assert_close(got, value, rtol=bound, atol=bound, msg=lambda m: f"{key}: {m}")  # noqa: B023


def test_statistics_are_global_and_the_memory_layout_stays(ranks: list[Any]) -> None:
    one, two = (rank["layout"] for rank in ranks)
    assert one["kept"]
    assert two["kept"]
    assert one["mean"].abs().min() > 1e-6, "one rank's share is not centred by itself"
    torch.testing.assert_close(one["mean"] + two["mean"], torch.zeros(5, dtype=torch.float64))


def test_one_rank_is_bit_for_bit_plain_batch_norm() -> None:
    case = CASES["float32"]
    want = _two_steps(copy.deepcopy(case.norm), case.x, case.weights)
    got = _two_steps(synchronise(copy.deepcopy(case.norm)), case.x, case.weights)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_replacing_keeps_the_tensors_their_names_and_the_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4, eps=0.1))).eval()
    names, tensors = list(net.state_dict()), [id(p) for p in net.parameters()]
    assert synchronise(net) is net
    assert list(net.state_dict()) == names
    assert [id(p) for p in net.parameters()] == tensors
    norm = net[1][0]
    assert isinstance(norm, SyncBatchNorm)
    assert (norm.eps, norm.training) == (0.1, False)
    assert synchronise(net)[1][0] is norm


def test_norms_that_cannot_be_synchronised_are_refused() -> None:
    class Odd(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Odd is a batch norm that cannot be synchronised"):
        synchronise(nn.Sequential(Odd(3)))
