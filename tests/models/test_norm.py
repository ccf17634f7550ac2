"""Two gloo ranks against torch's own batch norm on the batch of both."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.sync_norm_reference import registered_kernels
from tests.support.cuda_contract import CudaContract, EagerMode
from tests.support.ranks import run_ranks
from vssl_dist import dist
from vssl_dist.models.norm import SyncBatchNorm, synchronise, views_in_batch

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
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}


def _two_steps(
    norm: nn.Module, x: Tensor, weights: Tensor, *, together: bool = False
) -> dict[str, Tensor]:
    """Forward twice (another batch the second time), backward through both; then ``eval``.

    ``together``, both are views in one batch.
    """
    first = x.clone().requires_grad_()
    second = (x * 1.5 + 1).requires_grad_()
    if together:
        with views_in_batch(norm, 2):
            outputs = norm(torch.cat([first, second])).chunk(2)
    else:
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


class CudaKernels(CudaContract):
    """torch's kernels for CUDA, from their formulas."""

    def __enter__(self) -> Any:
        self._kernels = registered_kernels("CPU")
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._kernels.__exit__(*error)


KERNELS = (CudaContract, SavedMoments, CudaKernels)


def _layout_of(cuda_kernels: bool) -> dict[str, Tensor]:
    """Whether channels_last in is channels_last out, forward and backward, for two views."""
    x = CASES["images"].x.to(memory_format=torch.channels_last)[dist.rank() :: WORLD]
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = synchronise(nn.Sequential(nn.BatchNorm2d(5).double()))
    layer[0].cuda_kernels = cuda_kernels
    with views_in_batch(layer, 2), CudaKernels():
        output = layer(x)
        (output * torch.rand_like(output)).sum().backward()
    assert x.grad is not None
    layouts = [t.is_contiguous(memory_format=torch.channels_last) for t in (output, x.grad)]
    with CudaKernels():
        mean = layer(x.detach()).mean((0, 2, 3)).detach()
    return {"kept": torch.tensor(layouts), "mean": mean}


def _on_this_rank() -> bytes:
    found = {}
    for (name, case), kernels, together in product(CASES.items(), KERNELS, (False, True)):
        rows = slice(dist.rank() * len(case.x) // WORLD, (dist.rank() + 1) * len(case.x) // WORLD)
        norm = synchronise(nn.Sequential(copy.deepcopy(case.norm)))[0]
        norm.cuda_kernels = kernels is CudaKernels
        with kernels():
            steps = _two_steps(norm, case.x[rows], case.weights[rows], together=together)
        found[f"{name}, {kernels.__name__}, {together}"] = steps
    found |= {f"layout, {cuda}": _layout_of(cuda) for cuda in (False, True)}
    return pickle.dumps(found)  # by value: shared tensors would die with this process


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, Tensor]]]:
    return [pickle.loads(found) for found in run_ranks(_on_this_rank, WORLD)]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_on_the_global_batch(
    name: str, kernels: type, together: bool, ranks: list[Any]
) -> None:
    case = CASES[name]
    want = _two_steps(copy.deepcopy(case.norm), case.x, case.weights)
    one, two = (rank[f"{name}, {kernels.__name__}, {together}"] for rank in ranks)
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


@pytest.mark.parametrize("cuda_kernels", [False, True])
def test_statistics_are_global_and_the_memory_layout_stays(
    cuda_kernels: bool, ranks: list[Any]
) -> None:
    one, two = (rank[f"layout, {cuda_kernels}"] for rank in ranks)
    assert one["kept"].all()
    assert two["kept"].all()
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
