"""What CUDA's kernels return, for operators whose meta functions do not know it or take long.

Torch has no meta function of ``batch_norm_update_stats`` and of the kernels of nn.SyncBatchNorm at
all, that of a convolution ignores the layout, those of batch norm run dozens of operators, and a
mask cannot select among values that do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def _channels(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty(x.shape[1], dtype=wide, device=x.device)


def _update_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def _batch_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), _channels(x), _channels(x)


def _batch_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    of_channels = _channels(x) if weight is None else weight
    # Not `empty_like`: whatever the input's layout was.
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return grad_x, torch.empty_like(of_channels), torch.empty_like(of_channels)


def _convolution(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    output: Tensor = torch.ops.aten.convolution.default(x, weight, *rest)
    layouts = suggest_memory_format(x), suggest_memory_format(weight)
    if torch.channels_last in layouts and x.dtype != torch.float64:
        return output.contiguous(memory_format=torch.channels_last)
    return output


def _stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _channels(x), _channels(x)


def _backward_reduce(
    grad: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    of_channels = _channels(x) if weight is None else weight
    return (
        torch.empty_like(mean),
        torch.empty_like(mean),
        torch.empty_like(of_channels),
        torch.empty_like(of_channels),
    )


def _backward_elemt(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _elemt(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _index(x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == torch.bool:
        return torch.empty_like(x)  # as if every entry of the mask were true
    selected: Tensor = torch.ops.aten.index.Tensor(x, indices)
    return selected


RESULTS: dict[str, Callable[..., Any]] = {
    "aten::batch_norm_update_stats": _update_stats,
    "aten::native_batch_norm": _batch_norm,
    "aten::native_batch_norm_backward": _batch_norm_backward,
    "aten::convolution": _convolution,
    "aten::batch_norm_stats": _stats,
    "aten::batch_norm_gather_stats_with_counts": _stats,
    "aten::batch_norm_elemt": _elemt,
    "aten::batch_norm_backward_reduce": _backward_reduce,
    "aten::batch_norm_backward_elemt": _backward_elemt,
    "aten::index": _index,
}
