"""torch's five synchronised batch-norm kernels from their formulas, for devices that lack them.

torch has them for CUDA only.  Registered for the CPU and for meta tensors, they let the path that
a GPU takes run, and be counted, where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def registered_kernels(*dispatch_keys: str) -> Iterator[None]:
    """Within, torch has the five kernels for ``dispatch_keys`` (default: ``CPU`` and ``Meta``)."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for key in dispatch_keys or ("CPU", "Meta"):
        for name, kernel in _KERNELS.items():
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def batch_norm_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and ``1 / sqrt(biased variance + eps)`` per channel, at least in float32."""
    wide = x.to(_accumulated(x.dtype))
    var, mean = torch.var_mean(wide, _all_but_channels(x), correction=0)
    return mean, torch.rsqrt(var + eps)


def batch_norm_gather_stats_with_counts(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Pool the moments ``(ranks, C)`` of ``counts`` values each; move the running statistics."""
    _, means, invstds, running_mean, running_var, momentum, eps, counts = arguments
    weights = counts.to(means.dtype)[:, None]
    total = weights.sum()
    mean = (weights * means).sum(0) / total
    second_moments = invstds.square().reciprocal() - eps + (means - mean).square()
    var = (weights * second_moments).sum(0) / total
    if running_mean is not None and running_var is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
        unbiased = var * total / (total - 1)
        running_var.copy_((1 - momentum) * running_var + momentum * unbiased)
    return mean, torch.rsqrt(var + eps)


def batch_norm_elemt(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    """``(x - mean) * invstd * weight + bias`` in the dtype of ``x``."""
    output = (x.to(mean.dtype) - _over(mean, x)) * _over(invstd, x)
    if weight is not None:
        output = output * _over(weight, x)
    if bias is not None:
        output = output + _over(bias, x)
    return output.to(x.dtype)


def batch_norm_elemt_out(*args: Any, out: Tensor) -> Tensor:
    """`batch_norm_elemt` into ``out``."""
    return out.copy_(batch_norm_elemt(*args))


def batch_norm_backward_reduce(
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Sums of ``grad`` and ``grad * (x - mean)``, and the gradients of weight and bias."""
    grad, x, mean, invstd, weight, _, weight_g, bias_g = arguments
    wide = grad.to(mean.dtype)
    sum_dy = wide.sum(_all_but_channels(x))
    sum_dy_xmu = (wide * (x.to(mean.dtype) - _over(mean, x))).sum(_all_but_channels(x))
    dtype = mean.dtype if weight is None else weight.dtype
    grad_weight = (sum_dy_xmu * invstd).to(dtype) if weight_g else None
    return sum_dy, sum_dy_xmu, grad_weight, sum_dy.to(dtype, copy=True) if bias_g else None


def batch_norm_backward_elemt(*arguments: Any) -> Tensor:
    """Gradient of ``x``, from the sums over all ranks."""
    grad, x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts = arguments
    total = counts.sum()
    through_var = _over(invstd.square() * sum_dy_xmu / total, x)
    centred = x.to(mean.dtype) - _over(mean, x)
    grad_x = grad.to(mean.dtype) - _over(sum_dy / total, x) - centred * through_var
    scale = invstd if weight is None else invstd * weight
    product: Tensor = grad_x * _over(scale, x)
    return product.to(x.dtype)


_KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": batch_norm_stats,
    "batch_norm_gather_stats_with_counts": batch_norm_gather_stats_with_counts,
    "batch_norm_elemt": batch_norm_elemt,
    "batch_norm_elemt.out": batch_norm_elemt_out,
    "batch_norm_backward_reduce": batch_norm_backward_reduce,
    "batch_norm_backward_elemt": batch_norm_backward_elemt,
}


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """``(C,)`` in a shape that broadcasts over ``x`` ``(B, C, ...)``."""
    return channels.view(1, -1, *(1 for _ in range(2, x.dim())))
