"""Whether an uncertainty says anything: where predictions fail, and how spoilt an image is."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from vssl_dist.evaluation.scores.neighbours import find_neighbours
from vssl_dist.evaluation.scores.probe import ROWS_PER_BLOCK
from vssl_dist.evaluation.scores.table import LabelledFeatures

Float64Array = NDArray[np.float64]


def find_knn_failures(
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    k: int,
    temperature: float,
    device: str = "cpu",
) -> Float64Array:
    """Tell which queries weighted k-NN gets wrong, ``(M,)`` of 0 and 1; see `knn_accuracy_grid`."""
    class_count = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    neighbours = find_neighbours(bank.features, queries.features, k, ROWS_PER_BLOCK, device)
    similarity, neighbour_rows = (tensor.cpu() for tensor in neighbours)
    # Relative to the nearest one: the same winner, and no overflow when it is cold.
    all_vote_weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    failed_blocks = []
    for vote_weights, voted_labels, labels in zip(
        *(
            torch.split(table, ROWS_PER_BLOCK)
            for table in (all_vote_weights, bank.labels[neighbour_rows], queries.labels)
        ),
        strict=True,
    ):
        votes = torch.zeros(len(labels), class_count, dtype=torch.float64)
        failed_blocks.append(votes.scatter_add_(1, voted_labels, vote_weights).argmax(1) != labels)
    return torch.cat(failed_blocks).double().numpy()


def risk_coverage_curve(uncertainty: Float64Array, is_failure: Float64Array) -> Float64Array:
    """Compute the share of failures among the ``i`` most certain images, ``i`` from 1 to ``N``.

    Of equally certain images any may come first: what is returned is the mean over their orders.

    Args:
        uncertainty: ``(N,)``, higher is less certain.
        is_failure: ``(N,)`` of 0 and 1.

    >>> risk_coverage_curve(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 0.0])).round(2).tolist()
    [0.0, 0.0, 0.33]
    """
    _, tie_group, tie_group_size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    # Over all orders of a group of equals, each position fails as often as the group does.
    tie_group_risk = np.bincount(tie_group, is_failure) / tie_group_size
    expected_risk: Float64Array = np.repeat(tie_group_risk, tie_group_size).cumsum() / np.arange(
        1, len(is_failure) + 1
    )
    return expected_risk


def aurc(uncertainty: Float64Array, is_failure: Float64Array) -> float:
    """Compute the area under the risk-coverage curve, its mean (Geifman & El-Yaniv, 2017).

    >>> aurc(np.array([0.1, 0.9]), np.array([0.0, 1.0]))
    0.25
    """
    return float(risk_coverage_curve(uncertainty, is_failure).mean())


def spearman_correlation(values: Float64Array, other_values: Float64Array) -> float:
    """Correlate the ranks of two rows of numbers, ties sharing theirs; 0 if one is constant.

    >>> spearman_correlation(np.array([1.0, 10.0, 100.0]), np.array([0.0, 1.0, 2.0]))
    1.0
    """
    return float(_row_correlations(rankdata(values)[None], rankdata(other_values)[None])[0])


def mean_within_image_spearman(
    values_by_image: Float64Array, strength_by_level: Float64Array
) -> float:
    """Average over images `spearman_correlation` of ``(N, L)`` values with ``(L,)`` strengths."""
    value_ranks = rankdata(values_by_image, axis=1)
    return float(_row_correlations(value_ranks, rankdata(strength_by_level)[None]).mean())


def _row_correlations(a: Float64Array, b: Float64Array) -> Float64Array:
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm_products = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    correlation: Float64Array = np.divide(
        (a * b).sum(1), norm_products, out=np.zeros_like(norm_products), where=norm_products > 0
    )
    return correlation


def find_extreme_rows(values: Float64Array, max_per_side: int) -> tuple[list[int], list[int]]:
    """Find the rows of the smallest and largest of ``(N,)`` values, ``max_per_side`` each at most.

    The most extreme one comes first; none is on both sides, unless it is the only one.

    >>> find_extreme_rows(np.array([3.0, 1.0, 2.0]), max_per_side=2)
    ([1], [0])
    """
    ascending_rows = values.argsort(kind="stable").tolist()
    max_per_side = max(1, min(max_per_side, len(ascending_rows) // 2))
    return ascending_rows[:max_per_side], ascending_rows[::-1][:max_per_side]
