"""An evaluation rests on the export and the shards alone, and says clearly when it cannot."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from data_prep.shard import main as shard
from tests.support.exports import NORMALISE, by_hand, change, exported
from tests.support.photos import tiny_dataset
from vssl_dist.config import KnnConfig, Normalisation
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError, ExportError
from vssl_dist.evaluation.features.extract import (
    ImageReading,
    build_random_network,
    extract_features,
    flatten_pixels,
)
from vssl_dist.evaluation.run import (
    EvalSettings,
    evaluate,
    evaluate_baselines,
)
from vssl_dist.exports.read import load_export
from vssl_dist.models.backbones import build_backbone

TASK = KnnConfig(k=(5, 20), temperature=(0.07, 1.0), batch=50)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=400, classes=16, shard_size=100)
    # Apart, because plain walls look alike, and one dataset may not hold an image in both splits.
    val = tiny_dataset(
        folder / "apart", samples=120, classes=16, shard_size=50, split="val", first=10_000
    )
    val.rename(folder / "val")
    return folder


def score(network: Callable[[Tensor], Tensor], data: Path, k: int, temperature: float) -> float:
    """The accuracy that scikit-learn finds with features computed outside the package."""
    (bank, bank_labels), (queries, labels) = by_hand(data / "train"), by_hand(data / "val")
    with torch.no_grad():
        features = [network(images).double().numpy() for images in (bank, queries)]
    oracle = KNeighborsClassifier(
        k, weights=lambda d: np.exp((1 - d) / temperature), metric="cosine", algorithm="brute"
    )
    return float(oracle.fit(features[0], bank_labels).score(features[1], labels))


def test_the_accuracy_of_an_export_is_scikit_learns(tmp_path: Path, data: Path) -> None:
    path, backbone = exported(tmp_path, data)
    result = evaluate(path, TASK)
    for k in TASK.k:
        for temperature in TASK.temperature:
            found = result["results"][f"k{k}_t{temperature:g}"]["top1"]
            # Rounding in another batch size may turn one vote of 120.
            assert found == pytest.approx(score(backbone, data, k, temperature), abs=1 / 119)
    assert 0.15 < result["metrics"]["knn/top1"] < 0.95, "neither chance (1/16) nor perfect"
    assert result["metrics"]["knn/top1"] == result["metrics"]["knn/top1_k5_t0.07"]
    assert result["metrics"]["knn/top5_k20_t1"] == result["results"]["k20_t1"]["top5"]
    assert (result["step"], result["run"]) == (40, "tiny")
    assert (result["bank"]["samples"], result["queries"]["samples"]) == (400, 120)
    assert json.loads((tmp_path / "knn-00000040.json").read_text()) == result


def test_the_baselines_are_raw_pixels_and_the_untrained_network(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path, data)
    result = evaluate_baselines(path, TASK)
    raw = result["results"]["raw_pixels"]["k20_t0.07"]["top1"]
    assert raw == pytest.approx(score(flatten_pixels, data, 20, 0.07), abs=1 / 119)
    torch.manual_seed(0)
    network = build_backbone("resnet18_c16", 32)[0].eval()
    untrained = result["results"]["random_network"]["k20_t0.07"]["top1"]
    assert untrained == pytest.approx(score(network, data, 20, 0.07), abs=1 / 119)


def test_the_same_evaluation_is_done_once(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path, data)
    first = evaluate(path, TASK)
    written = (tmp_path / "knn-00000040.json").stat().st_mtime_ns
    assert evaluate(path, TASK) == first
    assert (tmp_path / "knn-00000040.json").stat().st_mtime_ns == written
    exported(tmp_path, data, seed=2)
    other = evaluate(path, TASK)
    assert other["export_sha256"] != first["export_sha256"]
    fewer = evaluate(path, KnnConfig(k=(5,), temperature=(0.07,), max_bank=100, max_queries=30))
    assert (fewer["bank"]["samples"], fewer["queries"]["samples"]) == (100, 30)
    assert list(tmp_path.glob("knn-*.json")) == [tmp_path / "knn-00000040.json"]


def test_datasets_can_be_given_instead_of_the_cards(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "a", data)
    default_result = evaluate(path, TASK)
    change(path, train=str(tmp_path / "moved" / "train"), val=None)
    with pytest.raises(DataError, match="held-out"):
        evaluate(path, TASK)
    explicit_result = evaluate(
        path, TASK, EvalSettings(train=data / "train", val=data / "val", threads=1)
    )
    assert explicit_result["results"] == default_result["results"]
    elsewhere = evaluate(path, TASK, EvalSettings(train=data / "val", val=data / "train"))
    assert elsewhere["results"] != default_result["results"]
    assert json.loads((tmp_path / "a" / "knn-00000040.json").read_text()) == default_result
    assert len(list((tmp_path / "a").glob("knn-00000040-on-*.json"))) == 2


def test_an_export_gives_back_the_network(tmp_path: Path, data: Path) -> None:
    path, backbone = exported(tmp_path, data)
    loaded, card = load_export(path)
    images = torch.randn(4, 3, 32, 32)
    assert not loaded.training
    assert card.backbone == "resnet18_c16"
    assert torch.equal(loaded(images), backbone(images))


def test_features_do_not_depend_on_the_batch(data: Path) -> None:
    dataset, network = Dataset.open(data / "val"), build_random_network("resnet18_c16", 32)
    seen: list[tuple[int, int]] = []
    made = [
        extract_features(
            network,
            dataset,
            ImageReading(32, NORMALISE, batch_size=batch, backend="reference"),
            report_progress=lambda done, total: seen.append((done, total)),
        )
        for batch in (7, 120)
    ]
    torch.testing.assert_close(made[0].features, made[1].features)
    assert made[0].labels.tolist() == by_hand(data / "val")[1].tolist()
    assert seen[-1] == (120, 120)
    assert seen[0] == (7, 120)


def test_the_random_network_is_the_same_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = build_random_network("resnet18_c16", 32)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    other = build_random_network("resnet18_c16", 32).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.state_dict().items())


def missing(path: Path, data: Path) -> None:
    path.unlink()


def without_card(path: Path, data: Path) -> None:
    path.with_suffix(".json").unlink()


def damaged_card(path: Path, data: Path) -> None:
    path.with_suffix(".json").write_text('{"backbone": "resn')


def foreign_card(path: Path, data: Path) -> None:
    path.with_suffix(".json").write_text('{"model": "x"}')


def cut_short(path: Path, data: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def one_bit(path: Path, data: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def another_backbone(path: Path, data: Path) -> None:
    change(path, backbone="resnet18")


def unreadable_folder(path: Path, data: Path) -> None:
    change(path, train=str(path.parent / "absent" / "train"))


def bank_is_query(path: Path, data: Path) -> None:
    change(path, val=str(data / "train"))


def other_classes(path: Path, data: Path) -> None:
    other = tiny_dataset(path.parent, samples=20, classes=3, split="val", first=500)
    change(path, val=str(other))


def not_finite(path: Path, data: Path) -> None:
    weights = build_backbone("resnet18_c16", 32)[0].state_dict()
    save_file(weights | {"bn1.bias": torch.full((16,), float("nan"))}, path)
    change(path, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (missing, ExportError, "no such export"),
        (without_card, ExportError, "card backbone-00000040.json is missing"),
        (damaged_card, ExportError, "card is damaged"),
        (foreign_card, ExportError, "lacks backbone"),
        (cut_short, ExportError, "damaged, or not safetensors"),
        (one_bit, ExportError, "not those its card was written for"),
        (another_backbone, ExportError, "tensors differ"),
        (unreadable_folder, DataError, "absent/train"),
        (bank_is_query, DataError, "find itself"),
        (other_classes, DataError, "16 classes"),
        (not_finite, DataError, "not finite"),
    ],
)
def test_what_cannot_be_evaluated_is_one_clear_line(
    tmp_path: Path,
    data: Path,
    harm: Callable[[Path, Path], None],
    kind: type[ValueError],
    words: str,
) -> None:
    path, _ = exported(tmp_path, data)
    harm(path, data)
    with pytest.raises(kind, match=words) as error:
        evaluate(path, TASK)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("knn-*"))


@pytest.mark.slow
@pytest.mark.skipif("VSSL_TEST_DATA" not in os.environ, reason="VSSL_TEST_DATA is not set")
def test_raw_pixels_of_cifar10_reach_the_known_accuracy(tmp_path: Path) -> None:
    source = Path(os.environ["VSSL_TEST_DATA"])
    unpack = [sys.executable, str(source / "unpack_cifar.py"), "--out", str(tmp_path / "raw")]
    subprocess.run(unpack, check=True, cwd=source)
    arguments = ["cifar10", "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "c10")]
    assert shard([*arguments, "--limit", "10000"]) == 0
    reading = Normalisation(mean=(0.4914, 0.48216, 0.44653), std=(0.24703, 0.24349, 0.26159))
    path, _ = exported(tmp_path / "export", tmp_path / "c10")
    change(path, normalise=reading.model_dump(mode="json"))
    # At an infinite temperature all votes weigh the same.
    task = KnnConfig(k=(20,), temperature=(0.07, math.inf), max_bank=10_000, max_queries=2_000)
    raw = evaluate_baselines(path, task)["results"]["raw_pixels"]
    assert raw["k20_t0.07"]["top1"] == pytest.approx(0.394, abs=0.002)
    assert raw["k20_tinf"]["top1"] == pytest.approx(0.376, abs=0.002)
