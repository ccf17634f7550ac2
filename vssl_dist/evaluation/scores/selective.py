"""Whether an uncertainty says anything: where predictions fail, and how spoilt an image is."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from vssl_dist.evaluation.scores.neighbours import neighbours
from vssl_dist.evaluation.scores.probe import CHUNK
from vssl_dist.evaluation.scores.table import Features

Floats = NDArray[np.float64]


def knn_failures(
    bank: Features, queries: Features, k: int, temperature: float, device: str = "cpu"
) -> Floats:
    """Tell which queries weighted k-NN gets wrong, ``(M,)`` of 0 and 1; see `knn.knn_grid`."""
    classes = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    nearest = neighbours(bank.features, queries.features, k, CHUNK, device)
    similarity, index = (column.cpu() for column in nearest)
    # Relative to the nearest one: the same winner, and no overflow when it is cold.
    weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
    failed = []
    for weight, voted, labels in zip(
        *(torch.split(t, CHUNK) for t in (weights, bank.labels[index], queries.labels)), strict=True
    ):
        votes = torch.zeros(len(labels), classes, dtype=torch.float64)
        failed.append(votes.scatter_add_(1, voted, weight).argmax(1) != labels)
    return torch.cat(failed).double().numpy()


def risk_coverage(uncertainty: Floats, failed: Floats) -> Floats:
    """Compute the share of failures among the ``i`` most certain images, ``i`` from 1 to ``N``.

    Of equally certain images any may come first: what is returned is the mean over their orders.

    Args:
        uncertainty: ``(N,)``, higher is less certain.
        failed: ``(N,)`` of 0 and 1.

    >>> risk_coverage(np.array([0.1, 0.9, 0.5]), np.array([0.0, 1.0, 0.0])).round(2).tolist()
    [0.0, 0.0, 0.33]
    """
    _, group, size = np.unique(uncertainty, return_inverse=True, return_counts=True)
    # Over all orders of a group of equals, each position fails as often as the group does.
    group_risk = np.bincount(group, failed) / size
    expected_risk: Floats = np.repeat(group_risk, size).cumsum() / np.arange(1, len(failed) + 1)
    return expected_risk


def aurc(uncertainty: Floats, failed: Floats) -> float:
    """Compute the area under the risk-coverage curve, its mean (Geifman & El-Yaniv, 2017).

    >>> aurc(np.array([0.1, 0.9]), np.array([0.0, 1.0]))
    0.25
    """
    return float(risk_coverage(uncertainty, failed).mean())


def spearman(values: Floats, strength: Floats) -> float:
    """Correlate the ranks of two rows of numbers, ties sharing theirs; 0 if one is constant.

    >>> spearman(np.array([1.0, 10.0, 100.0]), np.array([0.0, 1.0, 2.0]))
    1.0
    """
    return float(_correlation(rankdata(values)[None], rankdata(strength)[None])[0])


def within_image_spearman(values: Floats, strength: Floats) -> float:
    """Average over images `spearman` of ``(N, L)`` values with ``(L,)`` strengths."""
    ranks = rankdata(values, axis=1)
    return float(_correlation(ranks, rankdata(strength)[None]).mean())


def _correlation(a: Floats, b: Floats) -> Floats:
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norms = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    correlation: Floats = np.divide(
        (a * b).sum(1), norms, out=np.zeros_like(norms), where=norms > 0
    )
    return correlation


def extremes(values: Floats, count: int) -> tuple[list[int], list[int]]:
    """Find the rows of the smallest and the largest of ``(N,)`` values, at most ``count`` each.

    The most extreme one comes first; none is on both sides, unless it is the only one.

    >>> extremes(np.array([3.0, 1.0, 2.0]), count=2)
    ([1], [0])
    """
    order = values.argsort(kind="stable").tolist()
    count = max(1, min(count, len(order) // 2))
    return order[:count], order[::-1][:count]
