"""Synchronised batch norm, launches and LARS; needs torch and this project's modules alone."""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn

from bench.gpu.nets import build_net, two_view_loss
from bench.gpu.section import Results, Setting, as_error, measure_step
from vssl_dist.models.norm import synchronise
from vssl_dist.optim import build_optimizer

NUM_FAKE_RANKS = 64
_BN_CASES = ("rows", "NCHW", "channels_last")
_TIMEOUT_S = 60


def measure_machine(setting: Setting) -> Results:
    """What everything else ran on."""
    yield "torch", torch.__version__
    yield "cuda", torch.version.cuda
    yield "threads", torch.get_num_threads()
    if setting.device == "cuda":
        yield "gpu", torch.cuda.get_device_name()
        yield "memory_gib", torch.cuda.get_device_properties(0).total_memory / 2**30
        yield "cudnn", torch.backends.cudnn.version()  # type: ignore[no-untyped-call]


def compare_sync_bn(setting: Setting) -> Results:
    """Two gloo ranks on the one device against `nn.BatchNorm` on the whole batch in float64.

    Each value is the largest difference over both ranks; ``torch`` is `nn.SyncBatchNorm`.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes: list[Connection] = []
        processes = []
        for rank in range(2):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_one_rank,
                args=(writer, rank, Path(folder) / "store", setting.device, setting.is_dry),
                daemon=True,
            )
            process.start()
            writer.close()
            processes.append(process)
            pipes.append(reader)
        try:
            while True:
                name, value = pipes[0].recv()
                yield name, value
        except EOFError:
            pass
        finally:
            for process in processes:
                process.join(5)
                process.kill()
    if processes[0].exitcode:
        raise RuntimeError(f"rank 0 ended with {processes[0].exitcode}")


def _name_collectives_as_new() -> None:
    """Give torch before 2.13 the name by which it now calls a collective that it has."""
    if not hasattr(td, "all_gather_single"):
        td.all_gather_single = td.all_gather_into_tensor


def _one_rank(pipe: Connection, rank: int, store: Path, device: str, is_dry: bool) -> None:
    torch.set_num_threads(1)
    _name_collectives_as_new()
    td.init_process_group(
        "gloo", f"file://{store}", timedelta(seconds=_TIMEOUT_S), rank=rank, world_size=2
    )
    for dtype in (torch.float32, torch.bfloat16):
        for layout in _BN_CASES:
            for owner in ("ours", "torch") if device == "cuda" else ("ours",):
                name = f"{owner}/{layout}/{str(dtype).removeprefix('torch.')}"
                try:
                    pipe.send((name, _bn_differences(owner, layout, dtype, device, is_dry)))
                except Exception as error:  # the next case may still run
                    pipe.send((name, as_error(error)))
    for layout in _BN_CASES:
        pipe.send((f"without saved moments/{layout}", _old_backward(layout, device)))
    pipe.close()
    td.destroy_process_group()


def _bn_input(layout: str, rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 64) if layout == "rows" else (rows, 64, 7, 7)
    x = 3 + 2 * torch.randn(shape, generator=generator)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    return x.to(device)


def _bn_differences(
    owner: str, layout: str, dtype: torch.dtype, device: str, is_dry: bool
) -> dict[str, Any]:
    """Largest differences of one rank's half from the whole batch in float64."""
    rows = 8 if is_dry else 128
    whole = _bn_input(layout, rows, device).to(dtype)
    upstream = _bn_input(layout, rows, device).flip(0).to(dtype) - 3
    if layout == "channels_last":
        upstream = upstream.contiguous(memory_format=torch.channels_last)
    plain = (nn.BatchNorm1d if layout == "rows" else nn.BatchNorm2d)(64).to(device)
    with torch.no_grad():
        plain.weight.copy_(torch.linspace(0.5, 2, 64))
    layer = copy.deepcopy(plain)
    layer = (
        synchronise(layer)  # type: ignore[assignment]
        if owner == "ours"
        else nn.SyncBatchNorm.convert_sync_batchnorm(layer)  # type: ignore[no-untyped-call]
    )
    reference = plain.double()
    wide = whole.double().requires_grad_()
    expected = reference(wide)
    expected.backward(upstream.double())
    half = slice(td.get_rank() * rows // 2, (td.get_rank() + 1) * rows // 2)
    x = whole[half].detach().requires_grad_()
    output = layer(x)
    output.backward(upstream[half])
    assert x.grad is not None
    assert wide.grad is not None
    parameter_gradients = [layer.weight.grad, layer.bias.grad]
    for gradient in parameter_gradients:
        td.all_reduce(gradient)
    pairs = {
        "output": (output, expected[half]),
        "gradient": (x.grad, wide.grad[half]),
        "weight_gradient": (parameter_gradients[0], reference.weight.grad),
        "bias_gradient": (parameter_gradients[1], reference.bias.grad),
        "running_mean": (layer.running_mean, reference.running_mean),
        "running_var": (layer.running_var, reference.running_var),
    }
    differences = {
        name: float((ours.double() - theirs).abs().max()) for name, (ours, theirs) in pairs.items()
    }
    if layout == "channels_last":
        kept = [t.is_contiguous(memory_format=torch.channels_last) for t in (output, x.grad)]
        return differences | {"keeps_layout": kept}
    return differences


def _old_backward(layout: str, device: str) -> str:
    """What becomes of the call without saved moments: it may be refused."""
    x = _bn_input(layout, 8, device)
    ones = torch.ones(64, device=device)
    try:
        torch.ops.aten.native_batch_norm_backward(
            x, x, ones, ones, ones, None, None, False, 1e-5, [True] * 3
        )
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        return f"refused: {error}".partition("\n")[0][:300]
    return "runs"


def count_launches(setting: Setting) -> Results:
    """A ResNet-50's step of two views as one of 64 ranks whose collectives cost nothing.

    A ``busy_share`` far below 1: the GPU waits for launches.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    _name_collectives_as_new()
    td.init_process_group("fake", rank=0, world_size=NUM_FAKE_RANKS, store=FakeStore())
    kinds: dict[str, Callable[[nn.Module], nn.Module]] = {
        "one rank": lambda net: net,
        "ours": synchronise,
    }
    if setting.device == "cuda":
        kinds["torch"] = nn.SyncBatchNorm.convert_sync_batchnorm
    side, batches = (32, (4,)) if setting.is_dry else (224, (32, 8, 64))
    for rows in batches:
        for kind, change in kinds.items():
            if setting.is_over:
                return
            net = change(build_net("resnet50", side, setting.is_dry)).to(setting.device).train()
            try:
                yield f"{kind}/{rows}", _step_figures(net, rows, side, setting)
            except Exception as error:
                yield f"{kind}/{rows}", as_error(error)
    td.destroy_process_group()


def _step_figures(net: nn.Module, rows: int, side: int, setting: Setting) -> dict[str, Any]:
    views = [
        torch.randn(rows, 3, side, side, device=setting.device).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    ]

    def step() -> None:
        net.zero_grad()
        with torch.autocast(setting.device, torch.bfloat16):
            loss = two_view_loss(net, views)
        loss.backward()  # type: ignore[no-untyped-call]

    return measure_step(step, setting)


def time_lars(setting: Setting) -> Results:
    """LARS on a ResNet-50: this project's against a plain loop over the weights."""
    hyper = SimpleNamespace(
        name="lars", base_lr=0.2, peak_lr=3.2, momentum=0.9, trust=0.001, trust_clip=False,
        weight_decay=1e-6, weight_decay_end=None, decay_norm_and_bias=False,
    )  # fmt: skip
    torch.manual_seed(0)
    net = build_net("resnet50", 224, setting.is_dry).to(setting.device)
    for parameter in net.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)
    plain = copy.deepcopy(net)
    for theirs, ours in zip(plain.parameters(), net.parameters(), strict=True):
        assert ours.grad is not None
        theirs.grad = ours.grad.clone()
    optimizer = build_optimizer(hyper, net)  # type: ignore[arg-type]
    weights = list(plain.parameters())
    momenta = [torch.zeros_like(weight) for weight in weights]
    optimizer.step()
    _plain_lars(weights, momenta, hyper)
    yield (
        "largest_difference",
        max(
            float((ours - theirs).abs().max().detach())
            for ours, theirs in zip(net.parameters(), weights, strict=True)
        ),
    )
    steps: dict[str, Callable[[], Any]] = {
        "ours": optimizer.step,
        "loop": lambda: _plain_lars(weights, momenta, hyper),
    }
    for name, step in steps.items():
        yield name, measure_step(step, setting)


@torch.no_grad()
def _plain_lars(weights: Sequence[Tensor], momenta: Sequence[Tensor], hyper: Any) -> None:
    """You et al., arXiv 1708.03888, biases and normalisation weights neither decayed nor scaled."""
    for weight, momentum in zip(weights, momenta, strict=True):
        assert weight.grad is not None
        update = weight.grad
        if weight.ndim > 1:
            update = update + hyper.weight_decay * weight
            update = update * (hyper.trust * weight.norm() / update.norm())
        momentum.mul_(hyper.momentum).add_(update)
        weight.sub_(hyper.peak_lr * momentum)
