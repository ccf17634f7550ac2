"""Ranks and alignment against numpy's singular values and views made by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.support.exports import NORMALISE, change, exported
from tests.support.photos import tiny_dataset
from vssl_dist.config import CollapseConfig, ViewRecipe
from vssl_dist.config.recipes import RECIPES
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.reference import ReferenceBackend
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.views import draw
from vssl_dist.evaluation.run import evaluate, evaluate_baselines
from vssl_dist.evaluation.scores.spectrum import (
    alignment,
    compute_singular_values,
    effective_rank,
    rankme,
)


@pytest.mark.parametrize("shape", [(40, 9), (9, 40), (20, 20)])
@pytest.mark.parametrize("centred", [False, True])
def test_the_spectrum_is_numpys(shape: tuple[int, int], centred: bool) -> None:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    matrix = rows.double().numpy()
    expected = np.linalg.svd(matrix - centred * matrix.mean(0), compute_uv=False)
    if centred and shape[0] <= shape[1]:
        expected[-1] = 0  # centring takes one direction from fewer rows than columns
    np.testing.assert_allclose(
        compute_singular_values(rows, subtract_mean=centred), expected, atol=1e-5
    )


def test_the_effective_rank_counts_equal_directions() -> None:
    for count in (1, 2, 7):
        assert effective_rank(torch.tensor([3.0] * count + [0.0] * 5)) == pytest.approx(count)
    assert effective_rank(torch.zeros(4)) == 1
    weights = np.array([4.0, 2.0, 1.0, 1.0])
    entropy = -(weights / 8 * np.log(weights / 8)).sum()
    assert effective_rank(torch.from_numpy(weights)) == pytest.approx(math.exp(entropy))


def test_a_common_mean_hides_directions_from_rankme_alone() -> None:
    spread = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    assert rankme(spread + 100) < 1.5
    assert effective_rank(
        compute_singular_values(spread + 100, subtract_mean=True)
    ) == pytest.approx(
        effective_rank(compute_singular_values(spread, subtract_mean=True)), rel=1e-3
    )
    assert (
        effective_rank(compute_singular_values(torch.full((50, 8), 3.7), subtract_mean=True)) == 1
    )


def test_alignment_is_the_mean_squared_distance_on_the_sphere() -> None:
    views = torch.randn(30, 2, 5, generator=torch.Generator().manual_seed(2))
    expected = 2 - 2 * cosine_similarity(views[:, 0], views[:, 1]).mean()
    assert alignment(views) == pytest.approx(float(expected), rel=1e-5)
    assert alignment(torch.ones(4, 2, 3) * torch.tensor([1.0, 5.0])[:, None]) < 1e-6
    assert alignment(torch.tensor([[[1.0, 0.0], [-2.0, 0.0]]])) == pytest.approx(4)


def by_hand(recipes: list[ViewRecipe], folder: Path, network: torch.nn.Module) -> float:
    """Both views of the first twenty images, as a training of seed 0 shows them in epoch 0."""
    samples = Dataset.open(folder).read_checked(ids := np.arange(20))
    sizes = np.stack([samples.height, samples.width], axis=1)
    epochs = np.zeros(20, np.int64)
    backend = ReferenceBackend(BackendSpec(tuple(recipes), 32, NORMALISE))
    views = backend(samples, [draw(r, 0, n, ids, epochs, sizes) for n, r in enumerate(recipes)])
    with torch.no_grad():
        pair = torch.stack([network(view) for view in views], dim=1)
    return alignment(pair)


def test_alignment_is_of_the_views_of_the_run(tmp_path: Path) -> None:
    tiny_dataset(tmp_path, samples=40, classes=4)
    tiny_dataset(tmp_path / "apart", samples=30, classes=4, split="val", first=9_000).rename(
        tmp_path / "val"
    )
    path, network = exported(tmp_path / "export", tmp_path)
    task = CollapseConfig(batch=16, pairs=20)
    assert evaluate(path, task)["results"]["alignment"] is None, "the card names no views"
    recipes = [RECIPES["cifar"], RECIPES["cifar_byol_2"]]
    local = RECIPES["cifar_dino_local"]
    for views in (recipes, [*recipes, local, local], recipes[:1]):
        config = {"data": {"backend": "reference", "views": [r.model_dump() for r in views]}}
        change(path, config=config)
        path.with_name("collapse-00000040.json").unlink()
        result = evaluate(path, task)
        pair = views[:2] if len(views) > 1 else views * 2
        expected = by_hand(pair, tmp_path / "val", network)
        assert result["results"]["alignment"] == pytest.approx(expected, rel=1e-4)
        assert result["metrics"]["collapse/alignment"] == result["results"]["alignment"]
        assert 0 < expected < 2
    others = evaluate_baselines(path, task)["results"]
    assert all(0 < one["alignment"] < 2 for one in others.values())
    path.with_name("collapse-00000040.json").unlink()
    off = evaluate(path, task.model_copy(update={"pairs": 0}))
    assert off["results"]["alignment"] is None
