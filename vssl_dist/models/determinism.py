"""Which kernels of a GPU compute: those that give the same bits each time, or the fastest.

It imports torch alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def select_kernels(deterministic: bool, device: str) -> None:
    """Have this process compute alike each time, or as fast as its GPU can.

    ``deterministic`` on a GPU is all that torch offers: deterministic convolutions of cuDNN, no
    search among them, deterministic variants of scatters, indexed sums and fused attention, and an
    error where an operation has none.  Otherwise cuDNN tries its convolutions and keeps the
    fastest.  A CPU computes alike each time by itself and is left as it is.

    Call it before the process multiplies its first matrices: cuBLAS reads
    ``CUBLAS_WORKSPACE_CONFIG`` then.  A value that the user has set stays.

    Args:
        deterministic: The key ``engine.deterministic``.
        device: ``"cuda"`` or ``"cpu"``.
    """
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if device != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # What no kernel has written is never read here; filling it would cost memory traffic.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)


def resize_by_products(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize as `F.interpolate` with ``mode="bicubic", antialias=True``, by two matrix products.

    The backward pass of torch's own kernel adds up gradients in any order on a GPU, and refuses
    where only deterministic algorithms are allowed.  Resizing is linear along each side, so its
    matrix is what torch makes of the unit vectors.

    Args:
        images: ``(B, C, H, W)``, float32 or wider.
        size: The new ``(H', W')``.

    Returns:
        ``(B, C, H', W')`` of the same dtype.
    """
    rows, columns = (
        _resizing_matrix(before, after, images)
        for before, after in zip(images.shape[-2:], size, strict=True)
    )
    kind = images.device.type
    has_autocast = torch.amp.is_autocast_available(kind)
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        return rows @ images @ columns.T


def _resizing_matrix(before: int, after: int, like: Tensor) -> Tensor:
    """The matrix ``(after, before)`` of a bicubic antialiased resize along one side."""
    with torch.no_grad():
        unit_vectors = torch.eye(before, dtype=like.dtype, device=like.device)
        # As rows: of a single column torch 2.13 on a CPU gets the pixels wrong.
        rows = unit_vectors.view(1, before, 1, before)
        resized = F.interpolate(rows, (1, after), mode="bicubic", antialias=True)
        return resized.view(before, after).T


class _DeterministicResize(TorchFunctionMode):
    """Within, antialiased bicubic resizes are matrix products."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call ``func``, or resize in an order that is always the same."""
        kwargs = kwargs or {}
        is_bicubic = kwargs.get("mode") == "bicubic" and kwargs.get("antialias")
        if func is F.interpolate and is_bicubic and kwargs.get("size") is not None:
            return resize_by_products(args[0], kwargs["size"])
        return func(*args, **kwargs)


def with_deterministic_position_embedding(vit: nn.Module) -> nn.Module:
    """Have a ViT of timm interpolate its position embedding deterministically where that is asked.

    Without `torch.use_deterministic_algorithms`, and for networks that interpolate nothing, all is
    as it was.  The names of the weights stay.

    Args:
        vit: Changed in place.

    Returns:
        ``vit``.
    """
    if hasattr(type(vit), "_pos_embed"):
        # A bound method: a deep copy of the network, such as a teacher, binds its own.
        vit._pos_embed = MethodType(_pos_embed, vit)  # type: ignore[assignment]
    return vit


def _pos_embed(vit: Any, *args: Any) -> Any:
    """What the class of ``vit`` does, deterministically where that is asked."""
    if not torch.are_deterministic_algorithms_enabled():
        return type(vit)._pos_embed(vit, *args)
    with _DeterministicResize():
        return type(vit)._pos_embed(vit, *args)
