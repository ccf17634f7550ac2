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
    """What became of each of ``N`` predictions, ``(N,)`` each."""

    confidence: Floats
    """The largest probability."""
    correct: Floats
    """1 where its class is the label, else 0; of equal probabilities the lower class is meant."""
    brier: Floats
    """Squared distance of the probabilities from the label's, summed over the classes: 0 to 2."""
    nll: Floats
    """Minus the logarithm of the label's probability."""


class Calibration(NamedTuple):
    """All of them are 0 at best."""

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
        """Mean distance of accuracy from confidence, weighted by their number."""
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
    confidence, best = p.max(1)
    brier = (p - F.one_hot(labels, logits.shape[1])).square().sum(1)
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    found = (confidence, (best == labels).double(), brier, nll)
    return Outcomes(*(values.cpu().numpy() for values in found))


def outcomes_of(probe: Probe, features: Features) -> Outcomes:
    """`outcomes` of a probe's predictions, some thousand images at a time."""
    parts = [
        outcomes(probe.logits(x.to(probe.weight.device)).cpu(), y) for x, y in blocks(features)
    ]
    return Outcomes(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def calibration(found: Outcomes) -> Calibration:
    """ECE, adaptive ECE, Brier score and negative log-likelihood.

    Raises:
        ValueError: There is no prediction.

    >>> sure = torch.tensor([[50.0, 0.0]]).repeat(4, 1)
    >>> round(calibration(outcomes(sure, torch.tensor([0, 0, 0, 1]))).ece, 6)
    0.25
    """
    return Calibration(
        reliability(found).error,
        adaptive_reliability(found).error,
        float(found.brier.mean()),
        float(found.nll.mean()),
    )


def reliability(found: Outcomes, bins: int = BINS) -> Reliability:
    """Predictions by confidence in bins of equal width, each with its upper end (Guo et al., 2017).

    Its `Reliability.error` is the expected calibration error.

    Raises:
        ValueError: There is no prediction.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    return _binned(found, np.searchsorted(edges, found.confidence, side="left"))


def adaptive_reliability(found: Outcomes, bins: int = BINS) -> Reliability:
    """The same in bins of equally many predictions (Nixon et al., 2019).

    Equal confidences share the bin of the first of them, so that the order does not matter.

    Raises:
        ValueError: There is no prediction.
    """
    order = np.sort(found.confidence)
    first = np.searchsorted(order, found.confidence, side="left")
    return _binned(found, first * bins // max(len(order), 1))


def _binned(found: Outcomes, place: NDArray[np.int64]) -> Reliability:
    if not len(place):
        raise ValueError("calibration needs at least one prediction")
    count = np.bincount(place)
    filled = count > 0
    confidence, correct = (
        np.bincount(place, weights=values)[filled] / count[filled]
        for values in (found.confidence, found.correct)
    )
    return Reliability(confidence, correct, count[filled].astype(np.float64))
