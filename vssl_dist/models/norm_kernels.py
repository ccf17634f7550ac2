"""Batch normalisation by the moments of all ranks, forward and backward.

Two autograd functions compute the same thing.  `NormaliseByCudaKernels` calls torch's own
synchronised kernels, which exist for CUDA only; `NormaliseByPlainKernels` is made of kernels that
every device has.  Both keep the moments of each view apart and send those of all views in one
collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor

from vssl_dist import dist


class Running(NamedTuple):
    """Running statistics ``(C,)``, moved in place, once per view."""

    mean: Tensor
    var: Tensor
    momenta: Sequence[float]
    """For each view the share of the new value."""


class NormaliseByCudaKernels(torch.autograd.Function):
    """Normalise by torch's five synchronised kernels, those of `torch.nn.SyncBatchNorm`.

    An input that is channels_last has an output and a gradient that are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        views: int,
    ) -> Tensor:
        """Return ``x`` ``(views * B, C, ...)`` normalised, in its own dtype and layout."""
        x = x.contiguous(memory_format=_layout(x))
        chunks = x.chunk(views)
        local = [moment for chunk in chunks for moment in torch.batch_norm_stats(chunk, eps)]
        # A rank has as many images of one view as of any other.
        count = local[0].new_full((1,), chunks[0].numel() // x.shape[1])
        per_rank = _gather_rows(torch.cat([*local, count]))
        means, invstds = per_rank[:, :-1].view(len(per_rank), views, 2, -1).unbind(2)
        counts = per_rank[:, -1]
        output = torch.empty_like(x)
        moments: list[Tensor] = []
        for view, chunk in enumerate(chunks):
            moments += torch.batch_norm_gather_stats_with_counts(
                chunk,
                means[:, view],
                invstds[:, view],
                None if running is None else running.mean,
                None if running is None else running.var,
                0.0 if running is None else running.momenta[view],
                eps,
                counts,
            )
            out = output[_rows(view, chunk)]
            torch.ops.aten.batch_norm_elemt.out(chunk, weight, bias, *moments[-2:], eps, out=out)
        ctx.save_for_backward(x, weight, counts.to(torch.int32), *moments)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``weight`` and ``bias``; those two of this rank only."""
        x, weight, counts, *flat_moments = ctx.saved_tensors
        moments = list(zip(flat_moments[::2], flat_moments[1::2], strict=True))
        views, has_weight = len(moments), weight is not None
        # The kernels are fastest, and answer in x's layout, where both have the same.
        grad = grad.contiguous(memory_format=_layout(x))
        inputs = list(zip(grad.chunk(views), x.chunk(views), moments, strict=True))
        reduced = [
            torch.batch_norm_backward_reduce(
                dy, chunk, *moment, weight, True, has_weight, has_weight
            )
            for dy, chunk, moment in inputs
        ]
        sums = torch.cat([local_sum for view in reduced for local_sum in view[:2]])
        td.all_reduce(sums)
        grads: list[Tensor] = []
        for (dy, chunk, moment), view_sums in zip(inputs, sums.view(views, 2, -1), strict=True):
            sum_dy, sum_dy_xmu = view_sums
            grads.append(
                torch.batch_norm_backward_elemt(
                    dy, chunk, *moment, weight, sum_dy, sum_dy_xmu, counts
                )
            )
        grad_x = torch.cat(grads) if views > 1 else grads[0]
        if weight is None:
            return grad_x, None, None, None, None, None
        grad_weight, grad_bias = (_sum([view[k] for view in reduced]) for k in (2, 3))
        return grad_x, grad_weight, grad_bias, None, None, None


class NormaliseByPlainKernels(torch.autograd.Function):
    """Normalise by kernels that every device has, and move the running statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        views: int,
    ) -> Tensor:
        """Return ``x`` ``(views * B, C, ...)`` normalised, in its own dtype and layout."""
        mean, var, count = _global_moments(x, views)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        if running is not None:
            unbiased = var * (count / (count - 1))
            for view, momentum in enumerate(running.momenta):
                running.mean.lerp_(mean[view].to(running.mean), momentum)
                running.var.lerp_(unbiased[view].to(running.var), momentum)
        outputs = [
            F.batch_norm(chunk, mean[view], var[view], weight, bias, False, 0.0, eps)
            for view, chunk in enumerate(x.chunk(views))
        ]
        return torch.cat(outputs) if views > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of ``x``, ``weight`` and ``bias``; those two of this rank only."""
        x, weight, mean, var, count = ctx.saved_tensors
        views, eps = len(mean), ctx.eps
        scale = torch.ones_like(mean[0]) if weight is None else weight
        invstd = torch.rsqrt(var + eps)
        chunks = x.chunk(views)
        grads: list[Tensor] = []
        own_sums: list[Tensor] = []
        for view, grad_chunk in enumerate(grad.chunk(views)):
            # As if mean and var were constants: the fused kernel of `eval` mode.  The CPU reads
            # them as running statistics; CUDA, for rows and channels_last, as saved moments.
            grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
                grad_chunk,
                chunks[view],
                scale,
                mean[view],
                var[view],
                mean[view],
                invstd[view],
                False,
                eps,
                [True, True, True],
            )
            grads.append(grad_x)
            own_sums.append(torch.stack([grad_weight, grad_bias]))
        # What flows through mean and var: -(scale / std) * (E[grad] + xhat * E[grad * xhat]),
        # which is a batch norm of x with other coefficients.
        sums = torch.stack(own_sums, dim=1).to(mean.dtype)
        td.all_reduce(sums)
        through_var, through_mean = -sums * scale * invstd / count
        for view, grad_x in enumerate(grads):
            grad_x += F.batch_norm(
                chunks[view],
                mean[view],
                var[view],
                through_var[view],
                through_mean[view],
                eps=eps,
            )
        grad_x = torch.cat(grads) if views > 1 else grads[0]
        if weight is None:
            return grad_x, None, None, None, None, None
        grad_weight, grad_bias = _sum(own_sums)
        return grad_x, grad_weight, grad_bias, None, None, None


def _global_moments(x: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance ``(views, C)`` over all ranks, and the number of values ``(1,)``.

    Every rank's mean and centred variance are gathered and pooled, which, unlike sums of squares,
    loses no digits when the mean is large beside the deviation.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    width = x.shape[1]
    # The kernel answers in the dtype of the running statistics, which this call leaves alone.
    unused = torch.zeros(2, width, dtype=wide, device=x.device)
    local = [
        moment
        for chunk in x.chunk(views)
        for moment in torch.ops.aten.batch_norm_update_stats(chunk, *unused, 0.0)
    ]
    count = torch.full_like(local[0][:1], x.numel() // (width * views))
    rows = _gather_rows(torch.cat([*local, count]))
    moments, counts = rows[:, :-1].view(-1, views, 2, width), rows[:, -1:, None]
    means, variances = moments[:, :, 0], moments[:, :, 1]
    total = counts.sum()
    share = counts / total
    mean = (share * means).sum(0)
    var = (share * (variances + (means - mean).square())).sum(0)
    return mean, var, total


def _gather_rows(row: Tensor) -> Tensor:
    """Every rank's ``row`` ``(N,)``, as ``(ranks, N)``."""
    rows = row.new_empty(dist.world_size() * row.numel())
    td.all_gather_single(rows, row)
    return rows.view(dist.world_size(), -1)


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of ``x`` if it is one that the kernels read, else plain contiguous."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        if x.is_contiguous(memory_format=layout):
            return layout
    return torch.contiguous_format


def _rows(view: int, chunk: Tensor) -> slice:
    return slice(view * len(chunk), (view + 1) * len(chunk))


def _sum(per_view: list[Tensor]) -> Tensor:
    total = per_view[0]
    for tensor in per_view[1:]:
        total = total + tensor
    return total
