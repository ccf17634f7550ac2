"""Detection figures against hand-made cases, scikit-learn and a bootstrap in the plain way."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from vssl_dist.evaluation.scores.detection import (
    DetectionFigures,
    bootstrap_intervals,
    compute_detection,
)


def pair(seed: int, ties: bool) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    inside, outside = random.normal(0, 1, 300), random.normal(1, 1.5, 170)
    return (inside.round(1), outside.round(1)) if ties else (inside, outside)


def by_sklearn(inside: np.ndarray, outside: np.ndarray) -> DetectionFigures:
    foreign = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    scores = np.r_[inside, outside]
    fpr, tpr, _ = roc_curve(foreign, scores, drop_intermediate=False)
    area = roc_auc_score(foreign, scores), average_precision_score(foreign, scores)
    return DetectionFigures(*area, fpr[np.argmax(tpr >= 0.95)])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_figures_are_scikit_learns(seed: int, ties: bool) -> None:
    sides = pair(seed, ties)
    assert compute_detection(*sides) == pytest.approx(by_sklearn(*sides), abs=1e-12)


def test_separable_tied_and_inverted_scores_are_1_a_half_and_0() -> None:
    low, high = np.array([0.1, 0.2, 0.3]), np.array([1.0, 2.0])
    assert compute_detection(inlier_scores=low, outlier_scores=high) == DetectionFigures(
        1.0, 1.0, 0.0
    )
    assert compute_detection(inlier_scores=high, outlier_scores=low).auroc == 0
    assert compute_detection(inlier_scores=high, outlier_scores=low).fpr95 == 1
    same = np.ones(4)
    assert compute_detection(same, same) == DetectionFigures(0.5, 0.5, 1.0)


def test_only_the_order_of_the_scores_counts() -> None:
    inside, outside = pair(7, ties=True)
    assert compute_detection(np.exp(inside) - 3, np.exp(outside) - 3) == compute_detection(
        inside, outside
    )


def test_intervals_are_those_of_resampling_one_at_a_time() -> None:
    inside, outside = pair(3, ties=True)
    random = np.random.default_rng(11)
    drawn = [
        compute_detection(random.choice(inside, len(inside)), random.choice(outside, len(outside)))
        for _ in range(400)
    ]
    found = bootstrap_intervals(inside, outside, resampling_count=2000)
    for number, (name, ends) in enumerate(found.items()):
        expected = np.percentile([one[number] for one in drawn], [2.5, 97.5])
        # Ends scatter by about a tenth of the interval between 400 draws and 400 others.
        assert ends == pytest.approx(expected, abs=0.2 * (expected[1] - expected[0])), name
        assert ends[0] <= getattr(compute_detection(inside, outside), name) <= ends[1]


def test_intervals_repeat_and_do_not_depend_on_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = pair(4, ties=False)
    whole = bootstrap_intervals(*sides, resampling_count=50)
    monkeypatch.setattr("vssl_dist.evaluation.scores.detection._MAX_RESAMPLED_SCORES", 1)
    one_by_one = bootstrap_intervals(*sides, resampling_count=50)
    assert whole == bootstrap_intervals(*sides, resampling_count=50) == one_by_one
    assert whole != bootstrap_intervals(*sides, resampling_count=50, seed=1)


@pytest.mark.parametrize("bad", [np.array([]), np.array([0.0, np.nan]), np.array([np.inf])])
def test_scores_that_cannot_be_ranked_are_refused(bad: np.ndarray) -> None:
    for sides in ((bad, np.ones(2)), (np.ones(2), bad)):
        with pytest.raises(ValueError, match="scores"):
            compute_detection(*sides)
