"""The ranks of a job open the training set as one, and keep open what they read in turn."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ranks import run_ranks
from tests.support.shards import crops, write_shards
from vssl_dist import dist
from vssl_dist.config import DataConfig, MethodConfig, OptimConfig, RunConfig, ViewRecipe
from vssl_dist.data.loader import build_loader
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import seal
from vssl_dist.errors import DataError

WORLD = 2
SHARD_SIZE = 4


def linked_shards(folder: Path, count: int) -> Path:
    """A dataset of ``count`` shards that are one shard under many names."""
    write_shards(folder, [crops(SHARD_SIZE)])
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (entry,) = manifest["shards"]
    manifest["shards"] = [entry | {"name": f"shard-{n:06d}.tar"} for n in range(count)]
    manifest["samples"] = count * SHARD_SIZE
    for number in range(1, count):
        for suffix in ("tar", "idx.npy"):
            os.link(folder / f"shard-000000.{suffix}", folder / f"shard-{number:06d}.{suffix}")
    (folder / "manifest.json").write_bytes(seal(manifest))
    return folder


def config(folder: Path, *, method: str = "byol", streams: int = 4, window: int = 8) -> RunConfig:
    data = DataConfig(
        train=folder,
        backend="reference",
        image_size=32,
        views=(ViewRecipe(), ViewRecipe()),
        streams=streams,
        window=window,
    )
    optim = OptimConfig(base_lr=0.1, global_batch=streams)
    return RunConfig(name="x", seed=1, method=MethodConfig(name=method), data=data, optim=optim)


class Looks:
    """Counts how often files of a folder are opened, and asked about by name, while it is entered.

    Audit hooks stay for the life of a process: for processes that end soon.
    """

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._prefix = f"{folder}/"
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Looks:
        sys.addaudithook(self._hear)
        for name in ("stat", "lstat", "access"):
            self._patch.setattr(os, name, self._counted(getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()
        self._prefix = "\0"

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).startswith(self._prefix):
            self.counts["opens"] += 1

    def _counted(self, function: Any) -> Any:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            self.counts["asks"] += str(path).startswith(self._prefix)
            return function(path, *args, **kwargs)

        return call


def _looks_of_this_rank(folder: Path) -> dict[str, int]:
    with Looks(folder) as looks:
        loader = build_loader(config(folder), rank=dist.rank(), world_size=WORLD, device="cpu")
    assert loader.samples == Dataset.open(folder).samples
    return dict(looks.counts)


@pytest.mark.parametrize("shards", [10, 1_281, pytest.param(20_000, marks=pytest.mark.slow)])
def test_of_a_job_one_rank_looks_at_all_files_and_each_at_its_share(
    shards: int, tmp_path: Path
) -> None:
    folder = linked_shards(tmp_path / "train", shards)
    first, second = run_ranks(_looks_of_this_rank, WORLD, folder)
    per_file = 2 * shards  # a tar and an index each
    assert first["asks"] <= 2 * per_file + 1, "size and permission, and the manifest"
    assert second.get("asks", 0) == 0
    assert first["opens"] <= per_file / WORLD + 3
    assert second["opens"] <= per_file / WORLD + 2
    assert first["opens"] + second["opens"] >= per_file, "each shard was looked into"


def _refusal_of_this_rank(folder: Path) -> str:
    try:
        build_loader(config(folder), rank=dist.rank(), world_size=WORLD, device="cpu")
    except DataError as error:
        return str(error)
    return "opened"


def test_what_the_first_rank_refuses_all_refuse_in_the_same_words(tmp_path: Path) -> None:
    folder = linked_shards(tmp_path / "train", 3)
    (folder / "shard-000001.tar").unlink()
    refusals = run_ranks(_refusal_of_this_rank, WORLD, folder)
    assert len(set(refusals)) == 1
    assert "shard-000001.tar is missing" in refusals[0]


def test_shards_that_are_read_in_turn_stay_open(tmp_path: Path) -> None:
    folder = linked_shards(tmp_path / "train", 600)
    cfg = config(folder, streams=128, window=12)  # windows of 3 shards: more than 256 in turn
    loader = build_loader(cfg, rank=0, world_size=1, device="cpu")
    with Looks(folder) as looks:
        batches = list(islice(loader, 24))
    loader.close()
    images = sum(len(batch.ids) for batch in batches)
    shards = len(np.unique(np.concatenate([batch.ids for batch in batches]) // SHARD_SIZE))
    assert shards > 256
    # What was made ahead counts as well: two batches in the making, two that lie ready.
    assert looks.counts["opens"] <= 2 * (shards + 4 * 128), f"{images} images"


def test_a_limit_of_open_files_that_is_too_low_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 64))
    folder = linked_shards(tmp_path / "train", 40)
    build_loader(config(folder, streams=8, window=12), rank=0, world_size=1, device="cpu")
    (message,) = caplog.messages
    assert message == (
        "rank 0 reads from 40 shards in turn and may keep 16 open: reading will be slow; "
        "raise the limit of open files (ulimit -Hn) to 160 or lower data.streams"
    )
