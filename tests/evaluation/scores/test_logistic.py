"""Linear probes against scikit-learn and torch's own SGD, and what they are chosen on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info

from vssl_dist.evaluation.scores.logistic import (
    _loss_and_gradient,
    choose_l2_penalty,
    choose_lr,
    fit_logistic_probes,
)
from vssl_dist.evaluation.scores.probe import (
    ProbeData,
    compute_scaling,
    draw_class_share,
    probe_accuracy,
    split_by_class,
)
from vssl_dist.evaluation.scores.sgd_probes import ProbeOptimizerName, train_sgd_probes
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.models.linear_probe import Probe

CLASSES, WIDTH = 7, 12


def cloud(samples: int, seed: int, dtype: torch.dtype = torch.float64) -> LabelledFeatures:
    """Overlapping clusters whose features have odd means and scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    noise = 1.5 * torch.randn(samples, WIDTH, generator=generator)
    scale = torch.logspace(-2, 2, WIDTH)
    return LabelledFeatures(((centres[labels] + noise) * scale + 5 * scale).to(dtype), labels)


def whole(features: LabelledFeatures) -> ProbeData:
    return ProbeData(features, torch.arange(len(features.labels)), CLASSES)


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
def test_logistic_regression_is_scikit_learns(l2: float) -> None:
    train, test = cloud(400, seed=1), cloud(300, seed=2)
    scaler = StandardScaler().fit(train.features.numpy())
    oracle = LogisticRegression(C=1 / (l2 * 400), tol=1e-8, max_iter=5000)
    oracle.fit(scaler.transform(train.features.numpy()), train.labels.numpy())
    expected = oracle.predict_proba(scaler.transform(test.features.numpy()))
    probe = fit_logistic_probes(whole(train), [l2], gradient_tolerance=1e-8)[l2]
    actual = probe.logits(test.features).softmax(1).numpy()
    assert actual == pytest.approx(expected, abs=1e-4)
    found = probe_accuracy(probe, test)
    assert found.top1 == oracle.score(scaler.transform(test.features.numpy()), test.labels.numpy())
    assert found.top5 == pytest.approx(top_k_accuracy_score(test.labels, expected, k=5))
    assert 0.3 < found.top1 < 0.95, "neither chance (1/7) nor perfect"


def test_a_solution_does_not_depend_on_the_rest_of_the_grid_or_on_the_precision() -> None:
    train, test = cloud(300, seed=3), cloud(200, seed=4)
    alone = fit_logistic_probes(whole(train), [1e-3])[1e-3].logits(test.features).softmax(1)
    warm = (
        fit_logistic_probes(whole(train), [1.0, 1e-3, 1e-1])[1e-3].logits(test.features).softmax(1)
    )
    single = LabelledFeatures(train.features.float(), train.labels)
    rough = fit_logistic_probes(whole(single), [1e-3])[1e-3].logits(test.features).softmax(1)
    assert warm.numpy() == pytest.approx(alone.numpy(), abs=2e-3)
    assert rough.numpy() == pytest.approx(alone.numpy(), abs=2e-3)


def test_while_it_minimises_scipys_threads_leave_the_cores_to_the_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def threads() -> list[int]:
        return [lib["num_threads"] for lib in threadpool_info() if lib["user_api"] == "blas"]

    seen: list[list[int]] = []

    def watched(*arguments: Any) -> Any:
        seen.append(threads())
        return _loss_and_gradient(*arguments)

    before = threads()
    assert before
    monkeypatch.setattr("vssl_dist.evaluation.scores.logistic._loss_and_gradient", watched)
    fit_logistic_probes(whole(cloud(70, seed=1)), [1e-2])
    assert seen
    assert all(count == 1 for counts in seen for count in counts)
    assert threads() == before


def by_torch(
    train: LabelledFeatures,
    lr: float,
    seed: int,
    epochs: int,
    batch: int,
    optimizer: ProbeOptimizerName,
) -> Probe:
    """One probe trained with torch.optim.SGD on scaled features, perhaps wrapped into LARS."""
    x = (train.features - train.features.mean(0)) / train.features.std(0, correction=0)
    generator = torch.Generator().manual_seed(seed)
    weight = 0.01 * torch.randn(WIDTH, CLASSES, generator=generator)
    layer = torch.nn.Linear(WIDTH, CLASSES)
    layer.weight.data, layer.bias.data = weight.T.clone(), torch.zeros(CLASSES)
    steps = epochs * math.ceil(len(x) / batch)
    descent = torch.optim.SGD(layer.parameters(), lr=lr * batch / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(descent, steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=order).split(batch):
            descent.zero_grad()
            F.cross_entropy(layer(x[rows].float()), train.labels[rows]).backward()
            weight, gradient = layer.weight.detach(), layer.weight.grad
            assert gradient is not None
            if optimizer == "lars":
                gradient *= 0.001 * weight.norm() / gradient.norm()
            descent.step()
            schedule.step()
    return Probe.of_scaled(
        layer.weight.data.T, layer.bias.data, compute_scaling(train, torch.arange(len(x)))
    )


def test_scattered_rows_are_as_good_copied_as_read_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator().manual_seed(0)
    features = LabelledFeatures(
        torch.randn(400, 7, generator=random), torch.randint(0, 3, (400,), generator=random)
    )
    rows = torch.arange(400)[torch.rand(400, generator=random) < 0.7]
    data = ProbeData(features, rows, 3)
    assert not torch.equal(rows, torch.arange(len(rows)))
    copied = fit_logistic_probes(data, [1e-2])[1e-2]
    monkeypatch.setattr("vssl_dist.evaluation.scores.probe._MAX_COPIED_BYTES", 0)
    assert data.with_contiguous_rows() is data
    read = fit_logistic_probes(data, [1e-2])[1e-2]
    assert torch.equal(copied.weight, read.weight)
    chosen = LabelledFeatures(features.features[rows].half().float(), features.labels[rows])
    half = LabelledFeatures(features.features.half(), features.labels)
    monkeypatch.undo()
    alone = fit_logistic_probes(ProbeData(chosen, torch.arange(len(rows)), 3), [1e-2])[1e-2]
    assert torch.equal(
        alone.weight, fit_logistic_probes(ProbeData(half, rows, 3), [1e-2])[1e-2].weight
    )


@pytest.mark.parametrize(
    ("optimizer", "rates"), [("sgd", [0.01, 0.3, 3.0]), ("lars", [1.0, 30.0, 300.0])]
)
def test_every_probe_of_the_grid_is_the_one_trained_alone(
    optimizer: ProbeOptimizerName, rates: list[float]
) -> None:
    train, test = cloud(90, seed=5), cloud(60, seed=6)
    seeds = [0, 4]
    probes = train_sgd_probes(
        whole(train), rates, seeds, epochs=6, batch_size=32, optimizer=optimizer
    )
    assert list(probes) == [(seed, rate) for seed in seeds for rate in rates]
    for (seed, rate), probe in probes.items():
        alone = by_torch(train, rate, seed, 6, 32, optimizer)
        actual, expected = (p.logits(test.features.float()).softmax(1) for p in (probe, alone))
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)


