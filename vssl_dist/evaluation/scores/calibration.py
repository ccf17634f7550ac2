"""Whether a classifier is right as often as it says: calibration of its largest probability."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.evaluation.scores.probe import blocks
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.models.linear_probe import Probe

Floats = NDArray[np.float64]
BINS = 15


class Outcomes(NamedTuple):
    """How each of ``N`` predictions turned out, ``(N,)`` each."""

    confidence: Floats
    """The largest probability."""
    correct: Floats
    """1 where its class is the label, else 0; of equal probabilities the lower class is meant."""
    brier: Floats
    """Squared distance of the probabilities from the label's, summed over the classes: 0 to 2."""
    nll: Floats
    """Minus the logarithm of the label's probability."""


class Calibration(NamedTuple):
    """Calibration errors and proper scores of many predictions, all of them 0 at best."""

    ece: float
    adaptive_ece: float
    brier: float
    nll: float


class Reliability(NamedTuple):
    """Mean confidence, accuracy and number of predictions of each bin that has some."""

    confidence: Floats
    accuracy: Floats
    predictions: Floats

    @property
    def error(self) -> float:
        """Mean distance of accuracy from confidence, weighted by the bins' predictions."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((gaps * self.predictions).sum() / self.predictions.sum())


def outcomes(logits: Tensor, labels: Tensor) -> Outcomes:
    """Judge predictions, in float64.

    Args:
        logits: ``(N, C)``, finite.
        labels: ``(N,)`` int64 below C.

    >>> outcomes(torch.zeros(1, 2), torch.tensor([1])).brier.tolist()
    [0.5]
    """
    log_p = torch.log_softmax(logits.double(), 1)
    p = log_p.exp()
    confidence, predicted = p.max(1)
    correct = (predicted == labels).double()
    brier = (p - F.one_hot(labels, logits.shape[1])).square().sum(1)
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    return Outcomes(*(values.cpu().numpy() for values in (confidence, correct, brier, nll)))


def probe_outcomes(probe: Probe, features: Features) -> Outcomes:
    """Judge a probe's predictions, some thousand images at a time; see `outcomes`."""
    by_block = [
        outcomes(probe.logits(x.to(probe.weight.device)).cpu(), y) for x, y in blocks(features)
    ]
    return Outcomes(*(np.concatenate(column) for column in zip(*by_block, strict=True)))


def calibration(predictions: Outcomes) -> Calibration:
    """Compute ECE, adaptive ECE, Brier score and negative log-likelihood.

    Raises:
        ValueError: There is no prediction.

    >>> sure = torch.tensor([[50.0, 0.0]]).repeat(4, 1)
    >>> round(calibration(outcomes(sure, torch.tensor([0, 0, 0, 1]))).ece, 6)
    0.25
    """
    return Calibration(
        reliability(predictions).error,
        adaptive_reliability(predictions).error,
        float(predictions.brier.mean()),
        float(predictions.nll.mean()),
    )


def reliability(predictions: Outcomes, bins: int = BINS) -> Reliability:
    """Bin predictions by confidence in equal widths, upper ends included (Guo et al., 2017).

    Its `Reliability.error` is the expected calibration error.

    Raises:
        ValueError: There is no prediction.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return _binned(predictions, np.searchsorted(edges, predictions.confidence, side="left"))


def adaptive_reliability(predictions: Outcomes, bins: int = BINS) -> Reliability:
    """Bin predictions by confidence, equally many in each bin (Nixon et al., 2019).

    Equal confidences share the bin of the first of them, so that the order does not matter.

    Raises:
        ValueError: There is no prediction.
    """
    ascending = np.sort(predictions.confidence)
    first = np.searchsorted(ascending, predictions.confidence, side="left")
    return _binned(predictions, first * bins // max(len(ascending), 1))


def _binned(predictions: Outcomes, bin_index: NDArray[np.int64]) -> Reliability:
    if not len(bin_index):
        raise ValueError("calibration needs at least one prediction")
    count = np.bincount(bin_index)
    # An empty bin has no mean and, in the weighted error, no weight.
    filled = count > 0
    confidence, accuracy = (
        np.bincount(bin_index, weights=values)[filled] / count[filled]
        for values in (predictions.confidence, predictions.correct)
    )
    return Reliability(confidence, accuracy, count[filled].astype(np.float64))
