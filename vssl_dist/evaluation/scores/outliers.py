"""Scores of how foreign an image is, from frozen features; a higher score is more anomalous.

Each takes features ``(M, D)`` to float64 scores ``(M,)`` on the CPU and is fitted on the training
images alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vssl_dist.evaluation.scores.logistic import logistic
from vssl_dist.evaluation.scores.neighbours import neighbours
from vssl_dist.evaluation.scores.probe import (
    CHUNK,
    Training,
    blocks,
)
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.scores.variational import (
    Score,
    Scoring,
    variational_scores,
)

_FLOOR = 1e-6
_WIDEST = 8192


@dataclass(frozen=True)
class Fitting:
    """The training images, and how the scores are fitted to them."""

    bank: Features
    classes: int
    k: int
    l2: float
    device: str = "cpu"
    variational: Scoring | None = None
    """Of an export that has a posterior."""


def fit_scores(fitting: Fitting) -> dict[str, Score]:
    """Every score by its name.

    ``knn``, ``mahalanobis``, ``max_softmax``, ``norm`` and, of an export that has a posterior,
    those of `variational_scores`.

    Without ``mahalanobis`` where features are wider than 8,192 (its covariance would fill the
    memory: raw pixels of large images), without ``max_softmax`` where there is only one class.
    """
    scores: dict[str, Score] = {"knn": knn_distance(fitting)}
    if fitting.bank.features.shape[1] <= _WIDEST:
        scores["mahalanobis"] = mahalanobis(fitting)
    if int(fitting.bank.labels.min()) < int(fitting.bank.labels.max()):
        scores["max_softmax"] = max_softmax(fitting)
    scores["norm"] = smallness
    if fitting.variational is not None:
        scores |= variational_scores(fitting.variational, fitting.bank)
    return scores


def knn_distance(fitting: Fitting) -> Score:
    """Cosine distance to the ``k``-th nearest training image (Sun et al., 2022).

    The farthest one where the bank has fewer than ``k``.
    """

    def score(features: Tensor) -> Tensor:
        found, _ = neighbours(fitting.bank.features, features, fitting.k, CHUNK, fitting.device)
        return 1 - found[:, -1].double().cpu()

    return score


def mahalanobis(fitting: Fitting) -> Score:
    """Squared Mahalanobis distance to the nearest class mean, one covariance for all classes
    (Lee et al., 2018).

    Directions in which training images hardly vary count as if they had a millionth of the mean
    variance, so that leaving them is anomalous, too.
    """
    means = class_means(fitting.bank)
    scatter = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
    known = torch.from_numpy(np.unique(fitting.bank.labels.numpy()))
    for x, labels in blocks(fitting.bank):
        centred = x.double() - means[torch.searchsorted(known, labels)]
        scatter += centred.T @ centred
    values, axes = torch.linalg.eigh(scatter / len(fitting.bank.labels))
    floor = max(_FLOOR * float(values.clamp_min(0).mean()), torch.finfo(torch.float32).tiny)
    whiten = axes / values.clamp_min(floor).sqrt()
    centres = means @ whiten

    def score(features: Tensor) -> Tensor:
        found = [
            torch.cdist(block.double() @ whiten, centres).square().amin(1)
            for block in torch.split(features, CHUNK)
        ]
        return torch.cat(found)

    return score


def smallness(features: Tensor) -> Tensor:
    """Minus the norm: a short embedding counts as foreign, as in CSI (Tack et al., 2020).

    The baseline of whatever else depends on the norm.  A score that takes long embeddings for
    foreign has 1 minus its AUROC when it knows nothing but the norm.
    """
    blocks = torch.split(features, CHUNK)
    return torch.cat([-block.double().norm(dim=1).cpu() for block in blocks])


def class_means(bank: Features) -> Tensor:
    """The mean of each class that has images, in the order of their labels: ``(K, D)`` float64."""
    known = torch.from_numpy(np.unique(bank.labels.numpy()))
    total = torch.zeros(len(known), bank.features.shape[1], dtype=torch.float64)
    for x, labels in blocks(bank):
        total.index_add_(0, torch.searchsorted(known, labels), x.double())
    count = torch.bincount(torch.searchsorted(known, bank.labels), minlength=len(known))
    return total / count[:, None]


def max_softmax(fitting: Fitting) -> Score:
    """Minus the largest class probability of a logistic regression (Hendrycks & Gimpel, 2017).

    As minus the log-odds it would rank alike and keep digits near 1: what is returned is the
    logarithm of the other classes' probability.
    """
    rows = torch.arange(len(fitting.bank.labels))
    data = Training(fitting.bank, rows, fitting.classes, fitting.device)
    (probe,) = logistic(data, [fitting.l2]).values()

    def score(features: Tensor) -> Tensor:
        found = []
        for block in torch.split(features, CHUNK):
            logits = probe.logits(block)
            best = logits.argmax(1, keepdim=True)
            others = logits.scatter(1, best, -torch.inf).logsumexp(1)
            found.append(others - logits.logsumexp(1))
        return torch.cat(found)

    return score
