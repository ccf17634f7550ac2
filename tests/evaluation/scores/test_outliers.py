"""Anomaly scores and collapse figures against scikit-learn, closed forms and hand-made cases."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from vssl_dist.evaluation.scores import detection
from vssl_dist.evaluation.scores.outliers import (
    OutlierSetup,
    fit_knn_distance_score,
    fit_mahalanobis_score,
    fit_max_softmax_score,
    fit_outlier_scores,
)
from vssl_dist.evaluation.scores.spectrum import rankme, uniformity
from vssl_dist.evaluation.scores.table import LabelledFeatures


def clusters(samples: int, seed: int, shift: float = 0.0) -> LabelledFeatures:
    """Three clusters in five dimensions; a shift takes all of them elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 3
    centres = 4 * torch.eye(3, 5)
    noise = torch.randn(samples, 5, generator=generator) * torch.tensor([1, 0.5, 0.7, 0.3, 1.2])
    return LabelledFeatures(
        centres[labels] + noise + shift * torch.tensor([-1.0, -1, -1, 1, 0]), labels
    )


def fitting(bank: LabelledFeatures, k: int = 5) -> OutlierSetup:
    return OutlierSetup(bank, num_classes=3, k=k, l2=1e-3)


def test_every_score_is_higher_for_what_is_foreign() -> None:
    bank, inside, outside = clusters(300, 1), clusters(200, 2), clusters(200, 3)
    # Between the classes, and beside the plane that they span.
    outside.features[:, :3] = 4 / 3 + 0.2 * outside.features[:, 4:]
    outside.features[:, 3] += 2
    scores = fit_outlier_scores(fitting(bank))
    assert list(scores) == ["knn", "mahalanobis", "max_softmax", "norm"]
    del scores["norm"]  # knows nothing of where an embedding lies
    for name, score in scores.items():
        pair = score(inside.features).numpy(), score(outside.features).numpy()
        assert detection.compute_detection(*pair).auroc > 0.8, name
        assert detection.compute_detection(*pair[::-1]).auroc < 0.2, name


def test_knn_distance_is_scikit_learns_to_the_kth_neighbour() -> None:
    bank, queries = clusters(100, 4), clusters(40, 5, shift=0.5)
    oracle = NearestNeighbors(n_neighbors=7, metric="cosine").fit(bank.features.double())
    expected = oracle.kneighbors(queries.features.double())[0][:, -1]
    assert fit_knn_distance_score(fitting(bank, k=7))(queries.features).numpy() == pytest.approx(
        expected, abs=1e-6
    )
    farthest = fit_knn_distance_score(fitting(bank, k=1000))(queries.features)
    assert torch.equal(farthest, fit_knn_distance_score(fitting(bank, k=100))(queries.features))


def test_mahalanobis_is_the_distance_to_the_nearest_class_mean() -> None:
    bank, queries = clusters(90, 6), clusters(20, 7, shift=1.0)
    x, labels = bank.features.double().numpy(), bank.labels.numpy()
    means = np.stack([x[labels == c].mean(0) for c in range(3)])
    precision = EmpiricalCovariance(assume_centered=True).fit(x - means[labels]).precision_
    expected = [
        min(scipy_mahalanobis(q, m, precision) ** 2 for m in means)
        for q in queries.features.double().numpy()
    ]
    assert fit_mahalanobis_score(fitting(bank))(queries.features).numpy() == pytest.approx(
        expected, rel=1e-8
    )


def test_leaving_a_subspace_that_the_training_images_fill_is_anomalous() -> None:
    flat = clusters(100, 8)
    flat.features[:, 4] = 0
    score = fit_mahalanobis_score(fitting(flat))
    inside = score(flat.features)
    flat.features[:, 4] = 0.05
    assert score(flat.features).min() > 10 * inside.max()
    assert inside.isfinite().all()


def test_max_softmax_ranks_as_scikit_learns_probabilities_do() -> None:
    bank, queries = clusters(150, 9), clusters(60, 10, shift=1.5)
    scaler = StandardScaler().fit(bank.features.double())
    oracle = LogisticRegression(C=1 / (1e-3 * 150), tol=1e-8, max_iter=5000)
    oracle.fit(scaler.transform(bank.features.double()), bank.labels)
    expected = oracle.predict_proba(scaler.transform(queries.features.double())).max(1)
    actual = fit_max_softmax_score(fitting(bank))(queries.features)
    assert actual.exp().numpy() == pytest.approx(1 - expected, abs=5e-3)
    sure = fit_max_softmax_score(fitting(bank))(1e3 * bank.features)
    assert len(sure.unique()) == len(sure), "probabilities that round to 1 still differ"


def test_one_class_needs_no_classifier() -> None:
    bank = clusters(60, 11)
    one = LabelledFeatures(bank.features, torch.full((60,), 2))
    assert list(fit_outlier_scores(fitting(one))) == ["knn", "mahalanobis", "norm"]


def test_rankme_is_the_entropy_of_the_singular_values() -> None:
    features = torch.randn(40, 9, generator=torch.Generator().manual_seed(0)).double()
    for rows in (features, features.T):
        values = np.linalg.svd(rows.numpy(), compute_uv=False)
        share = values / values.sum()
        assert rankme(rows) == pytest.approx(math.exp(-(share * np.log(share)).sum()))
    assert rankme(torch.ones(30, 9)) == pytest.approx(1)
    assert rankme(torch.zeros(30, 9)) == 1
    low = features[:, :3] @ torch.randn(3, 9, generator=torch.Generator().manual_seed(1)).double()
    assert rankme(low.float()) <= 3.01, "rounding is no rank"


def test_uniformity_is_the_mean_potential_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(features, dim=1).double()
    pairs = [math.exp(-2 * float((a - b).square().sum())) for a, b in combinations(unit, 2)]
    expected = math.log(sum(pairs) / len(pairs))
    assert uniformity(features) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr("vssl_dist.evaluation.scores.spectrum._UNIFORMITY_BLOCK_ROWS", 7)
    assert uniformity(features) == pytest.approx(expected, abs=1e-5)
    assert uniformity(torch.ones(10, 4)) == pytest.approx(0, abs=1e-5)
