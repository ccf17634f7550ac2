"""One plain torch process on the whole global batch: what the engine is compared with.

Written without anything of the engine's: torch's batch norm, optimizers and clipping, the
schedules and the moving average spelt out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vssl_dist.config import RunConfig
from vssl_dist.data.loader import Batch
from vssl_dist.methods import METHODS
from vssl_dist.methods.base import GlobalNoise, Method, MicroStep

Arrays = dict[str, NDArray[Any]]


def smooth_method(cfg: RunConfig) -> Method:
    """The method without what turns a rounding error into something larger.

    At a ReLU's kink a change of the last bit switches a whole path on or off, so its gradient is
    not determined by float32 arithmetic: two plain processes that only sum in another order
    differ by 1e-2 after 5 steps.  Softplus has no kink.  And the bias of BYOL's projector has no
    effect, because the predictor's batch norm subtracts it: its gradient is a rounding error,
    which AdamW divides by its own size.  It is frozen.
    """
    method = METHODS[cfg.method.name][1](cfg.method, cfg.data.image_size)
    assert any(type(module) is nn.BatchNorm2d for module in method.student.modules())
    for network in (method.student, method.teacher):
        if network is not None:
            _soften(network)
    if cfg.method.name == "byol":
        method.student.get_parameter("projector.3.bias").requires_grad_(False)
    return method


def _soften(network: nn.Module) -> None:
    for name, child in network.named_children():
        if isinstance(child, nn.ReLU):
            setattr(network, name, nn.Softplus())
        else:
            _soften(child)


def photographs(size: int, count: int = 300) -> Tensor:
    """Patches of photographs, ``(count, 3, size, size)``."""
    photos = [getattr(skimage.data, name)() for name in ("astronaut", "coffee", "chelsea")]
    stream = np.random.default_rng(0)
    patches = []
    for number in range(count):
        photo = photos[number % len(photos)]
        side = int(stream.integers(2 * size, 8 * size))
        y, x = (int(stream.integers(0, edge - side)) for edge in photo.shape[:2])
        patch = torch.from_numpy(photo[y : y + side, x : x + side].copy()).permute(2, 0, 1)
        patches.append(F.interpolate(patch[None] / 255.0, size=(size, size), mode="area"))
    return (torch.cat(patches) - 0.45) / 0.25


class Images:
    """The images of every step, the same however many ranks share them."""

    def __init__(self, cfg: RunConfig) -> None:
        self.photos = photographs(cfg.data.image_size)
        self.count, self.micro = (
            cfg.optim.accumulate,
            cfg.optim.global_batch // cfg.optim.accumulate,
        )

    def of_step(self, step: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        """One rank's micro-batches; ranks own contiguous rows of each."""
        stream = torch.Generator().manual_seed(100 + step)
        rows = slice(rank * self.micro // world_size, (rank + 1) * self.micro // world_size)
        batches = []
        for _ in range(self.count):
            ids = torch.randperm(len(self.photos), generator=stream)[: self.micro]
            first = self.photos[ids]
            shade = 0.2 * torch.randn(self.micro, 3, 1, 1, generator=stream)
            views = [first + shade, first.flip(-1) * (1 + shade)]
            batches.append(Batch(ids[rows], [view[rows] for view in views], ids[rows]))
        return batches


def arrays(module: nn.Module | None) -> Arrays:
    """Copies of everything in the state dict."""
    state = {} if module is None else module.state_dict()
    return {name: value.detach().numpy().copy() for name, value in state.items()}


def plain_run(
    cfg: RunConfig, steps: int, total: int, warmup: int, build: Callable[[RunConfig], Method]
) -> dict[str, Any]:
    """Losses, gradient norms and the networks after ``steps`` steps of a run of ``total``."""
    torch.manual_seed(0)
    method, images = build(cfg), Images(cfg)
    before = arrays(method.student)
    optimizer = _optimizer(cfg, method.student)
    losses, norms, parts = [], [], []
    for step in range(steps):
        after = (step - warmup) / (total - warmup)
        factor = step / warmup if step < warmup else (1 + np.cos(np.pi * after)) / 2
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.base_lr * cfg.optim.global_batch / 256 * factor
            if group["weight_decay"] and cfg.optim.weight_decay_end is not None:
                first, last = cfg.optim.weight_decay, cfg.optim.weight_decay_end
                group["weight_decay"] = (
                    last + (first - last) * (1 + np.cos(np.pi * step / total)) / 2
                )
        epoch = step * cfg.optim.warmup_epochs / warmup
        loss, norm, by_part = _step(cfg, method, optimizer, (step, epoch), images.of_step(step))
        if method.teacher is not None:
            first, last = cfg.engine.ema_decay
            decay = last + (first - last) * (1 + np.cos(np.pi * step / total)) / 2
            _move(method.teacher, method.student, decay)
        losses.append(loss)
        norms.append(norm)
        parts.append(by_part)
    return {
        "loss": losses,
        "grad_norm": norms,
        "parts": parts,
        "before": before,
        "student": arrays(method.student),
        "teacher": arrays(method.teacher),
    }


def _optimizer(cfg: RunConfig, student: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in student.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": cfg.optim.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if cfg.optim.name == "sgd":
        return torch.optim.SGD(groups, lr=1.0, momentum=0.9, foreach=False)
    if cfg.optim.name == "lars":
        return NaiveLars(groups, trust=cfg.optim.trust)
    return torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), foreach=False)


