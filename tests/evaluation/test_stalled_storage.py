"""Storage that stalls is named within the timeout of the run that is evaluated."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.cards import portable_card
from tests.support.damage import one_line
from tests.support.exports import change, exported
from tests.support.photos import tiny_dataset
from vssl_dist.config import FinetuneConfig, KnnConfig, OodConfig, TaskConfig
from vssl_dist.data.store import shardfile
from vssl_dist.errors import DataError
from vssl_dist.evaluation.run import evaluate
from vssl_dist.evaluation.subject import EvalSettings, TaskImages

TIMEOUT_S = 0.4
KNN = KnnConfig(k=(5,), temperature=(0.07,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    for place, first in (("train", 0), ("val", 500), ("foreign", 1_000)):
        made = tiny_dataset(folder / "made" / place, samples=20, shard_size=10, first=first)
        made.rename(folder / place)
    return folder


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Set at the end, so that no thread stays behind."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def export(tmp_path: Path, data: Path) -> Path:
    path, _ = exported(tmp_path / "export", data)
    change(path, config={"data": {"backend": "reference", "timeout_s": TIMEOUT_S}})
    return path


@pytest.mark.parametrize("name", ["shard-000001.tar", "shard-000001.idx.npy"])
@pytest.mark.parametrize(("split", "task"), [("val", KNN), ("foreign", OodConfig())])
def test_opening_that_hangs_is_named(
    export: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    release: threading.Event,
    split: str,
    task: TaskConfig,
    name: str,
) -> None:
    stuck, real = data / split / name, Path.stat

    def stat(self: Path, **options: bool) -> os.stat_result:
        if self == stuck:
            release.wait(60)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stat)
    begun = time.monotonic()
    with pytest.raises(DataError) as error:
        evaluate(export, task, EvalSettings(ood={"others": data / "foreign"}))
    assert TIMEOUT_S <= time.monotonic() - begun < 20
    assert f"evaluation waits for data: {stuck}: " in one_line(error)
    assert f"data.timeout_s={TIMEOUT_S}" in one_line(error)
    assert not list(export.parent.glob(f"{task.task}-*"))


def stall(monkeypatch: pytest.MonkeyPatch, release: threading.Event) -> None:
    """From now on no image is read."""
    real = os.preadv

    def slow(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        release.wait(60)
        return real(file, buffers, offset)

    monkeypatch.setattr(shardfile.os, "preadv", slow)


@pytest.mark.parametrize("task", [KNN, FinetuneConfig(epochs=1, lr=(0.1,), seeds=1)])
def test_reading_that_hangs_is_named(
    export: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event, task: TaskConfig
) -> None:
    stall(monkeypatch, release)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"waits for data: .*shard-00000\d\.tar") as error:
        evaluate(export, task)
    assert TIMEOUT_S <= time.monotonic() - begun < 20
    assert f"data.timeout_s={TIMEOUT_S}" in one_line(error)


def test_a_card_without_a_timeout_means_two_minutes(data: Path) -> None:
    card = portable_card(train=str(data / "train"), val=str(data / "val"), image_size=32)
    assert TaskImages.open(card, KNN, EvalSettings()).reading.timeout_s == 120
