"""Risk and coverage, rank correlations and corruptions, by hand; the tasks on real photographs."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from sklearn.neighbors import KNeighborsClassifier

from tests.support.exports import NORMALISE, by_hand, exported
from tests.support.heads import SMALL, exported_branch
from tests.support.photos import three_splits
from vssl_dist.commands.evaluate import main, titled_table_rows
from vssl_dist.config import RECIPES, OodConfig, UncertaintyConfig
from vssl_dist.console.tables import make_tables
from vssl_dist.data.passes import Pairs
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.corruptions import (
    CORRUPTION_BY_KIND,
    NUM_LEVELS,
    corrupt,
)
from vssl_dist.evaluation.features.extract import ImageReading, stream_features
from vssl_dist.evaluation.features.variants import AugmentedPairs, stream_variant_features
from vssl_dist.evaluation.run import evaluate, evaluate_baselines
from vssl_dist.evaluation.scores.cross_view import score_view_pairs
from vssl_dist.evaluation.scores.posterior import load_posterior
from vssl_dist.evaluation.scores.selective import (
    aurc,
    find_knn_failures,
    mean_within_image_spearman,
    risk_coverage_curve,
    spearman_correlation,
)
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.scores.variational import VariationalSetup, posterior_size
from vssl_dist.exports.read import load_export

QUICK = UncertaintyConfig(k=3, max_corrupted=8, shown=4, batch=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return three_splits(tmp_path_factory.mktemp("shards"), foreign=40)


def test_risk_is_the_share_of_failures_among_the_most_certain() -> None:
    uncertainty = np.array([0.3, 0.1, 0.3, 0.2, 0.3])
    failed = np.array([1.0, 0.0, 0.0, 1.0, 0.0])
    rising = sorted(uncertainty)
    orders = [list(o) for o in permutations(range(5)) if list(uncertainty[list(o)]) == rising]
    curves = [np.cumsum(failed[order]) / np.arange(1, 6) for order in orders]
    assert len(curves) == 6
    assert risk_coverage_curve(uncertainty, failed) == pytest.approx(np.mean(curves, axis=0))
    assert aurc(uncertainty, failed) == pytest.approx(np.mean(curves))
    assert aurc(failed, failed) < aurc(uncertainty, failed) < aurc(-failed, failed)
    assert aurc(np.zeros(5), failed) == pytest.approx(0.4), "what knows nothing has the error rate"


def test_rank_correlations_are_scipys() -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 5, (20, 6)).astype(float)
    strength = np.arange(6.0)
    pooled = np.broadcast_to(strength, values.shape).ravel()
    assert spearman_correlation(values.ravel(), pooled) == pytest.approx(
        spearmanr(values.ravel(), pooled)[0]
    )
    each = [spearmanr(row, strength)[0] for row in values]
    assert mean_within_image_spearman(values, strength) == pytest.approx(np.mean(each))
    assert spearman_correlation(np.exp(strength), strength) == pytest.approx(1)
    assert mean_within_image_spearman(
        -np.exp(values[:1] * 0 + strength), strength
    ) == pytest.approx(-1)
    assert spearman_correlation(np.ones(6), strength) == 0
    assert mean_within_image_spearman(np.ones((3, 6)), strength) == 0


def test_failures_are_those_of_scikit_learns_neighbours() -> None:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(150) % 3
    x = torch.randn(150, 4, generator=random) + 1.0 * torch.eye(3, 4)[labels]
    bank, queries = LabelledFeatures(x[:100], labels[:100]), LabelledFeatures(x[100:], labels[100:])
    oracle = KNeighborsClassifier(
        9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
    )
    expected = oracle.fit(bank.features, bank.labels).predict(queries.features)
    actual = find_knn_failures(bank, queries, k=9, temperature=0.1)
    assert actual.tolist() == (expected != queries.labels.numpy()).astype(float).tolist()
    assert 0 < actual.mean() < 1


@pytest.mark.parametrize("kind", list(CORRUPTION_BY_KIND))
def test_a_corruption_is_stronger_at_each_level_and_each_image_its_own(kind: str) -> None:
    random = torch.Generator().manual_seed(1)
    images, ids = torch.rand(4, 3, 32, 32, generator=random), torch.tensor([5, 6, 7, 8])
    before = torch.get_rng_state()
    made = [corrupt(images, ids, kind, level) for level in range(NUM_LEVELS + 1)]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(made[0], images)
    away = torch.stack([(one - images).square().mean((1, 2, 3)) for one in made])
    assert (away.diff(dim=0) > 0).all()
    assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in made)
    alone = corrupt(images[2:3], ids[2:3], kind, 3)
    assert torch.allclose(alone[0], made[3][2], atol=1e-6)
    noise = corrupt(torch.full_like(images, 0.5), ids, "noise", 1)
    assert not torch.equal(noise[0], noise[1])


def test_pairs_are_the_views_of_training_whatever_the_batch(data: Path) -> None:
    dataset = Dataset.open(data / "val")
    recipes = RECIPES["cifar"], RECIPES["cifar_byol_2"]
    variants = AugmentedPairs(Pairs(recipes, count=2, seed=0))

    def flat(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    found, first = [], np.arange(10)
    for batch in (4, 1000):
        reading = ImageReading(32, NORMALISE, batch_size=batch, backend="reference")
        rows, labels = zip(
            *stream_variant_features(flat, dataset, reading, variants, first), strict=True
        )
        found.append(torch.cat(rows).view(10, 4, -1))
        assert torch.cat(labels).view(10, 4).unique(dim=1).shape == (10, 1)
    assert torch.equal(*found)
    assert len(found[0].flatten(0, 1).unique(dim=0)) == 40, "no view twice"
    assert variants.cache_facts == json.loads(json.dumps(variants.cache_facts))


@pytest.mark.parametrize("case", ["vje", "vssl teacher"])
def test_the_task_says_what_the_posterior_knows(tmp_path: Path, data: Path, case: str) -> None:
    path, _ = exported_branch(tmp_path / "export", data, SMALL[case])
    found = evaluate(path, QUICK)["results"]
    posterior, backbone = load_posterior(path), load_export(path)[0]
    assert posterior is not None
    with torch.no_grad():
        bank, queries = (
            LabelledFeatures(backbone(images), torch.from_numpy(labels))
            for images, labels in (by_hand(data / "train"), by_hand(data / "val"))
        )
    size = posterior_size(posterior, queries.features).numpy()
    failed = find_knn_failures(bank, queries, 3, 0.07)
    assert found["error"] == pytest.approx(failed.mean())
    assert found["risk"]["posterior_size"]["aurc"] == pytest.approx(aurc(size, failed), abs=0.01)
    assert found["aurc_best"] <= found["risk"]["knn_distance"]["aurc"]
    assert found["most_certain"] == size.argsort(kind="stable")[:4].tolist()
    assert set(found["corruptions"]) == set(CORRUPTION_BY_KIND)
    for one in found["corruptions"].values():
        assert one["sizes"][0] == pytest.approx(size[:8].mean(), rel=1e-4)
        assert len(one["sizes"]) == NUM_LEVELS + 1
        assert -1 <= one["within"] <= 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (NORMALISE.mean, NORMALISE.std))
    pixels = (by_hand(data / "val")[0][:8] * std + mean).clamp(0, 1)
    worse = [corrupt(pixels, torch.arange(8), "blur", level) for level in range(NUM_LEVELS + 1)]
    with torch.no_grad():
        sizes = [posterior_size(posterior, backbone((one - mean) / std)) for one in worse]
    levels = np.repeat(np.arange(NUM_LEVELS + 1), 8)
    blur = found["corruptions"]["blur"]
    assert blur["sizes"] == pytest.approx([float(one.mean()) for one in sizes], rel=1e-3)
    assert blur["spearman"] == pytest.approx(spearmanr(torch.cat(sizes), levels)[0], abs=0.02)
    for name in ("risk", "corruptions", "sheet"):
        with Image.open(path.with_name(f"uncertainty-00000040-{name}.png")) as picture:
            assert min(picture.size) > 200
    if case == "vje":
        controls = evaluate_baselines(path, QUICK)["results"]
        assert [list(one["risk"]) for one in controls.values()] == [["knn_distance"]] * 2


@pytest.mark.parametrize("case", ["vje, all learnt", "vssl teacher"])
def test_scores_of_the_method_stand_beside_the_controls(
    tmp_path: Path, data: Path, case: str
) -> None:
    path, _ = exported_branch(tmp_path / "export", data, SMALL[case])
    task = OodConfig(ood={"others": data / "foreign"}, k=3, bootstrap=5, batch=50, pairs=2)
    found = evaluate(path, task)["results"]["others"]
    assert list(found) == [
        "knn",
        "mahalanobis",
        "max_softmax",
        "norm",
        "s1_self_likelihood",
        "s2_cross_view_likelihood",
        "s3_negative_elbo",
        "s4_posterior_size",
        "s5_bank_likelihood",
    ]
    posterior, backbone = load_posterior(path), load_export(path)[0]
    assert posterior is not None
    scores: list[dict[str, torch.Tensor]] = []
    for part in ("val", "foreign"):
        reading = ImageReading(32, NORMALISE, backend="reference")
        variants = AugmentedPairs(Pairs((RECIPES["cifar"],) * 2, count=2, seed=0))
        dataset = Dataset.open(data / part)
        ids = np.arange(dataset.samples)
        rows = [r for r, _ in stream_variant_features(backbone, dataset, reading, variants, ids)]
        views = torch.cat(rows).view(dataset.samples, 4, -1)
        plain = torch.cat([r for r, _ in stream_features(backbone, dataset, reading, ids)])
        scores.append(score_view_pairs(VariationalSetup(posterior, "polar"), plain, views))
    kinds = [kind for kind in found if kind.startswith(("s1", "s2", "s3"))]
    assert sorted(scores[0]) == (kinds if case == "vssl teacher" else kinds[1:2])
    for kind, inside in scores[0].items():
        auroc = float((scores[1][kind][None] > inside[:, None]).double().mean())
        assert found[kind]["auroc"] == pytest.approx(auroc, abs=1e-3)
    if case == "vssl teacher":
        without = evaluate(path, task.model_copy(update={"pairs": 0}))["results"]["others"]
        assert [kind for kind in without if kind.startswith("s")] == [
            "s4_posterior_size",
            "s5_bank_likelihood",
        ]
        return
    cartesian = task.model_copy(update={"density": "cartesian", "pairs": 0})
    other = evaluate(path, cartesian)["results"]["others"]
    assert "s2_cross_view_likelihood" not in other
    assert other["s1_self_likelihood"] != found["s1_self_likelihood"]
    assert other["s4_posterior_size"] == found["s4_posterior_size"]


def test_an_export_without_a_posterior_is_one_line(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = exported(tmp_path / "export", data)
    with pytest.raises(DataError, match="vje and vssl have one"):
        evaluate(path, QUICK)
    assert main([str(tmp_path), "--device", "cpu", "--task", "knn,uncertainty"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: uncertainty: run tiny")
    assert said.count("\n") == 1
    assert not list(path.parent.glob("knn-*.json")), "refused before anything is computed"
    ood = OodConfig(ood={"x": data / "foreign"}, k=3, bootstrap=0, batch=50)
    assert list(evaluate(path, ood)["results"]["x"]) == [
        "knn",
        "mahalanobis",
        "max_softmax",
        "norm",
    ]


def test_a_line_that_lacks_a_figure_keeps_the_others_in_their_places() -> None:
    less = {"error": 0.5, "aurc_best": 0.1, "risk": {"knn_distance": {"aurc": 0.3}}}
    full = less | {"risk": {"posterior_size": {"aurc": 0.2}, "knn_distance": {"aurc": 0.4}}}
    (shown,) = make_tables(
        *titled_table_rows("uncertainty", [("pixels", less), ("step 1", full)]), width=200
    )
    columns = {str(column.header): list(map(str, column.cells)) for column in shown.columns}
    assert columns["AURC posterior size"] == ["-", "20.0"]
    assert columns["AURC knn distance"] == ["30.0", "40.0"]
    many = {f"score_{n}": {"auroc": n / 100, "fpr95": 0.5} for n in range(12)}
    lines = [("pixels", {"svhn": {"score_3": many["score_3"]}}), ("x", {"svhn": many})]
    (shown,) = make_tables(*titled_table_rows("ood", lines), width=200)
    assert [str(column.header) for column in shown.columns][1:] == ["pixels", "x"]
    names, pixels, _ = (list(map(str, column.cells)) for column in shown.columns)
    assert [name for name, cell in zip(names, pixels, strict=True) if cell != "-"] == [
        "svhn score 3"
    ]
    assert len(names) == 12
