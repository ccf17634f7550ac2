"""One training step of a recipe on a GPU that does not exist, beside ranks that do not either.

Loss and gradient run on ``meta``; DeepSpeed and the optimizer, which look at numbers, on the CPU,
with the student's real parameters and given gradients.  The process group only pretends.

The reference is the same loss on torch's own means: a forward pass per view, the function of
nn.SyncBatchNorm, DistributedDataParallel, and torch's foreach optimizer (or a plain LARS of foreach
operators) on every rank.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncFunction
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench.cuda_autocast import autocast_of_cuda
from bench.launch_counter import GIVEN_GRADIENTS, FakeCuda, HostReads, LaunchCounter, Traffic
from vssl_dist import engine as engine_module
from vssl_dist.config import OptimConfig, RunConfig
from vssl_dist.data.loader import Batch
from vssl_dist.methods import build_method
from vssl_dist.methods import views as views_module
from vssl_dist.methods.base import LossOutput, Method, MicroStep
from vssl_dist.models.norm import SyncBatchNorm, synchronise
from vssl_dist.optim import parameter_groups
from vssl_dist.teacher import Teacher

PURPOSES = ("norm", "loss", "gradient", "optimizer")
"""What collectives serve: batch norm, the loss itself, averaging the gradient, the update."""

_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}
"""What DeepSpeed asks for."""


@dataclass(frozen=True)
class StepCount:
    """What one optimizer step asks of a rank's GPU and of the network."""

    launches: int
    traffic: dict[str, Traffic]
    """By purpose."""
    host_syncs: int
    by_op: dict[str, int]
    """Launches of each operator, most first."""
    by_place: dict[str, int]
    """Launches of each source file, most first; empty unless asked for."""

    @classmethod
    def of(cls, loss: LaunchCounter, update: LaunchCounter, micro_steps: int) -> StepCount:
        """Sum a loss with its gradient, ``micro_steps`` times, and what a step does besides."""
        traffic = {}
        for purpose in PURPOSES:
            pair = [counter.traffic.get(purpose, Traffic()) for counter in (loss, update)]
            traffic[purpose] = Traffic(
                micro_steps * pair[0].count + pair[1].count,
                micro_steps * pair[0].num_bytes + pair[1].num_bytes,
            )
        by_op, by_place = update.by_op.copy(), update.by_place.copy()
        for _ in range(micro_steps):
            by_op += loss.by_op
            by_place += loss.by_place
        return cls(
            by_op.total(),
            traffic,
            micro_steps * loss.host_syncs + update.host_syncs,
            dict(by_op.most_common()),
            dict(by_place.most_common()),
        )


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[None]:
    """Be rank 0 of ``world`` whose other ranks do not exist: nothing that they send is real."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    td.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        import deepspeed.comm  # which keeps the group, too

        (deepspeed.comm if deepspeed.comm.is_initialized() else td).destroy_process_group()


def count_step(
    cfg: RunConfig,
    *,
    reference: bool = False,
    with_places: bool = False,
    gpu: Callable[[], Any] = FakeCuda,
    gpu_of_numbers: Callable[[], Any] = contextlib.nullcontext,
) -> StepCount:
    """Count a step of ``cfg`` inside `fake_ranks`.

    Args:
        cfg: The run.
        reference: Count the reference instead of this project's step.
        with_places: Also by source file.
        gpu: Dispatch mode that makes ``meta`` stand for a GPU, for the loss and its gradient.
        gpu_of_numbers: One that makes the CPU stand for it, for all else of a step.
    """
    loss, update = LaunchCounter(with_places), LaunchCounter(with_places)
    with gpu():
        _count_loss(cfg, loss, reference)
    with gpu_of_numbers():
        (_count_reference_update if reference else _count_update)(cfg, update)
    gc.collect()  # engines hold themselves, and their weights are real
    return StepCount.of(loss, update, cfg.optim.accumulate)


class _MetaNoise:
    """Draws that take no memory."""

    def normal(self, branch: str, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, device="meta")


def _count_loss(cfg: RunConfig, counter: LaunchCounter, reference: bool) -> None:
    rows = max(cfg.optim.global_batch // (td.get_world_size() * cfg.optim.accumulate), 1)
    method = _networks_on_meta(cfg)
    with torch.device("meta"):
        views = [torch.empty(rows, 3, side, side) for side in cfg.data.sides]
        labels = torch.empty(rows, dtype=torch.int64)
    if cfg.engine.channels_last:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    synchronised = _with_torch_norms if reference else _with_norms_of_cuda
    method.student = synchronised(method.student).train()
    if method.teacher is not None:
        method.teacher = synchronised(method.teacher).train()
    for network in filter(None, (method.student, method.teacher)):
        if cfg.engine.autocast != "none":
            autocast_of_cuda(network)
    with _view_by_view() if reference else contextlib.nullcontext(), counter:
        out = method.loss(views, MicroStep(_MetaNoise(), 1.0, labels))
        out.loss.backward()  # type: ignore[no-untyped-call]


def _networks_on_meta(cfg: RunConfig) -> Method:
    with torch.device("meta"):
        return build_method(cfg.method, cfg.data.image_size, cfg.data.sides)


@contextlib.contextmanager
def _view_by_view() -> Iterator[None]:
    """Let the losses run a network once per view."""
    module: Any = views_module
    share_a_batch = module.share_a_batch
    module.share_a_batch = lambda device: False
    try:
        yield
    finally:
        module.share_a_batch = share_a_batch


def _with_norms_of_cuda(network: nn.Module) -> nn.Module:
    """Synchronise as the engine does, and take the kernels that a GPU would."""
    network = synchronise(network)
    for layer in network.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.cuda_kernels = True
    return network


def _with_torch_norms(network: nn.Module) -> nn.Module:
    """Let every batch norm inside ``network`` be what nn.SyncBatchNorm makes of it on a GPU."""
    if td.get_world_size() > 1:
        for layer in network.modules():
            if isinstance(layer, _BatchNorm):
                layer.forward = partial(_torch_norm, layer)  # type: ignore[method-assign]
    return network


def _torch_norm(layer: Any, x: Tensor) -> Tensor:
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    running = layer.running_mean, layer.running_var
    output: Tensor = TorchSyncFunction.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, layer.bias, *running, layer.eps, layer.momentum, td.group.WORLD,
        td.get_world_size(),
    )  # fmt: skip
    # What timm fuses into the layer.
    return layer.act(layer.drop(output)) if hasattr(layer, "drop") else output


class _GivenGradients(torch.autograd.Function):
    """A loss whose gradient costs one launch per parameter: a vector of zeros."""

    @staticmethod
    def forward(ctx: Any, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


class _StandIn:
    """The networks of a method in the host's memory, with a loss that never runs them."""

    def __init__(self, cfg: RunConfig) -> None:
        method = _networks_on_meta(cfg)
        self.student: Any = _zeros_on_cpu(method.student)
        self.teacher = None if method.teacher is None else _zeros_on_cpu(method.teacher)
        self.evaluated = method.evaluated
        trained = [p for p in self.student.parameters() if p.requires_grad]
        self.student.forward = lambda *_: _GivenGradients.apply(*trained)  # type: ignore[no-untyped-call]

    def loss(self, views: Sequence[Tensor], micro_step: MicroStep, /) -> LossOutput:
        """The given gradients."""
        return LossOutput(self.student(views[0]), views[0])


