"""How well a score tells what is out of distribution: AUROC, AUPR, FPR at 95 % TPR.

A higher score means more anomalous, and what is out of distribution counts as positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]
_MAX_RESAMPLED_SCORES = 4_000_000
_MAX_ROC_POINTS = 2000


class DetectionFigures(NamedTuple):
    """How well one score tells two groups of images apart."""

    auroc: float
    """Probability that what is outside scores higher than what is inside; ties count half."""
    aupr: float
    """Average precision."""
    fpr95: float
    """Share of what is inside that is flagged by the highest threshold that flags at least 95 %
    of what is outside."""


def compute_detection(
    inlier_scores: Float64Array, outlier_scores: Float64Array
) -> DetectionFigures:
    """Compute the three figures of one score.

    Args:
        inlier_scores: Scores in distribution ``(N,)``.
        outlier_scores: Scores out of distribution ``(M,)``.

    Raises:
        ValueError: One is empty or not finite.

    >>> compute_detection(np.array([0.0, 1.0]), np.array([2.0, 3.0]))
    DetectionFigures(auroc=1.0, aupr=1.0, fpr95=0.0)
    >>> compute_detection(np.array([2.0, 3.0]), np.array([0.0, 1.0])).auroc
    0.0
    """
    ranked_scores = _RankedScores(inlier_scores, outlier_scores)
    figures = ranked_scores.detection_figures(
        np.ones((1, len(inlier_scores))), np.ones((1, len(outlier_scores)))
    )
    return DetectionFigures(*(float(values[0]) for values in figures))


def roc_curve(
    inlier_scores: Float64Array, outlier_scores: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Compute the curve behind the AUROC: false and true positive rates from (0, 0) to (1, 1).

    One point per distinct score; of more than 2,000, as many evenly spaced ones.

    >>> roc_curve(np.array([0.0, 2.0]), np.array([1.0, 3.0]))[0].tolist()
    [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    ranked_scores = _RankedScores(inlier_scores, outlier_scores)
    rates = ranked_scores.false_and_true_positive_rates(
        np.ones((1, len(inlier_scores))), np.ones((1, len(outlier_scores)))
    )
    fpr, tpr = (np.r_[0.0, rate[0]] for rate in rates)
    kept_points = np.unique(
        np.linspace(0, len(fpr) - 1, min(len(fpr), _MAX_ROC_POINTS)).astype(int)
    )
    return fpr[kept_points], tpr[kept_points]


def bootstrap_intervals(
    inlier_scores: Float64Array,
    outlier_scores: Float64Array,
    *,
    resampling_count: int,
    seed: int = 0,
    confidence_level: float = 0.95,
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals of `compute_detection`, each side by itself.

    Args:
        inlier_scores, outlier_scores: See `compute_detection`.
        resampling_count: Number of resamplings.
        seed: Seed of the resamplings.
        confidence_level: Share of the resamplings inside an interval.

    Returns:
        Lower and upper end by the figure's name.
    """
    ranked_scores = _RankedScores(inlier_scores, outlier_scores)
    figures_by_block = [
        ranked_scores.detection_figures(*counts)
        for counts in _resampled_counts(inlier_scores, outlier_scores, resampling_count, seed)
    ]
    percentiles = [100 * (1 - confidence_level) / 2, 100 * (1 + confidence_level) / 2]
    intervals = {}
    for figure_name, figure_blocks in zip(
        DetectionFigures._fields, zip(*figures_by_block, strict=True), strict=True
    ):
        interval_low, interval_high = np.percentile(np.concatenate(figure_blocks), percentiles)
        intervals[figure_name] = (float(interval_low), float(interval_high))
    return intervals


