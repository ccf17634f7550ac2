"""Calibration against scikit-learn, a loop over the bins and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

from vssl_dist.evaluation.scores.calibration import (
    PredictionOutcomes,
    bin_by_confidence,
    bin_by_confidence_rank,
    compute_calibration,
    judge_predictions,
    judge_probe_predictions,
)
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.models.linear_probe import Probe
from vssl_dist.vision import torchvision

CLASSES = 6


def predictions(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Too sure of itself, right a little more often than not."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (samples,), generator=random)
    logits = 3 * torch.randn(samples, CLASSES, generator=random, dtype=torch.float64)
    logits[torch.arange(samples), labels] += 3
    return logits, labels


def said(confidence: list[float], correct: list[int]) -> PredictionOutcomes:
    zeros = np.zeros(len(correct))
    return PredictionOutcomes(np.array(confidence), np.array(correct, float), zeros, zeros)


def test_brier_and_likelihood_are_scikit_learns() -> None:
    logits, labels = predictions(500, seed=1)
    actual = compute_calibration(judge_predictions(logits, labels))
    p = logits.softmax(1).numpy()
    assert actual.brier == pytest.approx(brier_score_loss(labels, p, labels=range(CLASSES)))
    assert actual.nll == pytest.approx(log_loss(labels, p))


def test_the_error_is_that_of_a_loop_over_the_bins() -> None:
    logits, labels = predictions(700, seed=2)
    p, best = logits.softmax(1).max(1)
    error = 0.0
    for number in range(15):
        inside = (p > number / 15) & (p <= (number + 1) / 15)
        if inside.any():
            gap = (best[inside] == labels[inside]).double().mean() - p[inside].mean()
            error += abs(float(gap)) * int(inside.sum()) / 700
    assert compute_calibration(judge_predictions(logits, labels)).ece == pytest.approx(error)
    assert error > 0.02, "nothing to find"


def test_the_error_is_torchmetrics() -> None:
    torchvision()  # torchmetrics imports it, and must find it open
    functional = pytest.importorskip(
        "torchmetrics.functional.classification", reason="pip install .[compare]"
    )
    logits, labels = predictions(700, seed=3)
    expected = functional.multiclass_calibration_error(
        logits.softmax(1), labels, CLASSES, n_bins=15
    )
    assert compute_calibration(judge_predictions(logits, labels)).ece == pytest.approx(
        float(expected), abs=1e-6
    )


def test_adaptive_bins_hold_equally_many() -> None:
    logits, labels = predictions(700, seed=4)
    actual = bin_by_confidence_rank(judge_predictions(logits, labels))
    assert actual.predictions.tolist() == pytest.approx([700 / 15] * 15, abs=1)
    p, best = logits.softmax(1).max(1)
    order = p.argsort()
    gaps = ((best == labels).double() - p)[order]
    parts = np.split(gaps.numpy(), np.cumsum(actual.predictions.astype(int))[:-1])
    assert actual.calibration_error == pytest.approx(sum(abs(part.sum()) for part in parts) / 700)


@pytest.mark.parametrize(
    ("confidence", "correct", "ece", "adaptive"),
    [
        ([0.75] * 4, [1, 1, 1, 0], 0.0, 0.0),
        ([1.0] * 4, [0, 0, 0, 0], 1.0, 1.0),
        ([1.0] * 4, [1, 1, 1, 1], 0.0, 0.0),
        ([0.9, 0.9, 0.5, 0.5], [1, 1, 0, 0], 0.3, 0.3),
        # Within one bin of equal width two errors cancel; apart they do not.
        ([0.61, 0.65], [1, 0], 0.13, (0.39 + 0.65) / 2),
        ([0.5], [0], 0.5, 0.5),
    ],
)
def test_cases_worked_out_by_hand(
    confidence: list[float], correct: list[int], ece: float, adaptive: float
) -> None:
    actual = compute_calibration(said(confidence, correct))
    assert actual.ece == pytest.approx(ece)
    assert actual.adaptive_ece == pytest.approx(adaptive)


def test_a_bin_owns_its_upper_end() -> None:
    edges = bin_by_confidence(said([1 / 3, 1 / 3 + 1e-9, 2 / 3, 1.0], [1, 1, 1, 1]), bin_count=3)
    assert edges.predictions.tolist() == [1, 2, 1]


def test_the_order_of_equal_confidences_does_not_matter() -> None:
    random = np.random.default_rng(0)
    confidence = random.choice([0.2, 0.5, 0.51, 0.9], 200)
    correct = random.integers(0, 2, 200)
    actual = compute_calibration(said(list(confidence), list(correct)))
    turned = random.permutation(200)
    again = compute_calibration(said(list(confidence[turned]), list(correct[turned])))
    assert again == pytest.approx(actual)


def test_a_probe_is_judged_in_blocks_as_at_once() -> None:
    random = torch.Generator().manual_seed(5)
    features = LabelledFeatures(torch.randn(9000, 4, generator=random), torch.arange(9000) % 3)
    probe = Probe(torch.randn(4, 3, generator=random), torch.zeros(3))
    once = judge_predictions(features.features @ probe.weight, features.labels)
    for actual, expected in zip(judge_probe_predictions(probe, features), once, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_hopeless_but_certain_prediction_stays_finite() -> None:
    actual = compute_calibration(judge_predictions(torch.tensor([[1e4, 0.0]]), torch.tensor([1])))
    assert actual == pytest.approx((1.0, 1.0, 2.0, 1e4))


def test_nothing_to_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        compute_calibration(said([], []))