def _zeros_on_cpu(network: nn.Module) -> nn.Module:
    network.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            tensor.zero_()
    return network


def _count_update(cfg: RunConfig, counter: LaunchCounter) -> None:
    """Count what this project's engine does besides the losses and their gradients."""
    stand_in = _StandIn(cfg)
    with _optimizer_of_cuda():
        engine = engine_module.Engine(
            cfg, stand_in, total_steps=100, steps_per_epoch=10.0, device="cpu"
        )
    ids = torch.zeros(2, dtype=torch.int64)
    batch = Batch(ids, [torch.zeros(2, 3, 2, 2) for _ in cfg.data.sides], labels=ids)
    batches = [batch] * cfg.optim.accumulate
    engine.train_step(batches)  # the first one makes the optimizer's state
    counter.host_numbers = _host_numbers(engine.optimizer)
    _mark_purposes(engine.ds, counter)
    with HostReads(counter), counter:
        engine.train_step(batches, with_metrics=False)
    _leave_out_given_gradients(stand_in.student, counter, cfg.optim.accumulate)
    engine.ds.destroy()  # else its hooks on the gradient hold all of it


@contextlib.contextmanager
def _optimizer_of_cuda() -> Iterator[None]:
    """Let the engine choose the optimizer as for parameters that lie on a GPU."""
    module: Any = engine_module
    build = module.build_optimizer

    def build_for_gpu(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        torch.Tensor.is_cuda = True
        try:
            optimizer: torch.optim.Optimizer = build(*args, **kwargs)
            return optimizer
        finally:
            del torch.Tensor.is_cuda  # what it inherits comes back

    module.build_optimizer = build_for_gpu
    try:
        yield
    finally:
        module.build_optimizer = build


def _host_numbers(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The counts of steps that an optimizer of torch's keeps on the host unless it is fused."""
    return [
        optimizer.state[parameter]["step"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if "step" in optimizer.state[parameter] and not group.get("fused")
    ]


def _mark_purposes(ds: Any, counter: LaunchCounter) -> None:
    """Tell the collectives that average the gradient from those that update weights."""
    backward = ds.backward

    def marked(loss: Tensor) -> None:
        counter.purpose = "gradient"
        backward(loss)
        counter.purpose = "optimizer"

    ds.backward = marked
    counter.purpose = "optimizer"


def _leave_out_given_gradients(student: nn.Module, counter: LaunchCounter, times: int) -> None:
    parameters = [p.detach().requires_grad_() for p in student.parameters() if p.requires_grad]
    with LaunchCounter() as alone:
        _GivenGradients.apply(*parameters).backward()  # type: ignore[no-untyped-call]
    for name, count in alone.by_op.items():
        counter.by_op[name] -= times * count
    del counter.by_place[GIVEN_GRADIENTS]


def _count_reference_update(cfg: RunConfig, counter: LaunchCounter) -> None:
    stand_in = _StandIn(cfg)
    student = network = stand_in.student
    if td.get_world_size() > 1:
        network = nn.parallel.DistributedDataParallel(student, forward_sync_buffers=False)
        network.register_comm_hook(None, lambda _, bucket: _averaged(bucket))
    teacher = None if stand_in.teacher is None else Teacher(stand_in.teacher, student)
    groups = parameter_groups(cfg.optim, student)
    optimizer = _reference_optimizer(cfg.optim, groups)
    # The first one makes the optimizer's state and DDP's buckets.
    for observed in (contextlib.nullcontext(), counter):
        with observed:
            for _ in range(cfg.optim.accumulate):
                counter.purpose = "gradient"
                network(None).backward()
            counter.purpose = "optimizer"
            optimizer.step()
            if teacher is not None:
                teacher.update(0.99)
        for parameter in student.parameters():
            parameter.grad = None
        if isinstance(optimizer, torch.optim.Optimizer):
            counter.host_numbers = _host_numbers(optimizer)
    _leave_out_given_gradients(student, counter, cfg.optim.accumulate)


def _averaged(bucket: Any) -> torch.futures.Future[Tensor]:
    """Average a bucket over ranks as DDP's own hook does, whose future a fake group never fills."""
    gradient: Tensor = bucket.buffer().div_(td.get_world_size())
    td.all_reduce(gradient)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(gradient)
    return future


def _reference_optimizer(
    cfg: OptimConfig, groups: list[dict[str, Any]]
) -> torch.optim.Optimizer | _ForeachLars:
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=cfg.momentum, foreach=True)
    if cfg.name == "adamw":
        return torch.optim.AdamW(groups, lr=1.0, betas=cfg.betas, foreach=True)
    return _ForeachLars(groups, cfg)


class _ForeachLars:
    """LARS on whole parameters in foreach operators: as many launches for one as for sixty."""

    def __init__(self, groups: list[dict[str, Any]], cfg: OptimConfig) -> None:
        self.cfg = cfg
        parameters = [(p, g["weight_decay"]) for g in groups for p in g["params"]]
        self.weights = [p for p, _ in parameters if p.ndim > 1]
        self.others = [p for p, _ in parameters if p.ndim <= 1]
        self.momenta = {id(p): torch.zeros_like(p) for p, _ in parameters}

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        for parameters, adapted in ((self.weights, True), (self.others, False)):
            if not parameters:
                continue
            gradients: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
            weights = list(parameters)
            updates = list(torch._foreach_add(gradients, weights, alpha=self.cfg.weight_decay))
            if adapted:
                weight_norms = torch.stack(torch._foreach_norm(weights))
                update_norms = torch.stack(torch._foreach_norm(updates))
                rates = self.cfg.trust * weight_norms / update_norms
                rates = torch.where((weight_norms > 0) & (update_norms > 0), rates, 1.0)
                torch._foreach_mul_(updates, list(rates.unbind()))
            momenta = [self.momenta[id(p)] for p in parameters]
            torch._foreach_mul_(momenta, self.cfg.momentum)
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(weights, momenta, alpha=-0.1)
