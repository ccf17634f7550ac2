"""The k-NN classifier against scikit-learn and against a loop that follows the definition."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from vssl_dist.evaluation.scores.knn import knn_accuracy_grid
from vssl_dist.evaluation.scores.neighbours import find_neighbours
from vssl_dist.evaluation.scores.table import LabelledFeatures, TopAccuracy

KS, TEMPERATURES = (1, 5, 20, 100), (0.07, 0.1, 1.0)


def cloud(samples: int, classes: int, seed: int, width: int = 16) -> LabelledFeatures:
    """Overlapping clusters, so that accuracies lie between chance and 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(samples, width, generator=generator)
    return LabelledFeatures(centres[labels] + 2.5 * noise, labels)


def by_definition(
    bank: LabelledFeatures, queries: LabelledFeatures, k: int, temperature: float
) -> TopAccuracy:
    """One query at a time, one vote at a time."""
    first = five = 0
    for query, label in zip(*queries, strict=True):
        q = query.double() / query.double().norm()
        cosines = [float(q @ (row.double() / row.double().norm())) for row in bank.features]
        nearest = sorted(range(len(cosines)), key=lambda i: (-cosines[i], i))[:k]
        votes: dict[int, float] = defaultdict(float)
        for i in nearest:
            votes[int(bank.labels[i])] += math.exp(cosines[i] / temperature)
        order = sorted(votes, key=lambda c: (-votes[c], c))
        first += order[0] == int(label)
        five += int(label) in order[:5]
    return TopAccuracy(first / len(queries.labels), five / len(queries.labels))


def test_the_whole_grid_equals_the_definition() -> None:
    bank, queries = cloud(150, 8, seed=1), cloud(40, 8, seed=2)
    grid = knn_accuracy_grid(bank, queries, KS, TEMPERATURES)
    assert list(grid) == [(k, t) for k in KS for t in TEMPERATURES]
    for (k, temperature), accuracy in grid.items():
        assert accuracy == pytest.approx(by_definition(bank, queries, k, temperature), abs=1e-12)


def test_top1_equals_scikit_learn() -> None:
    bank, queries = cloud(2000, 10, seed=3), cloud(500, 10, seed=4)
    grid = knn_accuracy_grid(bank, queries, KS, TEMPERATURES)
    for (k, temperature), accuracy in grid.items():

        def weigh(distances: np.ndarray, t: float = temperature) -> np.ndarray:
            return np.exp((1 - distances) / t)

        oracle = KNeighborsClassifier(k, weights=weigh, metric="cosine", algorithm="brute")
        oracle.fit(bank.features.double().numpy(), bank.labels.numpy())
        expected = oracle.score(queries.features.double().numpy(), queries.labels.numpy())
        assert accuracy.top1 == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chunk", [(1, 1), (7, 13), (500, 64), (64, 5000)])
def test_chunks_do_not_change_the_neighbours(chunk: tuple[int, int]) -> None:
    bank, queries = cloud(300, 5, seed=5), cloud(50, 5, seed=6)
    whole = knn_accuracy_grid(bank, queries, KS, TEMPERATURES, chunk_rows=(50, 300))
    assert knn_accuracy_grid(bank, queries, KS, TEMPERATURES, chunk_rows=chunk) == whole


@pytest.mark.parametrize("chunk", [3, 8, 1000])
def test_of_equal_neighbours_the_lower_index_is_nearer(chunk: int) -> None:
    # Directions along the axes: every similarity is exactly 0 or 1.
    axes = torch.eye(4)[torch.arange(40) % 4]
    similarity, index = find_neighbours(axes, torch.eye(4), 12, chunk)
    for row in range(4):
        own = list(range(row, 40, 4))
        others = [i for i in range(40) if i % 4 != row][:2]
        assert index[row].tolist() == own + others
        assert similarity[row].tolist() == [1.0] * 10 + [0.0] * 2


def test_of_classes_with_equal_votes_the_lower_one_wins() -> None:
    bank = LabelledFeatures(torch.eye(4), torch.tensor([3, 1, 2, 0]))
    queries = LabelledFeatures(torch.ones(4, 4), torch.arange(4))
    assert knn_accuracy_grid(bank, queries, [4], [0.07])[4, 0.07] == TopAccuracy(0.25, 1.0)


