"""Whether a classifier is right as often as it says: calibration of its largest probability."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.evaluation.scores.probe import iterate_blocks
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.models.linear_probe import Probe

Float64Array = NDArray[np.float64]
DEFAULT_BIN_COUNT = 15


class PredictionOutcomes(NamedTuple):
    """How each of ``N`` predictions turned out, ``(N,)`` each."""

    confidence: Float64Array
    """The largest probability."""
    correct: Float64Array
    """1 where its class is the label, else 0; of equal probabilities the lower class is meant."""
    brier: Float64Array
    """Squared distance of the probabilities from the label's, summed over the classes: 0 to 2."""
    nll: Float64Array
    """Minus the logarithm of the label's probability."""


class CalibrationErrors(NamedTuple):
    """Calibration errors and proper scores of many predictions, all of them 0 at best."""

    ece: float
    adaptive_ece: float
    brier: float
    nll: float


class ReliabilityBins(NamedTuple):
    """Mean confidence, accuracy and number of predictions of each bin that has some."""

    confidence: Float64Array
    accuracy: Float64Array
    predictions: Float64Array

    @property
    def calibration_error(self) -> float:
        """Mean distance of accuracy from confidence, weighted by the bins' predictions."""
        accuracy_gaps = np.abs(self.accuracy - self.confidence)
        return float((accuracy_gaps * self.predictions).sum() / self.predictions.sum())


def judge_predictions(logits: Tensor, labels: Tensor) -> PredictionOutcomes:
    """Judge predictions, in float64.

    Args:
        logits: ``(N, C)``, finite.
        labels: ``(N,)`` int64 below C.

    >>> judge_predictions(torch.zeros(1, 2), torch.tensor([1])).brier.tolist()
    [0.5]
    """
    log_probabilities = torch.log_softmax(logits.double(), 1)
    probabilities = log_probabilities.exp()
    confidence, predicted_class = probabilities.max(1)
    correct = (predicted_class == labels).double()
    brier = (probabilities - F.one_hot(labels, logits.shape[1])).square().sum(1)
    nll = -log_probabilities.gather(1, labels[:, None])[:, 0]
    return PredictionOutcomes(
        *(values.cpu().numpy() for values in (confidence, correct, brier, nll))
    )


def judge_probe_predictions(probe: Probe, features: LabelledFeatures) -> PredictionOutcomes:
    """Judge a probe's predictions, some thousand images at a time; see `judge_predictions`."""
    outcomes_by_block = [
        judge_predictions(probe.logits(x.to(probe.weight.device)).cpu(), y)
        for x, y in iterate_blocks(features)
    ]
    return PredictionOutcomes(
        *(np.concatenate(outcome_blocks) for outcome_blocks in zip(*outcomes_by_block, strict=True))
    )


def compute_calibration(predictions: PredictionOutcomes) -> CalibrationErrors:
    """Compute ECE, adaptive ECE, Brier score and negative log-likelihood.

    Raises:
        ValueError: There is no prediction.

    >>> sure = torch.tensor([[50.0, 0.0]]).repeat(4, 1)
    >>> round(compute_calibration(judge_predictions(sure, torch.tensor([0, 0, 0, 1]))).ece, 6)
    0.25
    """
    return CalibrationErrors(
        bin_by_confidence(predictions).calibration_error,
        bin_by_confidence_rank(predictions).calibration_error,
        float(predictions.brier.mean()),
        float(predictions.nll.mean()),
    )


def bin_by_confidence(
    predictions: PredictionOutcomes, bin_count: int = DEFAULT_BIN_COUNT
) -> ReliabilityBins:
    """Bin predictions by confidence in equal widths, upper ends included (Guo et al., 2017).

    Its `ReliabilityBins.calibration_error` is the expected calibration error.

    Raises:
        ValueError: There is no prediction.
    """
    inner_bin_edges = np.linspace(0, 1, bin_count + 1)[1:-1]
    return _summarise_bins(
        predictions, np.searchsorted(inner_bin_edges, predictions.confidence, side="left")
    )


def bin_by_confidence_rank(
    predictions: PredictionOutcomes, bin_count: int = DEFAULT_BIN_COUNT
) -> ReliabilityBins:
    """Bin predictions by confidence, equally many in each bin (Nixon et al., 2019).

    Equal confidences share the bin of the first of them, so that the order does not matter.

    Raises:
        ValueError: There is no prediction.
    """
    ascending_confidence = np.sort(predictions.confidence)
    first_rank = np.searchsorted(ascending_confidence, predictions.confidence, side="left")
    return _summarise_bins(predictions, first_rank * bin_count // max(len(ascending_confidence), 1))


def _summarise_bins(
    predictions: PredictionOutcomes, bin_index: NDArray[np.int64]
) -> ReliabilityBins:
    if not len(bin_index):
        raise ValueError("calibration needs at least one prediction")
    predictions_in_bin = np.bincount(bin_index)
    # An empty bin has no mean and, in the weighted error, no weight.
    is_filled = predictions_in_bin > 0
    confidence, accuracy = (
        np.bincount(bin_index, weights=values)[is_filled] / predictions_in_bin[is_filled]
        for values in (predictions.confidence, predictions.correct)
    )
    return ReliabilityBins(confidence, accuracy, predictions_in_bin[is_filled].astype(np.float64))
