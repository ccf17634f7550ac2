"""Figures say what they rest on: images that are damaged are counted, and few of them bearable."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.support.damage import flip, one_line, place
from tests.support.exports import NORMALISE, exported
from tests.support.photos import tiny_dataset
from vssl_dist.commands.evaluate import main
from vssl_dist.config import RECIPES, CollapseConfig, FinetuneConfig, KnnConfig
from vssl_dist.data.passes import Pairs
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.extract import ImageReading
from vssl_dist.evaluation.features.variants import (
    AugmentedPairs,
    CorruptedVariants,
    ImageVariants,
)
from vssl_dist.evaluation.run import (
    EvalSettings,
    evaluate,
    evaluate_baselines,
)
from vssl_dist.jobs.evaluation_job import PendingEvaluation, evaluate_export

TASK = KnnConfig(k=(5,), temperature=(0.07,), batch=16)
BAD = (3, 17, 30)
"""In both stretches of a pass that two processes share."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=60, shard_size=20)
    val = tiny_dataset(folder / "apart", samples=40, shard_size=10, split="val", first=9_000)
    val.rename(folder / "val")
    return folder


@pytest.fixture
def data(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def toggle(folder: Path, samples: tuple[int, ...] | range) -> None:
    """Flip a bit of each image; done twice it mends them."""
    for sample in samples:
        path, offset, size = place(folder, sample)
        flip(path, offset + size // 2)


def test_a_result_counts_and_lists_what_was_replaced_and_says_it_once(
    tmp_path: Path, data: Path
) -> None:
    path, _ = exported(tmp_path / "export", data)
    toggle(data / "val", BAD)
    with pytest.warns(UserWarning, match="sample 3 is evaluated as 4") as caught:
        found = evaluate(path, TASK)
    (line,) = [str(one.message) for one in caught if one.category is UserWarning]
    assert line.startswith(f"{data / 'val'}: damaged images: 3; ")
    assert found["substituted_images"] == found["metrics"]["knn/substituted_images"] == 3
    listed = found["substitutions"]["queries"]
    assert [(one["planned"], one["used"]) for one in listed] == [(3, 4), (17, 18), (30, 31)]
    assert all("crc32 differs" in one["reason"] for one in listed)
    assert json.loads(path.with_name("knn-00000040.json").read_text()) == found
    with pytest.warns(UserWarning, match="damaged images: 3"):
        below = evaluate_baselines(path, TASK)
    assert (below["substituted_images"], below["substitutions"]) == (3, found["substitutions"])


def test_figures_of_mended_data_are_those_of_sound_data(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "a" / "export", data)
    sound = evaluate(path, TASK)
    assert (sound["substituted_images"], sound["substitutions"]) == (0, {})
    assert sound["metrics"]["knn/substituted_images"] == 0
    path, _ = exported(tmp_path / "b" / "export", data)
    toggle(data / "val", BAD)
    with pytest.warns(UserWarning, match="damaged images: 3"):
        spoilt = evaluate(path, TASK)
    assert spoilt["results"] != sound["results"]
    entries = list((path.parent / "features").glob("[!.]*/seal.json"))
    seals = [json.loads(entry.read_text()) for entry in entries]
    prints = [seal["images"]["fingerprint"] for seal in seals]
    assert prints == [Dataset.open(data / "train").fingerprint], "only the sound split is kept"
    toggle(data / "val", BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mended = evaluate(path, TASK)
    assert {**mended, "seconds": 0} == {**sound, "seconds": 0}


def test_several_processes_count_what_one_would(tmp_path: Path, data: Path) -> None:
    found = []
    toggle(data / "val", BAD)
    for ranks in (1, 2):
        path, _ = exported(tmp_path / str(ranks), data)
        with pytest.warns(UserWarning, match="damaged images: 3"):
            found.append(evaluate(path, TASK, EvalSettings(ranks=ranks)))
    assert {**found[0], "seconds": 0} == {**found[1], "seconds": 0}


def test_fine_tuning_counts_an_image_once_in_all_epochs(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    toggle(data / "train", (5,))
    task = FinetuneConfig(epochs=2, train_batch=20, lr=(0.1,), seeds=1, batch=50)
    with pytest.warns(UserWarning, match="damaged images: 1; sample 5 is evaluated as 6"):
        found = evaluate(path, task)
    assert [one["planned"] for one in found["substitutions"]["bank"]] == [5]


@pytest.mark.parametrize(
    "variants",
    [CorruptedVariants(), AugmentedPairs(Pairs((RECIPES["cifar"],) * 2, count=1, seed=0))],
)
def test_variants_of_a_damaged_image_are_noted(data: Path, variants: ImageVariants) -> None:
    toggle(data / "val", BAD)
    reading = ImageReading(32, NORMALISE, batch_size=16, backend="reference")
    dataset = Dataset.open(data / "val")
    for _ in variants.variant_batches(dataset, reading, np.arange(20)):
        pass
    assert [bad.planned for bad in reading.substitution_tally.substitutions_in_split(dataset)] == [
        3,
        17,
    ]


@pytest.mark.parametrize("ranks", [1, 2])
def test_beyond_the_budget_an_evaluation_stops_and_records_nothing(
    tmp_path: Path, data: Path, ranks: int
) -> None:
    path, _ = exported(tmp_path / "export", data)
    toggle(data / "val", range(0, 40, 4))
    with pytest.warns(UserWarning, match="damaged images: 10"):
        evaluate(path, CollapseConfig(batch=16), EvalSettings(ranks=ranks))
    toggle(data / "val", (39,))
    with pytest.raises(DataError, match=r"data_prep/verify\.py") as error:
        evaluate(path, TASK, EvalSettings(ranks=ranks))
    assert one_line(error).startswith(f"{data / 'val'}: 11 of ")
    assert not list(path.parent.glob("knn-*"))


def test_the_command_ends_with_2_beyond_the_budget(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = exported(tmp_path / "export", data)
    toggle(data / "val", range(0, 40, 3))
    assert main([str(path), "--device", "cpu"]) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(f"error: {data / 'val'}: ")
    assert stderr.count("\n") == 1


def test_a_result_with_substitutes_is_done_but_not_final(tmp_path: Path, data: Path) -> None:
    path, _ = exported(tmp_path / "export", data)
    one = PendingEvaluation(path, 40, TASK)
    assert not one.is_done()
    assert not one.is_final()
    toggle(data / "val", (3,))
    with pytest.warns(UserWarning, match="damaged images: 1"):
        evaluate_export(tmp_path, one, "cpu", 1)
    assert one.is_done(), "who evaluates beside a training does not do it for ever"
    assert not one.is_final()
    toggle(data / "val", (3,))
    evaluate_export(tmp_path, one, "cpu", 1)
    assert one.is_final()
