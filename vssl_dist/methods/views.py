"""Views through a network: together where that is faster, each by itself elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TypeVar

import torch
from torch import Tensor, nn

from vssl_dist import dist
from vssl_dist.models.norm import views_in_batch

Output = TypeVar("Output", bound=Tensor | tuple[Tensor | None, ...])


def forward_views(network: nn.Module, views: Sequence[Tensor]) -> list[Output]:
    """Return the output of ``network`` for each view, as if it were called on one after the other.

    With several ranks or on a GPU neighbours of one size go through the network together: half the
    kernels and half the collectives.  Batch norm then has statistics per view.  One rank on a CPU
    calls the network once per view, as smaller batches fit its cache.

    Args:
        network: Its output is a tensor, or a named tuple of tensors; what of it has no dimension is
            shared by the views.  Layers that draw random numbers draw others than in calls of
            their own.
        views: Each ``(B, 3, H, W)``; ``H, W`` may differ.

    >>> identity = nn.Identity()
    >>> [view.tolist() for view in forward_views(identity, [torch.zeros(1), torch.ones(1)])]
    [[0.0], [1.0]]
    """
    if not share_a_batch(views[0].device):
        return [network(view) for view in views]
    outputs: list[Output] = []
    for _, same_size in groupby(views, key=lambda view: view.shape):
        crops = list(same_size)
        with views_in_batch(network, len(crops)):
            outputs += split_views(network(torch.cat(crops)), len(crops))
    return outputs


def share_a_batch(device: torch.device) -> bool:
    """Whether the views of a step go through a network together: not on one rank of CPUs."""
    return dist.world_size() > 1 or device.type != "cpu"


def split_views(output: Output, views: int) -> list[Output]:
    """Cut the output for a batch of ``views`` views, one after the other, into that of each.

    >>> split_views(torch.tensor([1, 2, 3, 4]), 2)
    [tensor([1, 2]), tensor([3, 4])]
    """
    if isinstance(output, Tensor):
        return list(output.chunk(views))  # type: ignore[arg-type]
    per_field = [
        field.chunk(views) if field is not None and field.dim() else (field,) * views
        for field in output
    ]
    make = getattr(type(output), "_make", type(output))
    return [make(fields) for fields in zip(*per_field, strict=True)]
