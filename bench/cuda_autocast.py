"""bfloat16 autocast by CUDA's rules on any device: the CPU has other rules, and ``meta`` none.

The lists are those of aten/src/ATen/autocast_mode.h, as far as networks and losses call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LOWER = frozenset(
    {
        F.conv1d, F.conv2d, F.conv3d, F.linear, F.scaled_dot_product_attention, F.prelu,
        torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.addmv, torch.baddbmm,
        torch.einsum, torch.chain_matmul, torch.linalg.multi_dot,
        Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.addmm,
    }
)  # fmt: skip
FULL = frozenset(
    {
        F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.softplus, F.nll_loss,
        F.cosine_similarity, F.kl_div, F.l1_loss, F.smooth_l1_loss, F.mse_loss, F.cross_entropy,
        F.binary_cross_entropy_with_logits, torch.logsumexp, torch.cdist,
        torch.exp, torch.log, torch.log2, torch.log10, torch.log1p, torch.expm1, torch.pow,
        torch.sum, torch.prod, torch.cumsum, torch.norm, torch.rsqrt, torch.reciprocal,
        torch.softmax, torch.log_softmax,
        Tensor.softmax, Tensor.log_softmax, Tensor.exp, Tensor.log, Tensor.pow, Tensor.__pow__,
        Tensor.sum, Tensor.prod, Tensor.cumsum, Tensor.norm, Tensor.rsqrt, Tensor.reciprocal,
    }
)  # fmt: skip


class AutocastOfCuda(TorchFunctionMode):
    """Casts the arguments of what is called inside as ``torch.autocast("cuda", bfloat16)`` does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.binary_cross_entropy:
            raise RuntimeError("binary_cross_entropy is unsafe to autocast")
        if func not in LOWER and func not in FULL:
            return func(*args, **kwargs)
        dtype = torch.bfloat16 if func in LOWER else torch.float32
        return func(
            *(_cast(arg, dtype) for arg in args),
            **{name: _cast(value, dtype) for name, value in kwargs.items()},
        )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(one, dtype) for one in value)
    if isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.to(dtype)
    return value


def autocast_of_cuda(net: nn.Module) -> None:
    """Let ``net`` compute as it would on a GPU under the engine's autocast, and nothing else."""
    forward = net.forward

    def cast(*args: Any, **kwargs: Any) -> Any:
        with AutocastOfCuda():
            return forward(*args, **kwargs)

    net.forward = cast
