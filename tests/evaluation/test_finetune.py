"""Fine-tuning trains a copy, on seeded views of every image, by the textbook step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.support.exports import NORMALISE, exported
from tests.support.photos import tiny_dataset
from vssl_dist.config import FinetuneConfig, read_task
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.extract import (
    ImageReading,
    build_random_network,
    extract_features,
    flatten_pixels,
)
from vssl_dist.evaluation.finetune import (
    Classifier,
    FinetuneRun,
    LabelledImages,
    choose_lr,
    finetune,
)
from vssl_dist.evaluation.run import evaluate, evaluate_baselines
from vssl_dist.evaluation.scores.probe import split_by_class

CLASSES = 4
QUICK = FinetuneConfig(epochs=4, train_batch=16, lr=(0.5,), batch=50)
PLAN = FinetuneRun(lr=0.5, epochs=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=72, classes=CLASSES, shard_size=30)
    val = tiny_dataset(folder / "apart", samples=40, classes=CLASSES, split="val", first=9_000)
    val.rename(folder / "val")
    return folder


def labelled(data: Path, count: int = 72) -> LabelledImages:
    reading = ImageReading(32, NORMALISE, backend="reference")
    return LabelledImages(Dataset.open(data / "train"), np.arange(count), CLASSES, reading)


def test_an_epoch_shows_every_image_once_and_another_one_shows_it_otherwise(data: Path) -> None:
    task = QUICK.model_copy(update={"train_batch": 12})
    epochs = [list(labelled(data).augmented_batches(task, 0, epoch)) for epoch in (0, 1, 0)]
    orders = [torch.cat([batch.ids for batch in batches]) for batches in epochs]
    assert orders[0].sort().values.tolist() == list(range(72))
    assert orders[0].tolist() == orders[2].tolist() != orders[1].tolist()
    views = [torch.cat([b.views[0] for b in batches])[o.argsort()] for batches, o in
             zip(epochs, orders, strict=True)]  # fmt: skip
    assert torch.equal(views[0], views[2])
    assert not any(torch.equal(one, other) for one, other in zip(views[0], views[1], strict=True))
    labels = torch.cat([batch.labels for batch in epochs[0]])
    assert labels.tolist() == Dataset.open(data / "train").rows(orders[0].numpy())["label"].tolist()


def test_a_batch_that_is_not_full_is_shown_only_if_there_is_no_other(data: Path) -> None:
    assert [len(b.ids) for b in labelled(data).augmented_batches(QUICK, 0, 0)] == [16] * 4
    assert [len(b.ids) for b in labelled(data, 5).augmented_batches(QUICK, 0, 0)] == [5]
    assert labelled(data).steps_per_epoch(QUICK) == 4
    assert labelled(data, 5).steps_per_epoch(QUICK) == 1


def test_a_step_is_that_of_sgd_on_all_weights(data: Path) -> None:
    task = QUICK.model_copy(update={"weight_decay": 0.01})
    network, images = build_random_network("resnet10_c16", 32), labelled(data, 16)
    (batch,) = images.augmented_batches(task, 3, 0)
    by_hand = Classifier(network, 128, CLASSES).train()
    before = copy.deepcopy(by_hand)
    F.cross_entropy(by_hand(batch.views[0]), batch.labels).backward()
    tuned, losses = finetune(network, images, task, FinetuneRun(0.5, epochs=1, seed=3))
    assert losses == [pytest.approx(torch.tensor(float(CLASSES)).log().item())]
    old, new = dict(before.named_parameters()), dict(tuned.named_parameters())
    for name, parameter in by_hand.named_parameters():
        assert parameter.grad is not None
        decay = 0.01 if parameter.dim() > 1 else 0.0
        # The first of one step has the peak learning rate.
        expected = old[name] - 0.5 * 16 / 256 * (parameter.grad + decay * old[name])
        torch.testing.assert_close(new[name], expected, rtol=1e-4, atol=1e-6)


def test_the_network_it_is_given_stays_and_a_seed_decides_everything(data: Path) -> None:
    network = build_random_network("resnet10_c16", 32)
    before = copy.deepcopy(network.state_dict())
    torch.manual_seed(7)
    state = torch.get_rng_state()
    plans = [replace(PLAN, seed=seed) for seed in (0, 0, 1)]
    one, again, other = (finetune(network, labelled(data), QUICK, plan)[0] for plan in plans)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    weights = [model.state_dict()["backbone.conv1.weight"] for model in (one, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], before["conv1.weight"])
    assert not one.training


def test_what_is_no_network_learns_its_classifier_alone(data: Path) -> None:
    model, losses = finetune(flatten_pixels, labelled(data), QUICK, replace(PLAN, lr=0.01))
    assert [name for name, _ in model.named_parameters()] == ["head.weight", "head.bias"]
    assert losses[-1] < losses[0]


def test_a_training_that_diverges_is_one_clear_line(data: Path) -> None:
    with pytest.raises(DataError, match="lower lr"):
        finetune(flatten_pixels, labelled(data), QUICK, replace(PLAN, lr=1e30))
    with pytest.raises(ValidationError, match="crop_scale must lie above 0"):
        FinetuneConfig(crop_scale=(0.0, 1.0))


def test_the_learning_rate_is_chosen_on_images_that_are_held_out(data: Path) -> None:
    network, images = build_random_network("resnet10_c16", 32), labelled(data)
    task = QUICK.model_copy(update={"lr": (1e30, 0.5, 1e-6), "search_epochs": 3, "held_out": 0.25})
    found = choose_lr(network, images, task)
    assert found["lr"] == 0.5
    assert found["held_out_images"] == 16, "a quarter of the 18 of each class, whole images"
    assert list(found["held_out"]) == ["1e-06", "0.5", "1e+30"]
    assert found["held_out"]["1e+30"] == 0, "it diverged"
    fit, check = split_by_class(torch.from_numpy(images.labels), torch.arange(72), 0.25, seed=0)
    rest = replace(images, ids=fit.numpy())
    model, _ = finetune(network, rest, task, FinetuneRun(0.5, epochs=3))
    ids = np.isin(np.arange(72), check.numpy())
    whole = extract_features(model, images.dataset, images.reading)
    right = (whole.features.argmax(1) == whole.labels).numpy()
    assert found["held_out"]["0.5"] == pytest.approx(right[ids].mean())
    alone = choose_lr(network, images, QUICK)
    assert alone == {"lr": 0.5, "held_out": {}, "held_out_images": 0}, "nothing is trained"
    one_each = replace(images, ids=np.arange(CLASSES))
    assert choose_lr(network, one_each, task)["lr"] == 0.5, "the middle one"


def test_one_learning_rate_may_be_a_number() -> None:
    assert FinetuneConfig.model_validate({"lr": 0.03}).lr == (0.03,)
    assert read_task('{"task": "finetune", "lr": 1e-3}') == FinetuneConfig(lr=(1e-3,))
    with pytest.raises(ValidationError):
        FinetuneConfig.model_validate({"lr": []})
    with pytest.raises(ValidationError):
        FinetuneConfig.model_validate({"lr": [0.1, 0.0]})


def test_the_task_reports_accuracy_and_calibration(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    task = QUICK.model_copy(
        update={"seeds": 2, "epochs": 6, "lr": (0.001, 0.5), "search_epochs": 2}
    )
    found = evaluate(path, task)
    results = found["results"]
    assert results["top1"] > 1 / CLASSES + 0.1
    assert results["top1"] == pytest.approx(sum(results["top1_of_seeds"]) / 2)
    assert 0 <= results["ece"] <= 1
    assert results["losses"][0][-1] < results["losses"][0][0]
    assert found["metrics"]["finetune/top1"] == results["top1"]
    assert results["lr"] in (0.001, 0.5)
    assert list(results["held_out"]) == ["0.001", "0.5"]
    assert found["plots"] == ["finetune-00000040-loss.png"]
    assert list(evaluate_baselines(path, QUICK)["results"]) == ["raw_pixels", "random_network"]
