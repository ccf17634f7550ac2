"""How well a score tells what is out of distribution: AUROC, AUPR, FPR at 95 % TPR.

A higher score means more anomalous, and what is out of distribution counts as positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_AT_ONCE = 4_000_000
_POINTS = 2000


class Detection(NamedTuple):
    """How well one score tells two groups of images apart."""

    auroc: float
    """Probability that what is outside scores higher than what is inside; ties count half."""
    aupr: float
    """Average precision."""
    fpr95: float
    """Share of what is inside that is flagged by the highest threshold that flags at least 95 %
    of what is outside."""


def detection(inside: Floats, outside: Floats) -> Detection:
    """Compute the three figures of one score.

    Args:
        inside: Scores in distribution ``(N,)``.
        outside: Scores out of distribution ``(M,)``.

    Raises:
        ValueError: One is empty or not finite.

    >>> detection(np.array([0.0, 1.0]), np.array([2.0, 3.0]))
    Detection(auroc=1.0, aupr=1.0, fpr95=0.0)
    >>> detection(np.array([2.0, 3.0]), np.array([0.0, 1.0])).auroc
    0.0
    """
    ranked = _Ranked(inside, outside)
    figures = ranked.figures(np.ones((1, len(inside))), np.ones((1, len(outside))))
    return Detection(*(float(values[0]) for values in figures))


def roc(inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
    """Compute the curve behind the AUROC: false and true positive rates from (0, 0) to (1, 1).

    One point per distinct score; of more than 2,000, as many evenly spaced ones.

    >>> roc(np.array([0.0, 2.0]), np.array([1.0, 3.0]))[0].tolist()
    [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    ranked = _Ranked(inside, outside)
    rates = ranked.rates(np.ones((1, len(inside))), np.ones((1, len(outside))))
    fpr, tpr = (np.r_[0.0, rate[0]] for rate in rates)
    indices = np.unique(np.linspace(0, len(fpr) - 1, min(len(fpr), _POINTS)).astype(int))
    return fpr[indices], tpr[indices]


def bootstrap_intervals(
    inside: Floats, outside: Floats, *, count: int, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals of `detection`, resampling each side by itself.

    Args:
        inside, outside: See `detection`.
        count: Number of resamplings.
        seed: Seed of the resamplings.
        level: Share of the resamplings inside an interval.

    Returns:
        Lower and upper end by the figure's name.
    """
    ranked = _Ranked(inside, outside)
    by_block = [ranked.figures(*weights) for weights in _weights(inside, outside, count, seed)]
    percentiles = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    intervals = {}
    for name, blocks in zip(Detection._fields, zip(*by_block, strict=True), strict=True):
        low, high = np.percentile(np.concatenate(blocks), percentiles)
        intervals[name] = (float(low), float(high))
    return intervals


def _weights(
    inside: Floats, outside: Floats, count: int, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    """Yield how often each score is drawn in each resampling, some resamplings at a time."""
    sizes = (len(inside), len(outside))
    # One generator per side: the draws do not depend on how many are made at a time.
    generators = [np.random.default_rng([seed, side]) for side in range(2)]
    block = max(_AT_ONCE // sum(sizes), 1)
    for start in range(0, count, block):
        rows = min(block, count - start)
        inside_counts, outside_counts = (
            np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(rows)])
            for rng, n in zip(generators, sizes, strict=True)
        )
        yield inside_counts.astype(np.float64), outside_counts.astype(np.float64)


class _Ranked:
    """The distinct scores, the highest first; weights say how often each score counts.

    Sorted once: a resampling changes only the weights.
    """

    def __init__(self, inside: Floats, outside: Floats) -> None:
        if not len(inside) or not len(outside):
            raise ValueError("scores of at least one image on each side are needed")
        scores = np.concatenate([inside, outside])
        if not np.isfinite(scores).all():
            raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])

    def figures(self, inside: Floats, outside: Floats) -> tuple[Floats, Floats, Floats]:
        """Compute AUROC, AUPR and FPR95 for weights ``(R, N)`` and ``(R, M)``, each ``(R,)``."""
        false_positives, true_positives = self._positives(inside, outside)
        fpr = false_positives / false_positives[:, -1:]
        tpr = true_positives / true_positives[:, -1:]
        previous_fpr, previous_tpr = (np.pad(r, ((0, 0), (1, 0)))[:, :-1] for r in (fpr, tpr))
        # Trapezia between distinct scores: on a tie the curve is a slope, which counts it half.
        auroc = ((fpr - previous_fpr) * (tpr + previous_tpr) / 2).sum(1)
        # A resampling may leave out the highest scores: nothing is flagged there yet.
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        aupr = ((tpr - previous_tpr) * precision).sum(1)
        first = (tpr >= 0.95).argmax(1)
        return auroc, aupr, fpr[np.arange(len(fpr)), first]

    def rates(self, inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
        """Compute false and true positive rates at each distinct score, the highest first."""
        false_positives, true_positives = self._positives(inside, outside)
        return (
            false_positives / false_positives[:, -1:],
            true_positives / true_positives[:, -1:],
        )

    def _positives(self, inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
        """Count false and true positives if each distinct score in turn is the threshold."""
        false_positives = self._cumulative(inside, np.zeros_like(outside))
        return false_positives, self._cumulative(np.zeros_like(inside), outside)

    def _cumulative(self, inside: Floats, outside: Floats) -> Floats:
        weights = np.concatenate([inside, outside], axis=1)[:, self.order]
        total: Floats = np.add.reduceat(weights, self.starts, axis=1).cumsum(1)
        return total.astype(np.float64)
