"""The loader: its state is one integer, and nothing else decides what a rank sees."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.photos import crop, tiny_dataset
from vssl_dist.config import (
    DataConfig,
    MethodConfig,
    Normalisation,
    OptimConfig,
    RunConfig,
    ViewRecipe,
)
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.loader import BackendSpec, Batch, Loader, build_loader
from vssl_dist.data.passes import evaluation_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import ConfigError, DataError

SAMPLES = 61
BACKENDS = ["dali", "reference"]
EVALUATION = BackendSpec((), 32, Normalisation())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"), samples=SAMPLES, shard_size=13)


def config(
    folder: Path, backend: str = "dali", *, batch: int = 16, accumulate: int = 1, threads: int = 1
) -> RunConfig:
    data = DataConfig(
        train=folder,
        backend=backend,
        image_size=32,
        views=(ViewRecipe(), ViewRecipe(blur=0.1, solarize=0.2)),
        streams=4,
        window=5,
        threads=threads,
    )
    optim = OptimConfig(base_lr=0.1, global_batch=batch, accumulate=accumulate)
    return RunConfig(name="test", seed=5, method=MethodConfig(name="byol"), data=data, optim=optim)


def loader(cfg: RunConfig, rank: int = 0, world_size: int = 1) -> Loader:
    return build_loader(cfg, rank=rank, world_size=world_size, device="cpu")


def take(source: Loader, count: int) -> list[Batch]:
    batches = list(islice(source, count))
    source.close()
    return batches


def joined(batches: list[Batch]) -> Batch:
    views = [torch.cat(column) for column in zip(*(b.views for b in batches), strict=True)]
    return Batch(torch.cat([b.ids for b in batches]), views, torch.cat([b.labels for b in batches]))


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.ids, b.ids)
        and torch.equal(a.labels, b.labels)
        and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_world_size_sees_the_same_ids_and_pixels(folder: Path, backend: str) -> None:
    alone = take(loader(config(folder, backend)), 6)
    for world_size in (2, 4):
        cfg = config(folder, backend, threads=world_size)
        ranks = [take(loader(cfg, rank, world_size), 6) for rank in range(world_size)]
        for step, expected in enumerate(alone):
            assert same(joined([batches[step] for batches in ranks]), expected)


def test_batches_have_the_promised_shapes(folder: Path) -> None:
    batch = take(loader(config(folder, batch=32, accumulate=2), 1, 2), 1)[0]
    assert batch.ids.shape == batch.labels.shape == (8,)
    assert batch.ids.dtype == batch.labels.dtype == torch.int64
    assert [view.shape for view in batch.views] == [(8, 3, 32, 32)] * 2
    assert all(view.dtype == torch.float32 for view in batch.views)
    assert torch.equal(batch.labels, batch.ids % 4)
    assert not torch.equal(*batch.views)


@pytest.mark.parametrize("stop", [1, 3, 4, 9])
def test_any_position_resumes_the_same_sequence(folder: Path, stop: int) -> None:
    cfg = config(folder)
    straight = take(loader(cfg, 1, 2), stop + 4)
    first = loader(cfg, 1, 2)
    for batch in islice(first, stop):
        time.sleep(0.01)  # so that it runs ahead, as it would
        assert batch.ids.shape == (8,)
    assert first.position == stop * 16
    resumed = loader(cfg, 1, 2)
    resumed.position = first.position
    assert all(same(a, b) for a, b in zip(take(resumed, 4), straight[stop:], strict=True))


def test_position_counts_what_was_yielded_and_iterating_again_goes_on(folder: Path) -> None:
    source = loader(config(folder, batch=32, accumulate=2))
    straight = take(loader(config(folder, batch=32, accumulate=2)), 5)
    assert source.position == 0
    batches = iter(source)
    for done in (1, 2):
        assert same(next(batches), straight[done - 1])
        assert source.position == done * 16
    assert same(next(iter(source)), straight[2])
    assert source.position == 48
    source.position = 16
    assert same(next(iter(source)), straight[1])
    source.close()


def test_each_id_comes_once_per_epoch(folder: Path) -> None:
    ids = joined(take(loader(config(folder)), 3 * SAMPLES // 16 + 1))
    rows = ids.ids.reshape(-1, 4, 4).transpose(1, 2).reshape(-1)  # back into order of position
    for epoch in range(3):
        epoch_ids = rows[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert sorted(epoch_ids.tolist()) == list(range(SAMPLES))


def test_a_view_is_another_one_in_another_epoch(folder: Path) -> None:
    batch = joined(take(loader(config(folder)), 8))
    first, second = (batch.ids == 7).nonzero().flatten().tolist()[:2]
    assert not torch.equal(batch.views[0][first], batch.views[0][second])


def damage(folder: Path, tmp_path: Path, bad: list[int], *, fix_crc: bool) -> Path:
    """A copy of the dataset in which some images are garbage, with or without a crc to match."""
    import hashlib
    import json
    import shutil
    import zlib

    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    dataset = Dataset.open(folder)
    manifest = json.loads((copy / "manifest.json").read_text())
    for sample in bad:
        shard, row = (int(array[0]) for array in dataset.locate(np.array([sample])))
        entry = manifest["shards"][shard]
        index_path = copy / entry["name"].replace(".tar", ".idx.npy")
        index = np.load(index_path)
        size = int(index["size"][row])
        with (copy / entry["name"]).open("r+b") as tar:
            tar.seek(int(index["offset"][row]))
            tar.write(b"x" * size)
        if fix_crc:
            index["crc32"][row] = zlib.crc32(b"x" * size)
            np.save(index_path, index)
            entry["index_sha256"] = hashlib.sha256(index_path.read_bytes()).hexdigest()
    if fix_crc:
        from vssl_dist.data.store.manifest import seal

        (copy / "manifest.json").write_bytes(seal(manifest))
    return copy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fix_crc", [False, True], ids=["damaged", "undecodable"])
def test_a_bad_sample_has_the_same_substitute_on_every_world_size(
    folder: Path, tmp_path: Path, backend: str, fix_crc: bool
) -> None:
    # 12 ends the first shard and 0 begins it; 30 and 31 follow each other.
    bad = damage(folder, tmp_path, [12, 30, 31], fix_crc=fix_crc)
    clean = joined(take(loader(config(folder, backend)), 4))
    alone = loader(config(bad, backend))
    actual = joined(take(alone, 4))
    expected = {12: 0, 30: 32, 31: 32}
    assert {s.planned: s.used for s in alone.substitutions} == expected
    assert torch.equal(actual.ids, clean.ids)

    pairs = [loader(config(bad, backend), rank, 2) for rank in range(2)]
    ranks = [take(source, 4) for source in pairs]
    steps = [joined([ranks[0][step], ranks[1][step]]) for step in range(4)]
    assert same(joined(steps), actual)
    substitutions = [s for source in pairs for s in source.substitutions]
    assert {s.planned: s.used for s in substitutions} == expected
    assert all(("does not decode" in s.reason) == fix_crc for s in substitutions)

    for row, sample in enumerate(actual.ids.tolist()):
        untouched = all(
            torch.equal(g[row], c[row]) for g, c in zip(actual.views, clean.views, strict=True)
        )
        assert untouched == (sample not in expected)
        assert actual.labels[row] == expected.get(sample, sample) % 4


def test_four_shards_without_a_usable_image_are_one_line(folder: Path, tmp_path: Path) -> None:
    bad = damage(folder, tmp_path, list(range(4 * 13)), fix_crc=True)
    for backend in BACKENDS:
        with pytest.raises(DataError, match="not one usable image near it") as caught:
            take(loader(config(bad, backend)), 8)
        assert "\n" not in str(caught.value)


def test_what_cannot_be_used_is_refused_before_the_first_batch(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no such folder"):
        loader(config(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"streams=4 is not a multiple of the 3 ranks"):
        loader(config(folder), 0, 3)
    source = loader(config(folder))
    source.position = 5
    with pytest.raises(ValueError, match="position 5"):
        next(iter(source))


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
def test_a_resume_on_other_threads_and_ranks_sees_the_same_pixels(folder: Path, stop: int) -> None:
    straight = take(loader(config(folder, "reference")), stop + 3)[stop:]
    for threads, world_size in ((1, 1), (3, 2), (2, 4)):
        ranks = []
        for rank in range(world_size):
            source = loader(config(folder, "reference", threads=threads), rank, world_size)
            source.position = stop * 16
            ranks.append(take(source, 3))
        for step, expected in enumerate(straight):
            assert same(joined([batches[step] for batches in ranks]), expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_sequence_does_not_depend_on_how_many_batches_are_made_at_once(
    folder: Path, device: str
) -> None:
    cfg = config(folder)
    data = cfg.data
    spec = BackendSpec(data.views, data.image_size, data.normalise, data.threads, device)
    expected = take(build_loader(cfg, rank=0, world_size=1, device=device), 9)
    for number in (1, 3):
        backends = [build_backend("dali", spec) for _ in range(number)]
        source = Loader(cfg, Dataset.open(folder), backends, rank=0, world_size=1)
        assert all(same(a, b) for a, b in zip(take(source, 9), expected, strict=True))


def test_a_loader_has_one_integer_of_state(folder: Path) -> None:
    used, fresh = loader(config(folder)), loader(config(folder))
    take(used, 7)
    fresh.position = used.position
    assert type(fresh.position) is int
    assert all(same(a, b) for a, b in zip(take(used, 3), take(fresh, 3), strict=True))


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def prefetching() -> int:
    return sum(thread.name == "prefetch" for thread in threading.enumerate())


def test_closing_a_loader_leaves_no_thread_and_no_open_file(folder: Path) -> None:
    take(loader(config(folder, "reference")), 2)  # what is loaded once stays loaded
    gc.collect()  # what earlier tests left goes now
    threads, files = prefetching(), open_files()
    for _ in range(20):
        source = loader(config(folder, "reference"))
        batches = iter(source)
        next(batches)
        assert open_files() > files
        source.close()
        assert (prefetching(), open_files()) == (threads, files)
    source = loader(config(folder, "reference"))
    next(iter(source))
    del source
    gc.collect()
    assert (prefetching(), open_files()) == (threads, files)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_is_flat_over_many_batches(folder: Path, backend: str) -> None:
    # In a process of its own: what other tests left would hide a leak.
    program = f"""
