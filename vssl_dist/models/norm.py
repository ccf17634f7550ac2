"""Batch normalisation over all ranks, on any backend.

torch's own SyncBatchNorm takes CUDA tensors only, and knows no views.  This one uses one small
collective per layer and direction, whatever the number of views that go through it together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vssl_dist import dist
from vssl_dist.models.norm_kernels import (
    NormaliseByCudaKernels,
    NormaliseByPlainKernels,
    Running,
)


class SyncBatchNorm(_BatchNorm):
    """`nn.BatchNorm1d/2d` whose training statistics are those of the batch of all ranks.

    Parameters and buffers have the names of `nn.BatchNorm2d`, so weights load either way.  With
    one rank, and in `eval`, it is `nn.BatchNorm2d`.  The engine averages parameter gradients over
    ranks; under that rule the gradients are those of one process on the global batch.  Statistics
    are float32 for half-precision inputs.
    """

    views: int = 1
    """Views that a batch holds, one after the other; each has statistics of its own."""
    cuda_kernels: bool | None = None
    """Whether to call torch's kernels for CUDA; None: for inputs that are there."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm needs (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """``(views * B, C, ...)`` -> the same shape and dtype."""
        uses_batch = self.training or self.running_mean is None
        if not uses_batch or (dist.world_size() == 1 and self.views == 1):
            return super().forward(input)
        if dist.world_size() == 1:
            # Of one rank there is nothing to synchronise: one fused kernel per view.
            return torch.cat(
                [super(SyncBatchNorm, self).forward(v) for v in input.chunk(self.views)]
            )
        self._check_input_dim(input)
        calls_cuda_kernels = input.is_cuda if self.cuda_kernels is None else self.cuda_kernels
        kernels = NormaliseByCudaKernels if calls_cuda_kernels else NormaliseByPlainKernels
        output: Tensor = kernels.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self._count_batches(), self.eps, self.views
        )
        return output

    @torch.no_grad()
    def _count_batches(self) -> Running | None:
        if self.running_mean is None or self.running_var is None:
            return None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(self.views)
        if self.momentum is not None:
            momenta = [self.momentum] * self.views
        else:  # the plain average of all batches so far
            batches = int(self.num_batches_tracked)
            momenta = [1.0 / (batches - later) for later in reversed(range(self.views))]
        return Running(self.running_mean, self.running_var, momenta)


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


@contextmanager
def views_in_batch(network: nn.Module, views: int) -> Iterator[None]:
    """Within, batches of ``network`` hold ``views`` views, one after the other."""
    norms = [module for module in network.modules() if isinstance(module, SyncBatchNorm)]
    for norm in norms:
        norm.views = views
    try:
        yield
    finally:
        for norm in norms:
            norm.views = 1
