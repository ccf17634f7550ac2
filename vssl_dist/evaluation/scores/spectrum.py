"""Whether features still fill their space."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.evaluation.scores.probe import ROWS_PER_BLOCK

_UNIFORMITY_BLOCK_ROWS = 2048
_MAX_SPECTRUM_WIDTH = 4096


def compute_singular_values(features: Tensor, *, subtract_mean: bool = False) -> Tensor:
    """Compute the singular values of features ``(N, D)``, the largest first: float64.

    Those that are rounding errors of float32 features are 0.  Of features wider than 4,096, as
    raw pixels of large images are, 4,096 evenly spaced rows are judged.

    Args:
        features: One row per image; there may be fewer rows than columns.
        subtract_mean: Whether their mean is taken away first.
    """
    if features.shape[1] > _MAX_SPECTRUM_WIDTH:
        features = features[:: max(len(features) // _MAX_SPECTRUM_WIDTH, 1)][:_MAX_SPECTRUM_WIDTH]
    mean = features.double().mean(0) if subtract_mean else torch.zeros(1, dtype=torch.float64)
    # Of the smaller Gram matrix, whose eigenvalues are the squares of the singular values.
    squared_singular_values = torch.linalg.eigvalsh(_smaller_gram_matrix(features, mean)).flip(0)
    # Float32 features have no digits below this; sums of rounding errors would count as ranks.
    eigenvalue_bound = squared_singular_values[0] + mean.square().sum() * (
        len(features) if subtract_mean else 0
    )
    rounding_floor = eigenvalue_bound * torch.finfo(torch.float32).eps ** 2 * max(features.shape)
    return torch.where(squared_singular_values > rounding_floor, squared_singular_values, 0).sqrt()


def effective_rank(singular_values: Tensor) -> float:
    """Compute the exponential of the entropy of singular values, as shares of their sum.

    What Roy & Vetterli (2007) call the effective rank of a matrix; the figures made of it are named
    by the matrix.  From 1 to their number; 1 where all are 0.

    >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])), 4)
    2.0
    """
    singular_value_sum = singular_values.sum()
    return (
        math.exp(float(torch.special.entr(singular_values / singular_value_sum).sum()))
        if singular_value_sum > 0
        else 1.0
    )


def rankme(features: Tensor) -> float:
    """Compute RankMe (Garrido et al., 2023): the `effective_rank` of features ``(N, D)``.

    Nothing is centred or normalised; from 1 to ``min(N, D)``.

    >>> round(rankme(torch.eye(5)), 4)
    5.0
    """
    return effective_rank(compute_singular_values(features))


def _smaller_gram_matrix(features: Tensor, mean: Tensor) -> Tensor:
    """Compute ``X^T X`` or ``X X^T``, whichever is smaller, in float64."""
    if len(features) < features.shape[1]:
        rows = features.double() - mean
        return rows @ rows.T
    gram = torch.zeros(features.shape[1], features.shape[1], dtype=torch.float64)
    for block in torch.split(features, ROWS_PER_BLOCK):
        rows = block.double() - mean
        gram += rows.T @ rows
    return gram


def uniformity(features: Tensor, sharpness: float = 2.0) -> float:
    """Compute the uniformity of Wang & Isola (2020) of features on the unit sphere.

    The logarithm of the mean of ``exp(-t |x - y|^2)`` over all pairs of distinct images: 0 when
    all are the same, lower is more uniform.

    Args:
        features: ``(N, D)``, ``N >= 2``.
        sharpness: Sharpness of the potential.

    >>> round(uniformity(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])), 4)
    -8.0
    """
    blocks = torch.split(F.normalize(features.float(), dim=1), _UNIFORMITY_BLOCK_ROWS)
    potential_sum = 0.0
    image_count = len(features)
    for block_index, block in enumerate(blocks):
        for other_index, other_block in enumerate(blocks):
            # |x - y|^2 = 2 - 2 <x, y> of unit vectors; rounding may leave it negative.
            squared_distances = (2 - 2 * block @ other_block.T).clamp_min(0)
            if block_index == other_index:
                squared_distances.fill_diagonal_(torch.inf)  # nothing is paired with itself
            potential_sum += float((-sharpness * squared_distances).exp().double().sum())
    return math.log(
        max(potential_sum, torch.finfo(torch.float64).tiny) / (image_count * (image_count - 1))
    )


def alignment(views: Tensor) -> float:
    """Compute the alignment of Wang & Isola (2020) of two views of each image ``(N, 2, D)``.

    The mean squared distance of their features on the unit sphere: 0 when both views of each image
    are the same, 2 when they have nothing in common.

    >>> round(alignment(torch.eye(2)[None]), 4)
    2.0
    """
    first_views, second_views = F.normalize(views.float(), dim=2).unbind(1)
    return float((first_views - second_views).square().sum(1).double().mean())