def test_under_lars_a_probe_whose_gradient_is_zero_stays() -> None:
    features = LabelledFeatures(torch.ones(14, 3), torch.arange(14) % CLASSES)
    (probe,) = train_sgd_probes(
        whole(features), [1.0], [0], epochs=2, batch_size=14, optimizer="lars"
    ).values()
    assert probe.is_finite


def test_choices_see_training_images_only_and_take_the_best() -> None:
    train = cloud(350, seed=7)
    few = whole(train).with_rows(torch.arange(0, 350, 2))
    poisoned = LabelledFeatures(train.features.clone(), train.labels.clone())
    poisoned.features[1::2] = math.nan  # whatever is not among the rows cannot matter
    for data in (few, ProbeData(poisoned, few.row_numbers, CLASSES)):
        chosen = choose_l2_penalty(data, [1e-4, 1e-2, 1e3], 0.2, seed=0)
        assert chosen["l2"] != 1e3, "a probe of almost no weight is the worst"
        assert chosen["held_out"][f"{chosen['l2']:g}"] == max(chosen["held_out"].values())
        assert chosen["held_out_images"] == 35
        rate = choose_lr(data, [1e-7, 0.1], 0.2, epochs=5, batch_size=64)
        assert rate["lr"] == 0.1


def test_a_diverged_probe_is_never_right_nor_chosen() -> None:
    train = cloud(100, seed=8, dtype=torch.float32)
    probes = train_sgd_probes(whole(train), [1e38], [0], epochs=3, batch_size=100)
    assert not probes[0, 1e38].weight.isfinite().all()
    assert probe_accuracy(probes[0, 1e38], train) == (0.0, 0.0)
    assert choose_lr(whole(train), [0.1, 1e38], 0.2, epochs=3, batch_size=100)["lr"] == 0.1


def test_subsets_are_balanced_nested_and_repeat() -> None:
    labels = torch.arange(10).repeat(100)[torch.randperm(1000)]
    one, ten = draw_class_share(labels, 0.01, seed=3), draw_class_share(labels, 0.1, seed=3)
    assert torch.bincount(labels[one]).tolist() == [1] * 10
    assert torch.bincount(labels[ten]).tolist() == [10] * 10
    assert set(one.tolist()) < set(ten.tolist())
    assert torch.equal(ten, draw_class_share(labels, 0.1, seed=3))
    assert not torch.equal(ten, draw_class_share(labels, 0.1, seed=4))
    rare = torch.tensor([0] * 50 + [1])
    assert rare[draw_class_share(rare, 0.01, seed=0)].tolist() == [0, 1], "a class never vanishes"


def test_what_is_held_out_is_a_part_of_each_class() -> None:
    labels, rows = torch.arange(10).repeat(30), torch.arange(0, 300, 3)
    fit, check = split_by_class(labels, rows, 0.2, seed=0)
    assert sorted(fit.tolist() + check.tolist()) == rows.tolist()
    assert torch.bincount(labels[check]).tolist() == [2] * 10
    fit, check = split_by_class(torch.arange(5), torch.arange(5), 0.2, seed=0)
    assert (fit.tolist(), check.tolist()) == ([0, 1, 2, 3, 4], [])


def test_one_image_of_each_class_is_enough() -> None:
    train = cloud(CLASSES, seed=9)
    assert choose_l2_penalty(whole(train), [1e-3, 1e-2, 1e-1], 0.1, seed=0)["l2"] == 1e-2
    assert probe_accuracy(fit_logistic_probes(whole(train), [1e-2])[1e-2], train).top1 == 1


def test_a_feature_that_never_varies_and_a_missing_class_do_no_harm() -> None:
    train, test = cloud(200, seed=10, dtype=torch.float32), cloud(100, seed=11)
    some = train.labels < CLASSES - 1
    train = LabelledFeatures(F.pad(train.features, (0, 1), value=0.1)[some], train.labels[some])
    test = LabelledFeatures(F.pad(test.features, (0, 1), value=0.7).float(), test.labels)
    probe = fit_logistic_probes(whole(train), [1e-3])[1e-3]
    predicted = probe.logits(test.features).argmax(1)
    assert CLASSES - 1 not in predicted.tolist()
    assert probe_accuracy(probe, test).top1 > 0.3
    assert np.isfinite(probe.weight.numpy()).all()
