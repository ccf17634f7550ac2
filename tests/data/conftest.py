"""Sound shards, and a copy of them for tests that damage theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.damage import SAMPLES, SHARD
from tests.support.shards import tiny_shards
from vssl_dist.data.store import handles


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("sound") / "train", SAMPLES, SHARD)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "train"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_RETRY_PAUSES_S", (0.01, 0.01, 0.01))
