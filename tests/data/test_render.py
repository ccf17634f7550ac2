"""Training, evaluation and fine-tuning render the same sample and draw as the same pixels."""

from __future__ import annotations

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
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.loader import BackendSpec, build_loader
from vssl_dist.data.passes import (
    Pairs,
    SeededEpoch,
    augmented_pair_batches,
    evaluation_batches,
    finetuning_batches,
)
from vssl_dist.data.render import ViewRenderer
from vssl_dist.data.store.dataset import Dataset

SAMPLES, SEED = 24, 5
DAMAGED, SUBSTITUTE = 15, 16
RECIPES = ViewRecipe(), ViewRecipe(blur=0.1, solarize=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of twelve images, one of which is overwritten in part."""
    folder = tiny_dataset(tmp_path_factory.mktemp("tiny"), samples=SAMPLES, shard_size=12)
    offset = int(np.load(folder / "shard-000001.idx.npy")[DAMAGED - 12]["offset"])
    with (folder / "shard-000001.tar").open("r+b") as shard:
        shard.seek(offset + 40)
        shard.write(bytes(20))
    return folder


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_training_pairs_and_fine_tuning_show_the_same_pixels_for_the_same_draw(
    folder: Path, backend: str
) -> None:
    data = DataConfig(train=folder, backend=backend, image_size=32, views=RECIPES, streams=4)
    cfg = RunConfig(
        name="test",
        seed=SEED,
        method=MethodConfig(name="byol"),
        data=data,
        optim=OptimConfig(base_lr=0.1, global_batch=SAMPLES),
    )
    loader = build_loader(cfg, rank=0, world_size=1, device="cpu")
    trained = next(iter(loader))  # the whole of epoch 0
    (substitution,) = loader.substitutions
    loader.close()

    dataset, ids = Dataset.open(folder), trained.ids.numpy()
    spec = BackendSpec(RECIPES, 32, Normalisation())
    (paired,) = augmented_pair_batches(
        dataset, spec, Pairs(RECIPES, 1, SEED), backend=backend, batch=SAMPLES, ids=ids
    )
    # In another order and in batches of another size.
    finetuned = list(
        finetuning_batches(
            dataset,
            spec,
            SeededEpoch(SEED, 0),
            backend=backend,
            batch=7,
            ids=np.arange(SAMPLES),
        )
    )
    for view in range(2):
        assert torch.equal(paired.views[view], trained.views[view])
        by_id = torch.cat([batch.views[view] for batch in finetuned])
        assert torch.equal(by_id[trained.ids], trained.views[view])
    assert torch.equal(paired.labels, trained.labels)

    reports = [*paired.substitutions, *(s for batch in finetuned for s in batch.substitutions)]
    assert [(s.planned, s.used) for s in reports] == [(DAMAGED, SUBSTITUTE)] * 2
    assert (substitution.planned, substitution.used) == (DAMAGED, SUBSTITUTE)
    assert {s.reason for s in reports} == {substitution.reason}


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_an_evaluation_and_a_renderer_of_its_own_crop_the_same_centre(
    folder: Path, backend: str
) -> None:
    dataset, spec = Dataset.open(folder), BackendSpec((), 24, Normalisation())
    batches = list(evaluation_batches(dataset, spec, backend=backend, batch=10))
    rendering = ViewRenderer(dataset, build_backend(backend, spec)).render_centre_crop(
        np.arange(SAMPLES), 24
    )
    assert torch.equal(torch.cat([batch.views[0] for batch in batches]), rendering.views[0])
    assert rendering.draws == []
    assert [s.used for s in rendering.samples.substitutions] == [SUBSTITUTE]
    shown = rendering.views[0]
    assert torch.equal(shown[DAMAGED], shown[SUBSTITUTE])
