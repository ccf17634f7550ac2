"""Whether features still fill their space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.evaluation.scores.probe import CHUNK

_BLOCK = 2048
_WIDEST = 4096


def spectrum(features: Tensor, *, centred: bool = False) -> Tensor:
    """Compute the singular values of features ``(N, D)``, the largest first: float64.

    Those that are rounding errors of float32 features are 0.  Of features wider than 4,096, as
    raw pixels of large images are, 4,096 evenly spaced rows are judged.

    Args:
        features: One row per image; there may be fewer rows than columns.
        centred: Whether their mean is taken away first.
    """
    if features.shape[1] > _WIDEST:
        features = features[:: max(len(features) // _WIDEST, 1)][:_WIDEST]
    mean = features.double().mean(0) if centred else torch.zeros(1, dtype=torch.float64)
    # Of the smaller Gram matrix, whose eigenvalues are the squares of the singular values.
    squares = torch.linalg.eigvalsh(_gram(features, mean)).flip(0)
    # Float32 features have no digits below this; sums of rounding errors would count as ranks.
    top = squares[0] + mean.square().sum() * (len(features) if centred else 0)
    floor = top * torch.finfo(torch.float32).eps ** 2 * max(features.shape)
    return torch.where(squares > floor, squares, 0).sqrt()


def effective_rank(values: Tensor) -> float:
    """Compute the exponential of the entropy of singular values, as shares of their sum.

    What Roy & Vetterli (2007) call the effective rank of a matrix; the figures made of it are named
    by the matrix.  From 1 to their number; 1 where all are 0.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 4)
    2.0
    """
    total = values.sum()
    return math.exp(float(torch.special.entr(values / total).sum())) if total > 0 else 1.0


def rankme(features: Tensor) -> float:
    """Compute RankMe (Garrido et al., 2023): the `effective_rank` of features ``(N, D)``.

    Nothing is centred or normalised; from 1 to ``min(N, D)``.

    >>> round(rankme(torch.eye(5)), 4)
    5.0
    """
    return effective_rank(spectrum(features))


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """Compute ``X^T X`` or ``X X^T``, whichever is smaller, in float64."""
    if len(features) < features.shape[1]:
        rows = features.double() - mean
        return rows @ rows.T
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in torch.split(features, CHUNK):
        rows = block.double() - mean
        gram += rows.T @ rows
    return gram


def uniformity(features: Tensor, t: float = 2.0) -> float:
    """Compute the uniformity of Wang & Isola (2020) of features on the unit sphere.

    The logarithm of the mean of ``exp(-t |x - y|^2)`` over all pairs of distinct images: 0 when
    all are the same, lower is more uniform.

    Args:
        features: ``(N, D)``, ``N >= 2``.
        t: Sharpness of the potential.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 4)
    -8.0
    """
    blocks = torch.split(F.normalize(features.float(), dim=1), _BLOCK)
    total = 0.0
    count = len(features)
    for i, block in enumerate(blocks):
        for j, other in enumerate(blocks):
            # |x - y|^2 = 2 - 2 <x, y> of unit vectors; rounding may leave it negative.
            squared = (2 - 2 * block @ other.T).clamp_min(0)
            if i == j:
                squared.fill_diagonal_(torch.inf)  # nothing is paired with itself
            total += float((-t * squared).exp().double().sum())
    return math.log(max(total, torch.finfo(torch.float64).tiny) / (count * (count - 1)))


def alignment(views: Tensor) -> float:
    """Compute the alignment of Wang & Isola (2020) of two views of each image ``(N, 2, D)``.

    The mean squared distance of their features on the unit sphere: 0 when both views of each image
    are the same, 2 when they have nothing in common.

    >>> round(alignment(torch.eye(2)[None]), 4)
    2.0
    """
    first, second = F.normalize(views.float(), dim=2).unbind(1)
    return float((first - second).square().sum(1).double().mean())
