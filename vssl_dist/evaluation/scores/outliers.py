"""Scores of how foreign an image is, from frozen features; a higher score is more anomalous.

Each takes features ``(M, D)`` to float64 scores ``(M,)`` on the CPU and is fitted on the training
images alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vssl_dist.evaluation.scores.logistic import fit_logistic_probes
from vssl_dist.evaluation.scores.neighbours import find_neighbours
from vssl_dist.evaluation.scores.probe import ROWS_PER_BLOCK, ProbeData, iterate_blocks
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.scores.variational import (
    ScoreFunction,
    VariationalSetup,
    make_variational_scores,
)

_VARIANCE_FLOOR_SHARE = 1e-6
_MAX_MAHALANOBIS_WIDTH = 8192


@dataclass(frozen=True)
class OutlierSetup:
    """The training images, and how the scores are fitted to them."""

    bank: LabelledFeatures
    """Features and labels of the training images."""
    num_classes: int
    k: int
    """Which nearest neighbour's distance counts."""
    l2: float
    """Weight of the logistic regression's penalty."""
    device: str = "cpu"
    variational: VariationalSetup | None = None
    """The posterior of an export that has one, and how it judges."""


def fit_outlier_scores(setup: OutlierSetup) -> dict[str, ScoreFunction]:
    """Fit every score to the bank, by name.

    ``knn``, ``mahalanobis``, ``max_softmax``, ``norm`` and, of an export that has a posterior,
    those of `make_variational_scores`.

    Without ``mahalanobis`` where features are wider than 8,192 (its covariance would fill the
    memory: raw pixels of large images), without ``max_softmax`` where there is only one class.
    """
    score_by_name: dict[str, ScoreFunction] = {"knn": fit_knn_distance_score(setup)}
    if setup.bank.features.shape[1] <= _MAX_MAHALANOBIS_WIDTH:
        score_by_name["mahalanobis"] = fit_mahalanobis_score(setup)
    if int(setup.bank.labels.min()) < int(setup.bank.labels.max()):
        score_by_name["max_softmax"] = fit_max_softmax_score(setup)
    score_by_name["norm"] = negative_norm_score
    if setup.variational is not None:
        score_by_name |= make_variational_scores(setup.variational, setup.bank)
    return score_by_name


def fit_knn_distance_score(setup: OutlierSetup) -> ScoreFunction:
    """Score by the cosine distance to the ``k``-th nearest training image (Sun et al., 2022).

    The farthest one where the bank has fewer than ``k``.
    """

    def score(features: Tensor) -> Tensor:
        similarity, _ = find_neighbours(
            setup.bank.features, features, setup.k, ROWS_PER_BLOCK, setup.device
        )
        return 1 - similarity[:, -1].double().cpu()

    return score


def fit_mahalanobis_score(setup: OutlierSetup) -> ScoreFunction:
    """Score by the squared Mahalanobis distance to the nearest class mean (Lee et al., 2018).

    All classes share one covariance.

    Directions in which training images hardly vary count as if they had a millionth of the mean
    variance, so that leaving them is anomalous, too.
    """
    class_means = compute_class_means(setup.bank)
    scatter_matrix = torch.zeros(class_means.shape[1], class_means.shape[1], dtype=torch.float64)
    # A bank may have images of some classes only: means are numbered by those that have some.
    labels_in_bank = torch.from_numpy(np.unique(setup.bank.labels.numpy()))
    for x, labels in iterate_blocks(setup.bank):
        centred_features = x.double() - class_means[torch.searchsorted(labels_in_bank, labels)]
        scatter_matrix += centred_features.T @ centred_features
    variances, eigenvectors = torch.linalg.eigh(scatter_matrix / len(setup.bank.labels))
    variance_floor = max(
        _VARIANCE_FLOOR_SHARE * float(variances.clamp_min(0).mean()),
        torch.finfo(torch.float32).tiny,
    )
    # In whitened coordinates Mahalanobis distance is Euclidean distance.
    whitening_matrix = eigenvectors / variances.clamp_min(variance_floor).sqrt()
    whitened_means = class_means @ whitening_matrix

    def score(features: Tensor) -> Tensor:
        distances = [
            torch.cdist(block.double() @ whitening_matrix, whitened_means).square().amin(1)
            for block in torch.split(features, ROWS_PER_BLOCK)
        ]
        return torch.cat(distances)

    return score


def negative_norm_score(features: Tensor) -> Tensor:
    """Score by minus the norm: a short embedding counts as foreign, as in CSI (Tack et al., 2020).

    The baseline of whatever else depends on the norm.  A score that takes long embeddings for
    foreign has 1 minus its AUROC when it knows nothing but the norm.
    """
    blocks = torch.split(features, ROWS_PER_BLOCK)
    return torch.cat([-block.double().norm(dim=1).cpu() for block in blocks])


def compute_class_means(bank: LabelledFeatures) -> Tensor:
    """Average each class that has images, in the order of the labels: ``(K, D)`` float64."""
    labels_in_bank = torch.from_numpy(np.unique(bank.labels.numpy()))
    feature_sums = torch.zeros(len(labels_in_bank), bank.features.shape[1], dtype=torch.float64)
    for x, labels in iterate_blocks(bank):
        feature_sums.index_add_(0, torch.searchsorted(labels_in_bank, labels), x.double())
    class_index = torch.searchsorted(labels_in_bank, bank.labels)
    images_per_class = torch.bincount(class_index, minlength=len(labels_in_bank))
    return feature_sums / images_per_class[:, None]


def fit_max_softmax_score(setup: OutlierSetup) -> ScoreFunction:
    """Score by minus the largest class probability of a classifier (Hendrycks & Gimpel, 2017).

    The classifier is a logistic regression.

    As minus the log-odds it would rank alike and keep digits near 1: what is returned is the
    logarithm of the other classes' probability.
    """
    rows = torch.arange(len(setup.bank.labels))
    probe_data = ProbeData(setup.bank, rows, setup.num_classes, setup.device)
    (probe,) = fit_logistic_probes(probe_data, [setup.l2]).values()

    def score(features: Tensor) -> Tensor:
        log_probabilities = []
        for block in torch.split(features, ROWS_PER_BLOCK):
            logits = probe.logits(block)
            predicted = logits.argmax(1, keepdim=True)
            other_classes_logit = logits.scatter(1, predicted, -torch.inf).logsumexp(1)
            log_probabilities.append(other_classes_logit - logits.logsumexp(1))
        return torch.cat(log_probabilities)

    return score
