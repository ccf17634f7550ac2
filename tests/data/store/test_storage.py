"""Storage that fails, stalls or answers slowly: nothing waits for ever."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.damage import (
    SAMPLES,
    alone,
    config,
    joined,
    loader,
    one_line,
    place,
    stalled,
    take,
)
from vssl_dist.data.loader import BackendSpec
from vssl_dist.data.passes import evaluation_batches
from vssl_dist.data.store import handles, shardfile
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.preview.sheet import write_augmentation_sheet


def test_short_reads_and_interrupted_ones_give_whole_images(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Dataset.open(sound).read(np.arange(SAMPLES))
    real, random = os.preadv, np.random.default_rng(0)

    def grudging(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        return real(file, [buffers[0][: int(random.integers(1, 200))]], offset)

    monkeypatch.setattr(shardfile.os, "preadv", grudging)
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        samples = Dataset.open(sound).read_checked(np.arange(SAMPLES))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert samples.substitutions == []
    assert [a.tobytes() for a in samples.data] == [b.tobytes() for b in expected]


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_read_that_fails_is_repeated_and_then_replaced(
    sound: Path, monkeypatch: pytest.MonkeyPatch, at_once: None, failures: int
) -> None:
    dataset = Dataset.open(sound)
    bad = int(dataset.rows(np.array([17]))[0]["offset"])
    real, calls = os.preadv, []

    def failing(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == bad and len(calls) < failures:
            calls.append(offset)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(file, buffers, offset)

    monkeypatch.setattr(shardfile.os, "preadv", failing)
    samples = dataset.read_checked(np.array([17]))
    assert len(calls) == failures
    used = [(s.planned, s.used) for s in samples.substitutions]
    assert used == ([(17, 18)] if failures == 4 else [])


def let_go(folder: Path) -> None:
    """End the threads that wait for somebody to write into a pipe of ``folder``."""
    writers = []
    for path in folder.glob("*.tar"):
        if path.is_fifo():
            with contextlib.suppress(OSError):  # nobody waits for this one
                writers.append(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            path.unlink()
    for writer in writers:
        os.close(writer)


def test_storage_that_stalls_is_named_with_the_rank_within_the_timeout(folder: Path) -> None:
    source = loader(config(folder, timeout_s=0.5), rank=1, world_size=2)
    batches = iter(source)
    for path in folder.glob("*.tar"):
        path.unlink()
        os.mkfifo(path)
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"^rank 1 waits for data: .*shard-00000\d\.tar") as error:
        list(islice(batches, 20))
    assert 0.5 <= time.monotonic() - begun < 20
    assert "data.timeout_s=0.5" in one_line(error)
    source.close()
    let_go(folder)


def test_a_read_that_hangs_is_named_too_and_a_slow_one_is_waited_for(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(sound, timeout_s=1.0)
    expected = joined(take(loader(cfg), 2))
    source, release, real = loader(cfg), threading.Event(), os.preadv
    delay = [0.05]

    def slow(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        release.wait(delay[0])
        return real(file, buffers, offset)

    monkeypatch.setattr(shardfile.os, "preadv", slow)
    batches = iter(source)
    begun = time.monotonic()
    actual = joined(list(islice(batches, 2)))
    assert time.monotonic() - begun > 1.0  # longer than any one answer may take
    assert torch.equal(actual[2], expected[2])
    delay[0] = 60.0
    with pytest.raises(DataError, match=r"rank 0 waits for data: .*storage has not answered"):
        list(islice(batches, 20))
    release.set()


def test_storage_that_stalls_before_the_first_batch_is_named(sound: Path) -> None:
    stalls = pytest.raises(DataError, match=r"rank 0 waits for data: .*shard-000003\.tar")
    with stalls, stalled("shard-000003.tar"):
        loader(config(sound, timeout_s=0.4))


def test_a_sheet_names_storage_that_stalls_and_who_waits(sound: Path, tmp_path: Path) -> None:
    cfg = config(sound, timeout_s=0.4)
    for operation, name in (
        ("read", ".tar"),
        ("stat", "shard-000000.tar"),
        ("stat", "manifest.json"),
    ):
        stalls = pytest.raises(DataError, match=rf"^artist waits for data: .*{name}")
        with stalls as error, stalled(name, operation):
            write_augmentation_sheet(cfg, tmp_path / "sheet.png", who="artist")
        one_line(error)
    assert list(tmp_path.iterdir()) == []


def failing_reads(
    monkeypatch: pytest.MonkeyPatch, bad: Callable[[str, int], bool]
) -> tuple[list[int], list[float]]:
    """Reads fail where ``bad`` says so of file and offset; where they did, and pauses made."""
    failed: list[int] = []
    pauses: list[float] = []
    real = os.preadv

    def failing(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        if bad(Path(f"/proc/self/fd/{file}").readlink().name, offset):
            failed.append(offset)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    monkeypatch.setattr(shardfile.os, "preadv", failing)
    monkeypatch.setattr(handles.time, "sleep", pauses.append)
    return failed, pauses


@pytest.mark.parametrize("row", [0, 6, 12])
def test_one_image_that_cannot_be_read_is_no_reason_to_refuse_a_start(
    sound: Path, monkeypatch: pytest.MonkeyPatch, row: int
) -> None:
    offset = place(sound, 13 + row)[1]
    bad = ("shard-000001.tar", offset)
    _, pauses = failing_reads(monkeypatch, lambda *read: read == bad)
    Dataset.open(sound).probe()
    assert pauses == []


def test_shards_whose_images_cannot_be_read_are_asked_again_together_and_then_refused(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"shard-000001.tar", "shard-000003.tar"}
    failed, pauses = failing_reads(monkeypatch, lambda name, _: name in names)
    with pytest.raises(DataError, match=r"shard-000001\.tar \(cannot be read: Input/") as error:
        Dataset.open(sound).probe()
    assert "shard-000003.tar (cannot be read" in one_line(error)
    assert pauses == [0.5, 1.0, 2.0]
    assert len(failed) == 2 * 3 * 4  # shards, images, tries


def test_a_shard_that_failed_all_tries_is_asked_once_until_it_answers(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [True]
    _, pauses = failing_reads(monkeypatch, lambda name, _: broken[0] and name == "shard-000001.tar")
    dataset = Dataset.open(sound)
    samples = dataset.read_checked(np.arange(13, 26))
    assert pauses == [0.5, 1.0, 2.0]
    assert [(s.planned, s.used) for s in samples.substitutions] == [(i, 26) for i in range(13, 26)]
    broken[0] = False
    opened, real = [], shardfile._open_regular_file
    monkeypatch.setattr(
        shardfile, "_open_regular_file", lambda path: opened.append(path) or real(path)
    )
    assert dataset.read_checked(np.arange(13, 26)).substitutions == []
    assert len(opened) == 2  # tar and index: a handle of before a failure may stay stale
    broken[0] = True
    dataset.read_checked(np.array([13, 14]))
    assert pauses == 2 * [0.5, 1.0, 2.0]


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_files_of_which_nothing_can_be_learned_are_listed_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = Path.stat

    def failing(self: Path, **options: bool) -> os.stat_result:
        if self.name in ("shard-000001.tar", "shard-000003.idx.npy"):
            raise OSError(code, os.strerror(code), str(self))
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", failing)
    (folder / "shard-000000.tar").unlink()
    (folder / "shard-000002.tar").unlink()
    (folder / "shard-000002.tar").symlink_to(folder / "nowhere")
    with pytest.raises(DataError) as error:
        Dataset.open(folder)
    why = os.strerror(code)
    for message in (
        "shard-000000.tar is missing,",
        f"shard-000001.tar cannot be read ({why}),",
        "shard-000002.tar links to what is missing,",
        f"shard-000003.idx.npy cannot be read ({why})",
    ):
        assert message in one_line(error)


def test_an_evaluation_names_storage_that_stalls(folder: Path) -> None:
    dataset = Dataset.open(folder)
    (folder / "shard-000000.tar").unlink()
    os.mkfifo(folder / "shard-000000.tar")
    spec = BackendSpec((), 32, config(folder).data.normalise)
    batches = evaluation_batches(dataset, spec, backend="reference", batch=8, timeout_s=0.3)
    with pytest.raises(DataError, match=r"evaluation waits for data: .*shard-000000\.tar"):
        next(batches)
    let_go(folder)


def test_a_process_whose_storage_stalls_ends_and_leaves_one_line(folder: Path) -> None:
    program = f"""
import sys
from tests.data.store.test_storage import *
source = loader(config(Path({str(folder)!r}), timeout_s=0.5))
for path in Path({str(folder)!r}).glob("*.tar"):
    path.unlink()
    os.mkfifo(path)
try:
    take(source, 20)
except DataError as error:
    sys.exit(f"error: {{error}}")
"""
    done = alone(program)
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank 0 waits for data: ")
    assert done.stderr.count("\n") == 1
