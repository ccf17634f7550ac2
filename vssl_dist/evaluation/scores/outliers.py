"""Scores of how foreign an image is, from frozen features; a higher score is more anomalous.

Each takes features ``(M, D)`` to float64 scores ``(M,)`` on the CPU and is fitted on the training
images alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vssl_dist.evaluation.scores.logistic import fit_logistic
from vssl_dist.evaluation.scores.neighbours import neighbours
from vssl_dist.evaluation.scores.probe import CHUNK, ProbeData, blocks
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.scores.variational import Score, VariationalSetup, variational_scores

_FLOOR = 1e-6
_WIDEST = 8192


@dataclass(frozen=True)
class OutlierSetup:
    """The training images, and how the scores are fitted to them."""

    bank: Features
    """Features and labels of the training images."""
    classes: int
    k: int
    """Which nearest neighbour's distance counts."""
    l2: float
    """Weight of the logistic regression's penalty."""
    device: str = "cpu"
    variational: VariationalSetup | None = None
    """The posterior of an export that has one, and how it judges."""


def fit_scores(setup: OutlierSetup) -> dict[str, Score]:
    """Fit every score to the bank, by name.

    ``knn``, ``mahalanobis``, ``max_softmax``, ``norm`` and, of an export that has a posterior,
    those of `variational_scores`.

    Without ``mahalanobis`` where features are wider than 8,192 (its covariance would fill the
    memory: raw pixels of large images), without ``max_softmax`` where there is only one class.
    """
    scores: dict[str, Score] = {"knn": knn_distance(setup)}
    if setup.bank.features.shape[1] <= _WIDEST:
        scores["mahalanobis"] = mahalanobis(setup)
    if int(setup.bank.labels.min()) < int(setup.bank.labels.max()):
        scores["max_softmax"] = max_softmax(setup)
    scores["norm"] = negative_norm
    if setup.variational is not None:
        scores |= variational_scores(setup.variational, setup.bank)
    return scores


def knn_distance(setup: OutlierSetup) -> Score:
    """Score by the cosine distance to the ``k``-th nearest training image (Sun et al., 2022).

    The farthest one where the bank has fewer than ``k``.
    """

    def score(features: Tensor) -> Tensor:
        similarity, _ = neighbours(setup.bank.features, features, setup.k, CHUNK, setup.device)
        return 1 - similarity[:, -1].double().cpu()

    return score


def mahalanobis(setup: OutlierSetup) -> Score:
    """Score by the squared Mahalanobis distance to the nearest class mean (Lee et al., 2018).

    All classes share one covariance.

    Directions in which training images hardly vary count as if they had a millionth of the mean
    variance, so that leaving them is anomalous, too.
    """
    means = class_means(setup.bank)
    scatter = torch.zeros(means.shape[1], means.shape[1], dtype=torch.float64)
    # A bank may have images of some classes only: means are numbered by those that have some.
    labels_in_bank = torch.from_numpy(np.unique(setup.bank.labels.numpy()))
    for x, labels in blocks(setup.bank):
        centred = x.double() - means[torch.searchsorted(labels_in_bank, labels)]
        scatter += centred.T @ centred
    variances, axes = torch.linalg.eigh(scatter / len(setup.bank.labels))
    floor = max(_FLOOR * float(variances.clamp_min(0).mean()), torch.finfo(torch.float32).tiny)
    # In whitened coordinates Mahalanobis distance is Euclidean distance.
    whiten = axes / variances.clamp_min(floor).sqrt()
    whitened_means = means @ whiten

    def score(features: Tensor) -> Tensor:
        distances = [
            torch.cdist(block.double() @ whiten, whitened_means).square().amin(1)
            for block in torch.split(features, CHUNK)
        ]
        return torch.cat(distances)

    return score


def negative_norm(features: Tensor) -> Tensor:
    """Score by minus the norm: a short embedding counts as foreign, as in CSI (Tack et al., 2020).

    The baseline of whatever else depends on the norm.  A score that takes long embeddings for
    foreign has 1 minus its AUROC when it knows nothing but the norm.
    """
    blocks = torch.split(features, CHUNK)
    return torch.cat([-block.double().norm(dim=1).cpu() for block in blocks])


def class_means(bank: Features) -> Tensor:
    """Average each class that has images, in the order of the labels: ``(K, D)`` float64."""
    labels_in_bank = torch.from_numpy(np.unique(bank.labels.numpy()))
    total = torch.zeros(len(labels_in_bank), bank.features.shape[1], dtype=torch.float64)
    for x, labels in blocks(bank):
        total.index_add_(0, torch.searchsorted(labels_in_bank, labels), x.double())
    class_index = torch.searchsorted(labels_in_bank, bank.labels)
    count = torch.bincount(class_index, minlength=len(labels_in_bank))
    return total / count[:, None]


def max_softmax(setup: OutlierSetup) -> Score:
    """Score by minus the largest class probability of a classifier (Hendrycks & Gimpel, 2017).

    The classifier is a logistic regression.

    As minus the log-odds it would rank alike and keep digits near 1: what is returned is the
    logarithm of the other classes' probability.
    """
    rows = torch.arange(len(setup.bank.labels))
    data = ProbeData(setup.bank, rows, setup.classes, setup.device)
    (probe,) = fit_logistic(data, [setup.l2]).values()

    def score(features: Tensor) -> Tensor:
        log_probabilities = []
        for block in torch.split(features, CHUNK):
            logits = probe.logits(block)
            predicted = logits.argmax(1, keepdim=True)
            others = logits.scatter(1, predicted, -torch.inf).logsumexp(1)
            log_probabilities.append(others - logits.logsumexp(1))
        return torch.cat(log_probabilities)

    return score