import psutil
from tests.data.test_loader import *
cfg = config(Path({str(folder)!r}), {backend!r}, batch=4)
batches, process = iter(loader(cfg)), psutil.Process()
taken = []
for count in (100, 100, 100):
    for _ in islice(batches, count):
        pass
    taken.append(process.memory_info().rss)
print(taken[-1] - taken[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    # 200 batches of 4 x 2 views are 20 MB of pixels.
    assert int(done.stdout) < 5e6, done.stdout


def test_leaving_a_loader_alone_leaves_no_thread(folder: Path) -> None:
    before = prefetching()
    batches = iter(loader(config(folder)))
    next(batches)
    assert prefetching() > before
    del batches
    gc.collect()
    assert prefetching() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_process_ends_in_the_middle_of_an_iteration(folder: Path, backend: str) -> None:
    program = f"""
from tests.data.test_loader import *
batches = iter(loader(config(Path({str(folder)!r}), {backend!r})))
next(batches)
print("one batch", flush=True)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "one batch\n", "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation_sees_each_sample_once_in_order(folder: Path, backend: str) -> None:
    batches = list(evaluation_batches(Dataset.open(folder), EVALUATION, backend=backend, batch=16))
    assert [len(b.ids) for b in batches] == [16, 16, 16, 13]
    whole = joined(batches)
    assert whole.ids.tolist() == list(range(SAMPLES))
    assert torch.equal(whole.labels, whole.ids % 4)
    pixels = np.stack([crop(number, 4) for number in range(SAMPLES)]) / 255
    expected = (pixels - Normalisation().mean) / Normalisation().std
    np.testing.assert_allclose(whole.views[0].numpy(), expected.transpose(0, 3, 1, 2), atol=1e-4)


def test_evaluation_of_the_first_few_and_of_a_damaged_one(folder: Path, tmp_path: Path) -> None:
    bad = damage(folder, tmp_path, [3], fix_crc=True)
    source = evaluation_batches(
        Dataset.open(bad), EVALUATION, backend="dali", batch=8, ids=np.arange(12)
    )
    batches = list(source)
    substitutions = [[(bad.planned, bad.used) for bad in batch.substitutions] for batch in batches]
    assert substitutions == [[(3, 4)], []]
    assert batches[0].substitutions[0].reason.startswith("does not decode")
    whole = joined(batches)
    assert whole.ids.tolist() == list(range(12))
    assert torch.equal(whole.views[0][3], whole.views[0][4])
    assert whole.labels[3] == 0