class NaiveLars(torch.optim.Optimizer):
    """LARS on whole parameters, one at a time and in float64; momentum 0.9."""

    def __init__(self, groups: list[dict[str, Any]], trust: float) -> None:
        super().__init__(groups, {"lr": 1.0})
        self.trust = trust

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["weight_decay"], group["lr"])

    def _move(self, parameter: Tensor, weight_decay: float, lr: float) -> None:
        weight = parameter.detach().numpy().astype(np.float64)
        assert parameter.grad is not None
        change = parameter.grad.numpy().astype(np.float64) + weight_decay * weight
        norms = np.linalg.norm(weight), np.linalg.norm(change)
        if weight.ndim > 1 and min(norms) > 0:
            change = self.trust * norms[0] / norms[1] * change
        momentum = 0.9 * self.state[parameter].get("momentum", 0.0) + change
        self.state[parameter]["momentum"] = momentum
        parameter.data.copy_(torch.from_numpy(weight - lr * momentum))


def _step(
    cfg: RunConfig,
    method: Method,
    optimizer: torch.optim.Optimizer,
    now: tuple[int, float],
    batches: Sequence[Batch],
) -> tuple[float, float, tuple[float, float]]:
    step, epoch = now
    optimizer.zero_grad()
    total = 0.0
    for micro_step, batch in enumerate(batches):
        noise = GlobalNoise(cfg.seed, step, micro_step)
        loss = method.loss(batch.views, MicroStep(noise, epoch, batch.labels)).loss
        torch.autograd.backward(loss / len(batches))
        total += loss.item() / len(batches)
    by_part = _norm(method.student, inside=True), _norm(method.student, inside=False)
    norm = torch.nn.utils.clip_grad_norm_(method.student.parameters(), cfg.optim.clip or np.inf)
    optimizer.step()
    return total, norm.item(), by_part


def _norm(student: nn.Module, inside: bool) -> float:
    """Of the gradient inside the backbone, or outside of it."""
    flat = [
        parameter.grad.flatten().double()
        for name, parameter in student.named_parameters()
        if name.startswith("backbone.") == inside and parameter.grad is not None
    ]
    return torch.cat(flat).norm().item()


@torch.no_grad()
def _move(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    source, averaged = student.state_dict(), dict(teacher.named_parameters())
    for name, value in teacher.state_dict().items():
        mean = decay * value + (1 - decay) * source[name]
        value.copy_(mean if name in averaged else source[name])
