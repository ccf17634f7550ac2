"""The contracts of `CudaContract` about batch norm's backward pass."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.cuda_contract import Call, Contract

ATEN = "aten/src/ATen/native/"
HALVES = (torch.float16, torch.bfloat16)
INT_MAX = 2**31 - 1


def fits_32_bits(tensor: Tensor) -> bool:
    """Whether a kernel reaches all of ``tensor`` by an int: ``canUse32BitIndexMath``."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() < INT_MAX and last < INT_MAX


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """In what a kernel adds up ``dtype``: ``toAccumulateType(dtype, is_cuda=true)``."""
    return torch.float32 if dtype in HALVES else dtype


def _batch_norm_is_fused(call: Call) -> bool:
    """Whether one kernel does the whole backward pass; else several read what was saved."""
    x, mask = call["input"], call["output_mask"]
    rows = x.is_contiguous() and x.stride(1) == 1
    channels_last = (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )
    reduces = call["train"] or mask[1] or mask[2]
    small = fits_32_bits(x) and fits_32_bits(call["grad_out"])
    return reduces and mask[0] and small and not rows and not channels_last


def _saved_moments(call: Call) -> str | None:
    if _batch_norm_is_fused(call) and not call["train"]:
        return None
    missing = [name for name in ("save_mean", "save_invstd") if call[name] is None]
    return f"{' and '.join(missing)} should always be defined" if missing else None


def _saved_types(call: Call) -> str | None:
    wanted = _accumulated(call["input"].dtype)
    for name in ("save_mean", "save_invstd"):
        # An empty one stands for one to be computed.
        if call[name] is not None and call[name].numel() and call[name].dtype != wanted:
            return f"{name} is {call[name].dtype}, not {wanted}"
    return None


def _batch_norm_types(call: Call) -> str | None:
    x = call["input"].dtype
    if call["grad_out"].dtype != x:
        return f"the gradient is {call['grad_out'].dtype}, the input {x}"
    names = ("weight", "running_mean", "running_var")
    dtypes = {name: call[name].dtype for name in names if call[name] is not None}
    first = next(iter(dtypes.values()), x)
    wanted = x if first == x else _accumulated(x)
    for name, dtype in dtypes.items():
        if dtype != wanted and (name == "weight" or _batch_norm_is_fused(call)):
            return f"{name} is {dtype}, not {wanted}"
    return None


BATCH_NORM = ("aten::native_batch_norm_backward",)
NORMS = (
    Contract("saved moments", BATCH_NORM, ATEN + "cuda/Normalization.cu", _saved_moments),
    Contract("types of saved moments", BATCH_NORM, ATEN + "cuda/Normalization.cuh", _saved_types),
    Contract("types in batch norm", BATCH_NORM, ATEN + "cuda/Normalization.cuh", _batch_norm_types),
)
