"""Whether features still fill their space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.evaluation.probe import CHUNK

_BLOCK = 2048
_WIDEST = 4096


def rankme(features: Tensor) -> float:
    """Exponential of the entropy of the singular values of features ``(N, D)``, ``N >= D`` or not.

    RankMe (Garrido et al., 2023): from 1 to ``min(N, D)``.  It judges features as they are;
    nothing is centred or normalised.  Of features wider than 4,096, as raw pixels of large images
    are, 4,096 evenly spaced rows are judged.

    >>> round(rankme(torch.eye(5)), 4)
    5.0
    """
    if features.shape[1] > _WIDEST:
        features = features[:: max(len(features) // _WIDEST, 1)][:_WIDEST]
    gram = _gram(features)
    squares = torch.linalg.eigvalsh(gram)
    # Float32 features have no digits below this; sums of rounding errors would count as ranks.
    floor = squares[-1] * torch.finfo(torch.float32).eps ** 2 * max(features.shape)
    values = torch.where(squares > floor, squares, 0).sqrt()
    total = values.sum()
    return math.exp(float(torch.special.entr(values / total).sum())) if total > 0 else 1.0


def _gram(features: Tensor) -> Tensor:
    """``X^T X`` or ``X X^T``, whichever is smaller, in float64."""
    if len(features) < features.shape[1]:
        rows = features.double()
        return rows @ rows.T
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in torch.split(features, CHUNK):
        rows = block.double()
        gram += rows.T @ rows
    return gram


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Logarithm of the mean of ``exp(-t |x - y|^2)`` over all pairs of distinct unit features.

    Wang & Isola (2020): 0 when all are the same, lower is more uniform.

    Args:
        features: ``(N, D)``, ``N >= 2``.
        t: Sharpness of the potential.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 4)
    -8.0
    """
    blocks = torch.split(F.normalize(features.float(), dim=1), _BLOCK)
    total, count = 0.0, len(features)
    for i, block in enumerate(blocks):
        for j, other in enumerate(blocks):
            squared = (2 - 2 * block @ other.T).clamp_min(0)
            if i == j:
                squared.fill_diagonal_(torch.inf)  # nothing is paired with itself
            total += float((-t * squared).exp().double().sum())
    return math.log(max(total, torch.finfo(torch.float64).tiny) / (count * (count - 1)))
