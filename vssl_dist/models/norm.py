"""Batch normalisation over all ranks, on any backend.

torch's own SyncBatchNorm takes CUDA tensors only.  This one uses one small collective per layer
and direction and otherwise torch's fused kernels, so that it is what tests on the CPU and jobs on
GPUs both run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vssl_dist import dist


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d/2d` whose training statistics are those of the batch of all ranks.

    Parameters and buffers have the names of `nn.BatchNorm2d`, so weights load either way.  With
    one rank, and in `eval`, it is `nn.BatchNorm2d`.  The engine averages parameter gradients over
    ranks; under that rule the gradients are those of one process on the global batch.  Statistics
    are float32 for half-precision inputs.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, ...)`` -> the same shape and dtype."""
        uses_batch = self.training or self.running_mean is None
        if dist.world_size() == 1 or not uses_batch:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, var, count = _Normalise.apply(input, self.weight, self.bias, self.eps)  # type: ignore[no-untyped-call]
        self._track(mean, var * (count / (count - 1)))
        return output  # type: ignore[no-any-return]

    @torch.no_grad()
    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:  # the plain average of all batches so far
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(unbiased.to(self.running_var), share)


class SyncBatchNormAct(SyncBatchNorm):
    """`SyncBatchNorm` followed by drop and activation: what timm fuses into one module."""

    def __init__(self, norm: nn.Module, features: int) -> None:
        super().__init__(features)
        self.drop: nn.Module = norm.drop  # type: ignore[assignment]
        self.act: nn.Module = norm.act  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W)`` -> the same shape and dtype."""
        output: Tensor = self.act(self.drop(super().forward(input)))
        return output


class _Normalise(torch.autograd.Function):
    """Normalise by the moments of all ranks' inputs; also returns those moments."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        mean, var, count = _global_moments(x)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        output = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        eps = ctx.eps
        scale = torch.ones_like(mean) if weight is None else weight
        invstd = torch.rsqrt(var + eps)
        # As if mean and var were constants: the fused kernel of `eval` mode.  The CPU reads them
        # as running statistics; CUDA, for rows and channels_last, as moments that were saved.
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, mean, var, mean, invstd, False, eps, [True, True, True]
        )
        # What flows through mean and var: -(scale / std) * (E[grad] + xhat * E[grad * xhat]),
        # which is a batch norm of x with other coefficients.
        sums = torch.stack([grad_weight, grad_bias]).to(mean.dtype)
        td.all_reduce(sums)
        through_var, through_mean = -sums * scale * invstd / count
        grad_x += F.batch_norm(x, mean, var, through_var, through_mean, False, 0.0, eps)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight, grad_bias, None


def _global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(C,)`` over all ranks, and the number of values per channel.

    Every rank's mean and centred variance are gathered and pooled, which, unlike sums of squares,
    loses no digits when the mean is large beside the deviation.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    # The kernel answers in the dtype of the running statistics, which this call leaves alone.
    unused = torch.zeros(2, x.shape[1], dtype=wide, device=x.device)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0)
    count = torch.full_like(mean[:1], x.numel() // x.shape[1])
    mine = torch.cat([mean, var, count])
    ranks = torch.empty(dist.world_size() * mine.numel(), dtype=mine.dtype, device=mine.device)
    td.all_gather_single(ranks, mine)
    rows = ranks.view(dist.world_size(), -1)
    width = x.shape[1]
    means, variances, counts = rows[:, :width], rows[:, width:-1], rows[:, -1:]
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, total


def _synchronised(norm: _BatchNorm) -> SyncBatchNorm:
    fused = isinstance(getattr(norm, "act", None), nn.Module) and hasattr(norm, "drop")
    if type(norm) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) and not fused:
        raise TypeError(
            f"{type(norm).__name__} is a batch norm that cannot be synchronised over ranks; "
            "choose a backbone with plain batch norm, or without any"
        )
    features = norm.num_features
    new = SyncBatchNormAct(norm, features) if fused else SyncBatchNorm(features)
    new.eps, new.momentum, new.affine = norm.eps, norm.momentum, norm.affine
    new.track_running_stats, new.training = norm.track_running_stats, norm.training
    for name, value in (norm._parameters | norm._buffers).items():
        setattr(new, name, value)
    return new


def synchronise(module: nn.Module) -> nn.Module:
    """Replace every batch norm inside ``module`` by a `SyncBatchNorm` that owns its tensors.

    In place, except that a ``module`` which is itself a batch norm comes back as a new one.
    Parameters stay the same objects, so an optimizer made before still holds them.

    Raises:
        TypeError: A batch norm of a kind that this does not know how to replace.

    >>> net = synchronise(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    >>> type(net[1]).__name__, list(net.state_dict())[2:4]
    ('SyncBatchNorm', ['1.weight', '1.bias'])
    """
    if isinstance(module, SyncBatchNorm):
        return module
    if isinstance(module, _BatchNorm):
        return _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise(child))
    return module
