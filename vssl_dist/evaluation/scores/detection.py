"""How well a score tells what is out of distribution: AUROC, AUPR, FPR at 95 % TPR.

A higher score means more anomalous, and what is out of distribution counts as positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_AT_ONCE = 4_000_000
_POINTS = 2000


class Detection(NamedTuple):
    """Each a number, or one per resampling."""

    auroc: Any
    """Probability that what is outside scores higher than what is inside; ties count half."""
    aupr: Any
    """Average precision."""
    fpr95: Any
    """Share of what is inside that is flagged by the highest threshold that flags at least 95 %
    of what is outside."""


def detection(inside: Floats, outside: Floats) -> Detection:
    """The three figures of one score.

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
    found = ranked.figures(np.ones((1, len(inside))), np.ones((1, len(outside))))
    return Detection(*(float(values[0]) for values in found))


def roc(inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
    """The curve behind the AUROC: false and true positive rates, from (0, 0) to (1, 1).

    One point per distinct score; of more than 2,000, as many evenly spaced ones.

    >>> roc(np.array([0.0, 2.0]), np.array([1.0, 3.0]))[0].tolist()
    [0.0, 0.0, 0.5, 0.5, 1.0]
    """
    ranked = _Ranked(inside, outside)
    rates = ranked.rates(np.ones((1, len(inside))), np.ones((1, len(outside))))
    false, true = (np.r_[0.0, rate[0]] for rate in rates)
    kept = np.unique(np.linspace(0, len(false) - 1, min(len(false), _POINTS)).astype(int))
    return false[kept], true[kept]


def intervals(
    inside: Floats, outside: Floats, *, count: int, seed: int = 0, level: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of `detection`, both sides resampled independently.

    Args:
        inside, outside: See `detection`.
        count: Resamplings.
        seed: Of the resamplings.
        level: Share of the resamplings inside an interval.

    Returns:
        Lower and upper end by the figure's name.
    """
    ranked = _Ranked(inside, outside)
    drawn = [ranked.figures(*weights) for weights in _weights(inside, outside, count, seed)]
    ends = [100 * (1 - level) / 2, 100 * (1 + level) / 2]
    found = {}
    for number, name in enumerate(Detection._fields):
        low, high = np.percentile(np.concatenate([part[number] for part in drawn]), ends)
        found[name] = (float(low), float(high))
    return found


def _weights(
    inside: Floats, outside: Floats, count: int, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    """How often each score is drawn in each resampling, some resamplings at a time."""
    sizes = len(inside), len(outside)
    # One generator per side: the draws do not depend on how many are made at a time.
    randoms = [np.random.default_rng([seed, side]) for side in range(2)]
    block = max(_AT_ONCE // sum(sizes), 1)
    for start in range(0, count, block):
        rows = min(block, count - start)
        one, other = (
            np.stack([np.bincount(r.integers(n, size=n), minlength=n) for _ in range(rows)])
            for r, n in zip(randoms, sizes, strict=True)
        )
        yield one.astype(np.float64), other.astype(np.float64)


class _Ranked:
    """The distinct scores from the highest on; weights then say how often each one counts."""

    def __init__(self, inside: Floats, outside: Floats) -> None:
        if not len(inside) or not len(outside):
            raise ValueError("scores of at least one image on each side are needed")
        scores = np.concatenate([inside, outside])
        if not np.isfinite(scores).all():
            raise ValueError(f"{int((~np.isfinite(scores)).sum())} scores are not finite")
        self.order = np.argsort(-scores, kind="stable")
        ranked = scores[self.order]
        self.starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])

    def figures(self, inside: Floats, outside: Floats) -> Detection:
        """The figures for weights ``(R, N)`` and ``(R, M)``, each ``(R,)``."""
        false, true = self._counts(inside, outside)
        fpr, tpr = false / false[:, -1:], true / true[:, -1:]
        before_f, before_t = (np.pad(r, ((0, 0), (1, 0)))[:, :-1] for r in (fpr, tpr))
        auroc = ((fpr - before_f) * (tpr + before_t) / 2).sum(1)
        precision = true / np.maximum(true + false, 1)
        aupr = ((tpr - before_t) * precision).sum(1)
        first = (tpr >= 0.95).argmax(1)
        return Detection(auroc, aupr, fpr[np.arange(len(fpr)), first])

    def rates(self, inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
        """False and true positive rates at each distinct score, the highest first."""
        false, true = self._counts(inside, outside)
        return false / false[:, -1:], true / true[:, -1:]

    def _counts(self, inside: Floats, outside: Floats) -> tuple[Floats, Floats]:
        false = self._cumulative(inside, np.zeros_like(outside))
        return false, self._cumulative(np.zeros_like(inside), outside)

    def _cumulative(self, inside: Floats, outside: Floats) -> Floats:
        weights = np.concatenate([inside, outside], axis=1)[:, self.order]
        total: Floats = np.add.reduceat(weights, self.starts, axis=1).cumsum(1)
        return total.astype(np.float64)