def _resampled_counts(
    inlier_scores: Float64Array, outlier_scores: Float64Array, resampling_count: int, seed: int
) -> Iterator[tuple[Float64Array, Float64Array]]:
    """Yield how often each score is drawn in each resampling, some resamplings at a time."""
    score_counts = (len(inlier_scores), len(outlier_scores))
    # One generator per side: the draws do not depend on how many are made at a time.
    generators = [np.random.default_rng([seed, side_index]) for side_index in range(2)]
    block_resamplings = max(_MAX_RESAMPLED_SCORES // sum(score_counts), 1)
    for start in range(0, resampling_count, block_resamplings):
        resamplings = min(block_resamplings, resampling_count - start)
        inlier_counts, outlier_counts = (
            np.stack(
                [
                    np.bincount(
                        generator.integers(score_count, size=score_count), minlength=score_count
                    )
                    for _ in range(resamplings)
                ]
            )
            for generator, score_count in zip(generators, score_counts, strict=True)
        )
        yield inlier_counts.astype(np.float64), outlier_counts.astype(np.float64)


class _RankedScores:
    """The distinct scores, the highest first; weights say how often each score counts.

    Sorted once: a resampling changes only the weights.
    """

    def __init__(self, inlier_scores: Float64Array, outlier_scores: Float64Array) -> None:
        if not len(inlier_scores) or not len(outlier_scores):
            raise ValueError("scores of at least one image on each side are needed")
        scores = np.concatenate([inlier_scores, outlier_scores])
        if not np.isfinite(scores).all():
            raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
        self.descending_order = np.argsort(-scores, kind="stable")
        descending_scores = scores[self.descending_order]
        self.distinct_score_starts = np.flatnonzero(
            np.r_[True, descending_scores[1:] != descending_scores[:-1]]
        )

    def detection_figures(
        self, inlier_counts: Float64Array, outlier_counts: Float64Array
    ) -> tuple[Float64Array, Float64Array, Float64Array]:
        """Compute AUROC, AUPR and FPR95 for weights ``(R, N)`` and ``(R, M)``, each ``(R,)``."""
        false_positives, true_positives = self._false_and_true_positives(
            inlier_counts, outlier_counts
        )
        fpr = false_positives / false_positives[:, -1:]
        tpr = true_positives / true_positives[:, -1:]
        previous_fpr, previous_tpr = (np.pad(rate, ((0, 0), (1, 0)))[:, :-1] for rate in (fpr, tpr))
        # Trapezia between distinct scores: on a tie the curve is a slope, which counts it half.
        auroc = ((fpr - previous_fpr) * (tpr + previous_tpr) / 2).sum(1)
        # A resampling may leave out the highest scores: nothing is flagged there yet.
        precision = true_positives / np.maximum(true_positives + false_positives, 1)
        aupr = ((tpr - previous_tpr) * precision).sum(1)
        first_at_95_tpr = (tpr >= 0.95).argmax(1)
        return auroc, aupr, fpr[np.arange(len(fpr)), first_at_95_tpr]

    def false_and_true_positive_rates(
        self, inlier_counts: Float64Array, outlier_counts: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Compute false and true positive rates at each distinct score, the highest first."""
        false_positives, true_positives = self._false_and_true_positives(
            inlier_counts, outlier_counts
        )
        return (
            false_positives / false_positives[:, -1:],
            true_positives / true_positives[:, -1:],
        )

    def _false_and_true_positives(
        self, inlier_counts: Float64Array, outlier_counts: Float64Array
    ) -> tuple[Float64Array, Float64Array]:
        """Count false and true positives if each distinct score in turn is the threshold."""
        false_positives = self._cumulative(inlier_counts, np.zeros_like(outlier_counts))
        return false_positives, self._cumulative(np.zeros_like(inlier_counts), outlier_counts)

    def _cumulative(
        self, inlier_counts: Float64Array, outlier_counts: Float64Array
    ) -> Float64Array:
        ordered_weights = np.concatenate([inlier_counts, outlier_counts], axis=1)[
            :, self.descending_order
        ]
        cumulative_weights: Float64Array = np.add.reduceat(
            ordered_weights, self.distinct_score_starts, axis=1
        ).cumsum(1)
        return cumulative_weights.astype(np.float64)
