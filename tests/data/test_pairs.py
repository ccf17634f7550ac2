"""Augmented pairs for evaluation are the views that a training of the same seed would show."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.photos import tiny_dataset
from vssl_dist.config import (
    DataConfig,
    MethodConfig,
    Normalisation,
    OptimConfig,
    RunConfig,
    ViewRecipe,
)
from vssl_dist.data.loader import BackendSpec, build_loader
from vssl_dist.data.passes import Pairs, augmented_pair_batches
from vssl_dist.data.store.dataset import Dataset

SAMPLES, SEED = 29, 5
RECIPES = ViewRecipe(), ViewRecipe(blur=0.1, solarize=0.2)


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_pair_t_is_what_epoch_t_of_training_shows(tmp_path: Path, backend: str) -> None:
    folder = tiny_dataset(tmp_path, samples=SAMPLES, shard_size=13)
    spec = BackendSpec((), 32, Normalisation())
    pairs = Pairs(RECIPES, count=3, seed=SEED)
    batches = list(
        augmented_pair_batches(Dataset.open(folder), spec, pairs, backend=backend, batch=8)
    )
    assert torch.equal(torch.cat([batch.ids for batch in batches]), torch.arange(SAMPLES))
    views = torch.cat([torch.stack(batch.views, dim=1) for batch in batches])
    assert views.shape == (SAMPLES, 6, 3, 32, 32)

    data = DataConfig(
        train=folder, backend=backend, image_size=32, views=RECIPES, streams=4, window=5
    )
    optim = OptimConfig(base_lr=0.1, global_batch=4)
    cfg = RunConfig(
        name="test", seed=SEED, method=MethodConfig(name="byol"), data=data, optim=optim
    )
    loader = build_loader(cfg, rank=0, world_size=1, device="cpu")
    trained: dict[int, list[list[torch.Tensor]]] = {number: [] for number in range(SAMPLES)}
    for batch in islice(loader, 2 * SAMPLES // 4 + 1):  # two epochs, and the start of the third
        for row, number in enumerate(batch.ids.tolist()):
            trained[number].append([view[row] for view in batch.views])
    loader.close()
    for number, times in trained.items():
        assert len(times) >= 2
        by_pair = views[number].unflatten(0, (3, 2))
        matches = [
            [bool((by_pair[t] == torch.stack(views_of_epoch)).all()) for t in range(3)]
            for views_of_epoch in times
        ]
        assert all(sum(row) == 1 for row in matches), "each is exactly one of the pairs"
        assert len({row.index(True) for row in matches}) == len(times), "and each another one"


def test_some_images_come_in_the_order_that_is_asked_for(tmp_path: Path) -> None:
    folder = tiny_dataset(tmp_path, samples=SAMPLES, shard_size=13)
    spec, pairs = BackendSpec((), 32, Normalisation()), Pairs(RECIPES, count=1, seed=0)
    dataset = Dataset.open(folder)
    ids = np.array([0, 9, 2, 3, 4, 1])
    batches = list(
        augmented_pair_batches(dataset, spec, pairs, backend="reference", batch=4, ids=ids)
    )
    assert [batch.ids.tolist() for batch in batches] == [[0, 9, 2, 3], [4, 1]]
    assert all(len(batch.views) == 2 for batch in batches)
