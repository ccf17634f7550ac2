"""Several processes compute the bits that one would, each image once, or nothing at all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from tests.support.exports import NORMALISE, exported
from tests.support.passes import Image, broken, fatal, pixels, slow
from tests.support.photos import tiny_dataset
from vssl_dist.commands.evaluate import main
from vssl_dist.config import RECIPES
from vssl_dist.data.passes import Pairs
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import ConfigError, DataError, ExportError
from vssl_dist.evaluation.features.cache import FeatureCache
from vssl_dist.evaluation.features.extract import (
    FeatureFunction,
    ImageReading,
    flatten_pixels,
)
from vssl_dist.evaluation.features.variants import (
    AugmentedPairs,
    CorruptedVariants,
    ImageVariants,
)
from vssl_dist.evaluation.features.workers import ImagePass, choose_gpu_index
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.subject import Network

SAMPLES, BATCH = 90, 16
READING = ImageReading(32, NORMALISE, batch_size=BATCH, backend="reference", threads=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    tiny_dataset(folder, samples=SAMPLES, classes=6, shard_size=40)
    val = tiny_dataset(folder / "apart", samples=30, classes=6, split="val", first=9_000)
    val.rename(folder / "val")
    return folder


def a_pass(data: Path, network: Network, variants: ImageVariants | None = None) -> ImagePass:
    return ImagePass(network.load_network, Dataset.open(data / "train"), READING, SAMPLES, variants)


def computed(image_pass: ImagePass, ranks: int, folder: Path) -> LabelledFeatures:
    images = {"samples": image_pass.row_count}
    features = FeatureCache(folder).get_or_compute(
        {"ranks": ranks}, images, image_pass.feature_source(ranks)
    )
    assert not list(folder.glob(".tmp-*")) + list(folder.glob("*/parts"))
    return features


def workers() -> list[psutil.Process]:
    """Processes that were forked for a pass: grandchildren, of the server that imported torch."""
    servers = psutil.Process().children()
    return [child for server in servers for child in server.children()]


@pytest.mark.parametrize("count", [1, 15, 16, 17, 160, 1000])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 100])
def test_id_ranges_are_whole_batches_of_every_image_once(count: int, ranks: int) -> None:
    image_pass = ImagePass(lambda: flatten_pixels, None, READING, count)  # type: ignore[arg-type]
    id_ranges = image_pass.id_ranges(ranks)
    assert [number for ids in id_ranges for number in ids] == list(range(count))
    assert len(id_ranges) == min(ranks, -(-count // BATCH))
    assert all(ids.start % BATCH == 0 for ids in id_ranges)
    batches = [-(-len(ids) // BATCH) for ids in id_ranges]
    assert max(batches) - min(batches) <= 1


@pytest.mark.parametrize(
    ("variants", "ranks"),
    [
        (None, (2, 3, 50)),
        (AugmentedPairs(Pairs((RECIPES["cifar"],) * 2, count=2, seed=0)), (3,)),
        pytest.param(CorruptedVariants(), (2,), marks=pytest.mark.slow),
    ],
)
def test_the_features_are_those_of_one_process_bit_for_bit(
    tmp_path: Path, data: Path, variants: ImageVariants | None, ranks: tuple[int, ...]
) -> None:
    path, _ = exported(tmp_path / "export", data)
    image_pass = a_pass(data, Network.of_export(path), variants)
    one = computed(image_pass, 1, tmp_path / "cache")
    assert one.features.shape == (image_pass.row_count, 128)
    for count in ranks:
        several = computed(image_pass, count, tmp_path / "cache")
        assert several.features.numpy().tobytes() == one.features.numpy().tobytes(), count
        assert torch.equal(several.labels, one.labels), count
    assert workers() == []


def test_each_image_is_seen_once_in_the_order_of_the_ids(tmp_path: Path, data: Path) -> None:
    image_pass = a_pass(data, Network(pixels, None))
    features = computed(image_pass, 4, tmp_path)
    dataset = Dataset.open(data / "train")
    ids = np.arange(SAMPLES)
    straight = [batch.views[0].flatten(1) for batch in READING.read_batches(dataset, ids)]
    assert torch.equal(features.features, torch.cat(straight))
    assert len(features.features.unique(dim=0)) == SAMPLES, "no two images are alike"
    assert features.labels.tolist() == dataset.rows(ids)["label"].tolist()


@pytest.mark.parametrize(
    ("load", "words"),
    [(fatal, "rank 1 of 2 was killed (signal 9)"), (broken, "rank 1 of 2 failed with exit code 1")],
)
def test_a_worker_that_dies_ends_all_with_one_line_and_leaves_nothing(
    tmp_path: Path, data: Path, load: Callable[[Image], FeatureFunction], words: str
) -> None:
    batches = READING.read_batches(Dataset.open(data / "train"), np.arange(SAMPLES))
    late = [batch.views[0][0].numpy() for batch in batches][4]
    image_pass = a_pass(data, Network(partial(load, late), None))
    with pytest.raises(DataError) as error:
        computed(image_pass, 2, tmp_path)
    assert words in str(error.value)
    assert str(data / "train") in str(error.value)
    assert "\n" not in str(error.value)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == []
    assert workers() == []


def test_what_a_worker_cannot_read_is_said_as_one_process_says_it(
    tmp_path: Path, data: Path
) -> None:
    path, _ = exported(tmp_path / "export", data)
    network = Network.of_export(path)
    path.write_bytes(path.read_bytes()[:-100])
    for ranks in (1, 2):
        with pytest.raises(ExportError, match="damaged, or not safetensors"):
            computed(a_pass(data, network), ranks, tmp_path / "cache")


def test_who_loses_interest_ends_the_workers(tmp_path: Path, data: Path) -> None:
    image_pass = a_pass(data, Network(pixels, None))
    rows = image_pass.feature_source(3)(tmp_path / "parts")
    next(rows)
    rows.close()
    assert workers() == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_shares_a_pass_out(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for ranks in ("1", "3"):
        path, _ = exported(tmp_path / ranks / "export", data)
        arguments = [str(tmp_path / ranks), "--device", "cpu", "--ranks", ranks, "--threads", "1"]
        assert main([*arguments, "--task", "knn,collapse"]) == 0
        task_results = [json.loads(path.with_name(f"{t}-00000040.json").read_text()) for t in
                 ("knn", "collapse")]  # fmt: skip
        results.append([task_result["results"] for task_result in task_results])
    assert results[0] == results[1]
    with pytest.raises(SystemExit):
        main([*arguments, "--ranks", "0"])
    assert "--ranks: at least 1" in capsys.readouterr().err


def test_each_process_takes_a_gpu_and_none_is_a_refusal(
    tmp_path: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert [choose_gpu_index(rank, 2) for rank in range(4)] == [0, 1, 0, 1]
    assert choose_gpu_index(3, 1) == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # where there are GPUs, nobody sees them
    with pytest.raises(ConfigError, match=r"rank 1: torch sees no GPU .*--device cpu"):
        choose_gpu_index(1, torch.cuda.device_count())
    path, _ = exported(tmp_path / "export", data)
    for ranks in ("1", "2"):
        assert main([str(path), "--device", "cuda", "--ranks", ranks]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "--device cpu" in err


def endless(data: Path, folder: Path) -> None:
    """What a test kills."""
    computed(a_pass(data, Network(slow, None)), 3, folder)


@pytest.mark.slow
def test_a_parent_that_is_killed_leaves_no_process_and_no_entry(tmp_path: Path, data: Path) -> None:
    program = (
        "from pathlib import Path; from tests.evaluation.features.test_workers import endless; "
        f"endless(Path({str(data)!r}), Path({str(tmp_path)!r}))"
    )
    parent = psutil.Process(
        subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3]).pid
    )
    family: list[psutil.Process] = []
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(".tmp-*/parts/*.partial/features.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = parent.children(recursive=True)
    assert len(family) >= 3
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert not list(tmp_path.glob("*/seal.json"))
    features = computed(a_pass(data, Network(pixels, None)), 3, tmp_path)
    assert len(features.features) == SAMPLES