def test_k_beyond_the_bank_means_the_whole_bank() -> None:
    bank, queries = cloud(30, 3, seed=7), cloud(20, 3, seed=8)
    grid = knn_accuracy_grid(bank, queries, [30, 200], [0.1])
    assert grid[200, 0.1] == grid[30, 0.1]


def test_one_image_and_one_query_are_enough() -> None:
    one = LabelledFeatures(torch.ones(1, 3), torch.tensor([4]))
    assert knn_accuracy_grid(one, one, [1, 20], [0.07])[20, 0.07] == TopAccuracy(1.0, 1.0)


def test_a_class_that_the_bank_lacks_is_never_right() -> None:
    bank, queries = cloud(100, 3, seed=9), cloud(30, 3, seed=10)
    strange = LabelledFeatures(queries.features, torch.full((30,), 7))
    assert knn_accuracy_grid(bank, strange, [20], [0.07])[20, 0.07] == TopAccuracy(0.0, 0.0)
    poorer = LabelledFeatures(bank.features, torch.where(bank.labels == 0, 1, bank.labels))
    zeros = queries.labels == 0
    lost = LabelledFeatures(queries.features[zeros], queries.labels[zeros])
    assert knn_accuracy_grid(poorer, lost, [20], [0.07])[20, 0.07] == TopAccuracy(0.0, 0.0)


def test_the_scale_of_features_and_a_very_cold_temperature_do_not_matter() -> None:
    bank, queries = cloud(200, 4, seed=11), cloud(50, 4, seed=12)
    scaled = LabelledFeatures(bank.features * 1e4, bank.labels)
    assert knn_accuracy_grid(scaled, queries, KS, [0.07]) == knn_accuracy_grid(
        bank, queries, KS, [0.07]
    )
    # As the temperature goes to 0 the nearest neighbour alone decides.
    nearest = knn_accuracy_grid(bank, queries, [1], [1.0])[1, 1.0].top1
    assert knn_accuracy_grid(bank, queries, [100], [1e-6])[100, 1e-6].top1 == nearest


def test_half_precision_features_are_compared_in_float32() -> None:
    bank, queries = cloud(200, 4, seed=13), cloud(50, 4, seed=14)
    half = LabelledFeatures(bank.features.half(), bank.labels)
    full = LabelledFeatures(half.features.float(), bank.labels)
    assert knn_accuracy_grid(half, queries, KS, [0.07]) == knn_accuracy_grid(
        full, queries, KS, [0.07]
    )


def test_memory_is_bounded_by_the_chunk() -> None:
    torch.manual_seed(0)
    peak = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, Tensor):
                    peak = max(peak, tensor.numel())
            return out

    bank, queries = cloud(20_000, 5, seed=15), cloud(1000, 5, seed=16)
    with Watch():
        knn_accuracy_grid(bank, queries, [20], [0.07], chunk_rows=(64, 512))
    # The largest tensor made is a block of features or of similarities, never 1000 x 20,000.
    assert peak <= max(8192 * 16, 64 * 512)


@pytest.mark.parametrize(
    ("bank", "queries", "ks", "temperature", "word"),
    [
        (cloud(0, 2, 0), cloud(5, 2, 1), [1], 0.1, "at least one"),
        (cloud(5, 2, 0), cloud(0, 2, 1), [1], 0.1, "at least one"),
        (cloud(5, 2, 0), cloud(5, 2, 1, width=8), [1], 0.1, "wide"),
        (cloud(5, 2, 0), cloud(5, 2, 1), [0], 0.1, "k >= 1"),
        (cloud(5, 2, 0), cloud(5, 2, 1), [], 0.1, "k >= 1"),
        (cloud(5, 2, 0), cloud(5, 2, 1), [1], 0.0, "temperatures > 0"),
        (
            LabelledFeatures(torch.full((5, 16), math.nan), torch.zeros(5)),
            cloud(5, 2, 1),
            [1],
            0.1,
            "5 of",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(
    bank: LabelledFeatures, queries: LabelledFeatures, ks: list[int], temperature: float, word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        knn_accuracy_grid(bank, queries, ks, [temperature])
