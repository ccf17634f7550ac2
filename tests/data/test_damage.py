"""Damaged data: no image stops a run, no damage passes silently, and nothing waits for ever."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.photos import crop
from tests.support.ranks import run_ranks
from tests.support.shards import Stored, encoded, rewritten, stored, tiny_shards, write_shards
from vssl_dist import dist
from vssl_dist.config import (
    ConfigError,
    DataConfig,
    OptimConfig,
    RunConfig,
    ViewRecipe,
    frozen_part,
)
from vssl_dist.data import handles, shardfile
from vssl_dist.data.ledger import Ledger, bad_images_allowed
from vssl_dist.data.loader import BackendSpec, Batch, Loader, build_loader, evaluation_batches
from vssl_dist.data.shards import DataError, Dataset, Substitution
from vssl_dist.methods import CONFIGS
from vssl_dist.resume import same_experiment

SAMPLES, SHARD = 61, 13
BACKENDS = ["dali", "reference"]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_shards(tmp_path_factory.mktemp("sound") / "train", SAMPLES, SHARD)


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "train"))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_PAUSES_S", (0.01, 0.01, 0.01))


def config(folder: Path, backend: str = "dali", *, timeout_s: float = 120.0) -> RunConfig:
    data = DataConfig(
        train=folder,
        backend=backend,
        image_size=32,
        views=(ViewRecipe(), ViewRecipe(blur=0.5)),
        streams=4,
        window=5,
        threads=1,
        timeout_s=timeout_s,
    )
    optim = OptimConfig(base_lr=0.1, global_batch=16)
    method = CONFIGS["byol"](name="byol")
    return RunConfig(name="run", out=folder.parent, method=method, data=data, optim=optim)


def loader(cfg: RunConfig, rank: int = 0, world_size: int = 1) -> Loader:
    return build_loader(cfg, rank=rank, world_size=world_size, device="cpu")


def take(source: Loader, count: int) -> list[Batch]:
    with contextlib.closing(source):
        return list(islice(source, count))


def joined(batches: Sequence[Batch]) -> tuple[list[int], list[int], torch.Tensor]:
    """Ids, labels and the pixels of all views."""
    pixels = torch.cat([torch.stack(b.views, 1) for b in batches])
    ids = [int(i) for b in batches for i in b.ids]
    return ids, [int(i) for b in batches for i in b.labels], pixels


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def place(folder: Path, sample: int) -> tuple[Path, int, int]:
    """Tar, offset and size of a sample's image."""
    dataset = Dataset.open(folder)
    number, _ = dataset.locate(np.array([sample]))
    row = dataset.rows(np.array([sample]))[0]
    name = dataset.manifest.shards[int(number[0])].name
    return folder / name, int(row["offset"]), int(row["size"])


def one_line(error: pytest.ExceptionInfo[DataError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# Bad images


def photograph(height: int, width: int) -> Image.Image:
    return Image.fromarray(crop(1, 4, (64, 64))).resize((width, height))


def jpeg(image: Image.Image) -> bytes:
    return encoded(image, "JPEG")


WHOLE = photograph(32, 32)
DEEP = Image.fromarray(np.asarray(WHOLE.convert("L")).astype(np.uint16) * 257)
NO_IMAGES = {
    "half a jpeg": jpeg(WHOLE)[: len(jpeg(WHOLE)) // 2],
    "jpeg without its end": jpeg(WHOLE)[:-2],
    "header of a jpeg": jpeg(WHOLE)[:30],
    "half a png": encoded(WHOLE, "PNG")[:500],
    "empty": b"",
    "web page": b"<html><body>404 Not Found</body></html>",
    "noise": np.random.default_rng(0).bytes(700),
    "noise that begins like a jpeg": b"\xff\xd8\xff\xe0" + np.random.default_rng(1).bytes(700),
    "16-bit png": encoded(DEEP, "PNG"),
    "webp": encoded(WHOLE, "WEBP"),
    "bomb": encoded(WHOLE, "PNG")[:16] + b"\x00\x00\xea\x60" * 2 + encoded(WHOLE, "PNG")[24:],
    "one pixel for 32 x 32": jpeg(photograph(1, 1)),
    "a line for 32 x 32": jpeg(photograph(1, 5000)),
    "larger than the index says": jpeg(photograph(64, 64)),
    "turned": jpeg(photograph(33, 31)),
}
ODD_IMAGES = {
    "cmyk": Stored(jpeg(WHOLE.convert("CMYK")), "jpg", 32, 32, 1),
    "grey": Stored(jpeg(WHOLE.convert("L")), "jpg", 32, 32, 1),
    "palette png": Stored(encoded(WHOLE.convert("P"), "PNG"), "png", 32, 32, 1),
    "png with alpha": Stored(encoded(WHOLE.convert("RGBA"), "PNG"), "png", 32, 32, 1),
    "png named jpg": Stored(encoded(WHOLE, "PNG"), "jpg", 32, 32, 1),
    "one pixel": Stored(jpeg(photograph(1, 1)), "jpg", 1, 1, 1),
    "1 x 5000": Stored(jpeg(photograph(1, 5000)), "jpg", 1, 5000, 1),
    "5000 x 1": Stored(jpeg(photograph(5000, 1)), "jpg", 5000, 1, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_lies_there_instead_of_an_image_is_replaced_and_no_batch_is_lost(
    sound: Path, tmp_path: Path, backend: str
) -> None:
    # Every second one, so that each has a sound neighbour.
    wrong = dict(zip(range(1, 60, 2), NO_IMAGES.values(), strict=False))
    bad = rewritten(sound, tmp_path / "bad", wrong)
    want, got = loader(config(sound, backend)), loader(config(bad, backend))
    ids, _, pixels = joined(take(want, 4))
    bad_ids, bad_labels, bad_pixels = joined(take(got, 4))
    assert bad_ids == ids
    assert {s.planned for s in got.substitutions} == set(wrong) & set(ids)
    assert all(s.reason.startswith("does not decode: ") for s in got.substitutions)
    used = {s.planned: s.used for s in got.substitutions}
    for row, sample in enumerate(ids):
        assert bad_labels[row] == used.get(sample, sample) % 4
        assert torch.equal(bad_pixels[row], pixels[row]) == (sample not in wrong)
        if sample in wrong:
            first = sample - sample % SHARD
            ring = [first + (sample + step) % SHARD for step in range(1, SHARD)]
            assert used[sample] == next(other for other in ring if other not in wrong)


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_images_that_somehow_came_this_far_cost_nobody_a_batch(
    sound: Path, tmp_path: Path, backend: str
) -> None:
    odd = dict(enumerate(ODD_IMAGES.values()))
    bad = rewritten(sound, tmp_path / "odd", odd)
    ids, _, pixels = joined(take(loader(config(sound, backend)), 4))
    got = loader(config(bad, backend))
    odd_ids, _, odd_pixels = joined(take(got, 4))
    assert odd_ids == ids
    assert bool(odd_pixels.isfinite().all())
    assert got.substitutions == []  # they decode, so they are shown
    for row, sample in enumerate(ids):
        assert torch.equal(odd_pixels[row], pixels[row]) == (sample not in odd)


def test_a_substitute_is_the_same_on_every_topology_and_after_a_resume(
    sound: Path, tmp_path: Path
) -> None:
    names = ["half a jpeg", "web page", "a line for 32 x 32"]
    bad = rewritten(sound, tmp_path / "bad", {i: NO_IMAGES[n] for i, n in enumerate(names, 20)})
    tar, offset, size = place(bad, 23)
    flip(tar, offset + size // 2)  # the next three of 20 are no substitutes either
    alone = loader(config(bad, "reference"))
    batches = take(alone, 8)
    want = sorted((s.position, s.planned, s.used) for s in alone.substitutions)
    assert {(planned, used) for _, planned, used in want} == {(i, 24) for i in (20, 21, 22, 23)}
    for world_size in (2, 4):
        ranks = [loader(config(bad, "reference"), rank, world_size) for rank in range(world_size)]
        parts = [take(source, 8) for source in ranks]
        for step, whole in enumerate(batches):
            assert torch.equal(joined([part[step] for part in parts])[2], joined([whole])[2]), (
                f"step {step} on {world_size} ranks"
            )
        found = [s for source in ranks for s in source.substitutions]
        assert sorted((s.position, s.planned, s.used) for s in found) == want
    for start in (1, 3, 5):
        resumed = loader(config(bad, "reference"))
        resumed.position = start * 16
        assert torch.equal(joined(take(resumed, 8 - start))[2], joined(batches[start:])[2])
        later = [(s.position, s.planned, s.used) for s in resumed.substitutions]
        assert sorted(later) == [entry for entry in want if entry[0] > start * 16]


def test_what_an_index_claims_is_bounded_before_memory_is_given_to_it(
    sound: Path, tmp_path: Path
) -> None:
    image = stored(sound)[0][0].data
    claims = {5: (60_000, 60_000), 7: (0, 32), 9: (2**32 - 1, 2**32 - 1)}
    bad = rewritten(
        sound, tmp_path / "bad", {i: Stored(image, "png", *size, 0) for i, size in claims.items()}
    )
    samples = Dataset.open(bad).read_checked(np.array([5, 6, 7, 9]))
    assert [(s.planned, s.used) for s in samples.substitutions] == [(5, 6), (7, 8), (9, 10)]
    assert "claims 60000 x 60000 pixels" in samples.substitutions[0].reason


# Damaged shards


def cuts(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The second shard, hurt in the ways of which readers of plain tars miss the most."""
    path = folder / "shard-000001.tar"
    blob = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    third, label = members[4], members[5]
    return {
        "inside a member": (blob[: third.offset_data + 100], third.offset_data + 100),
        "on a block": (blob[: third.offset], third.offset),
        "between image and label": (blob[: label.offset], label.offset),
        "empty": (b"", 0),
        "header": (blob[: third.offset] + b"\xff" * 512 + blob[third.offset + 512 :], len(blob)),
        "flipped byte": (
            blob[: third.offset_data + 50]
            + bytes([blob[third.offset_data + 50] ^ 1])
            + blob[third.offset_data + 51 :],
            len(blob),
        ),
    }


HURTS = [
    "inside a member",
    "on a block",
    "between image and label",
    "empty",
    "header",
    "flipped byte",
]


@pytest.mark.parametrize("how", HURTS)
def test_a_hurt_shard_is_refused_at_the_start_or_caught_while_reading(
    folder: Path, how: str, at_once: None
) -> None:
    running = Dataset.open(folder)
    want = [image.tobytes() for image in running.read(np.arange(13, 26))]
    blob, length = cuts(folder)[how]
    whole = (folder / "shard-000001.tar").stat().st_size
    (folder / "shard-000001.tar").write_bytes(blob)
    if length < whole:
        with pytest.raises(DataError, match=f"shard-000001.tar has {length} bytes") as error:
            Dataset.open(folder)
        one_line(error)
    running.close()
    if how == "empty":
        with pytest.raises(DataError, match=r"shard-000001\.tar: not one intact sample"):
            running.read_checked(np.arange(13, 26))
        return
    samples = running.read_checked(np.arange(13, 26))
    lost = {s.planned for s in samples.substitutions}
    for row, image in enumerate(samples.data):
        assert (image.tobytes() == want[row]) == (13 + row not in lost)
    assert (15 in lost) == (how in ("inside a member", "on a block", "flipped byte"))
    assert bool(lost) == (how != "header")  # no header is ever read


@pytest.mark.parametrize("how", ["missing", "dangling", "fifo", "folder", "zeros"])
def test_shards_that_are_not_there_are_refused_at_the_start_with_the_list(
    folder: Path, how: str
) -> None:
    names = ["shard-000001.tar", "shard-000003.tar"]
    for name in names:
        path = folder / name
        size = path.stat().st_size
        path.unlink()
        if how == "dangling":
            path.symlink_to(folder / "nowhere.tar")
        elif how == "fifo":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "zeros":
            path.write_bytes(bytes(size))
    with pytest.raises(DataError) as error:
        loader(config(folder))
    assert all(name in one_line(error) for name in names)
    assert "data_prep/verify.py" in str(error.value)


def test_swapped_shards_of_one_length_are_refused_at_the_start_with_the_list(
    sound: Path, tmp_path: Path
) -> None:
    first, *rest = stored(sound)
    folder = write_shards(tmp_path / "train", [first, *rest, first[::-1]])
    one, other = folder / "shard-000000.tar", folder / f"shard-{len(rest) + 1:06d}.tar"
    assert one.stat().st_size == other.stat().st_size
    one.rename(tmp_path / "held")
    other.rename(one)
    (tmp_path / "held").rename(other)
    Dataset.open(folder)  # to stat alone nothing is wrong
    with pytest.raises(DataError, match="damaged or swapped") as error:
        loader(config(folder))
    assert all(path.name in one_line(error) for path in (one, other))
    # Of two ranks each looks at every other shard, so one of them must find one.
    with pytest.raises(DataError, match="damaged or swapped"):
        [loader(config(folder), rank, 2) for rank in range(2)]


def test_unreadable_shards_are_refused_at_the_start_with_the_list(folder: Path) -> None:
    names = ["shard-000000.tar", "shard-000002.idx.npy"]
    program = f"""
import os, tempfile, shutil
from pathlib import Path
from vssl_dist.data.shards import DataError, Dataset
with tempfile.TemporaryDirectory() as name:
    copy = Path(shutil.copytree({str(folder)!r}, Path(name) / "train"))
    for hidden in {names!r}:
        (copy / hidden).chmod(0)
    for path in (Path(name), copy):
        path.chmod(0o755)
    if child := os.fork():
        os.waitpid(child, 0)
    else:
        if os.geteuid() == 0:  # who may read everything
            os.setgid(65534)
            os.setuid(65534)
        try:
            Dataset.open(copy)
        except DataError as error:
            print(error, flush=True)
        os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert all(f"{name} may not be read" in done.stdout for name in names)
    assert done.stdout.count("\n") == 1


def test_a_long_list_of_missing_shards_stays_one_line(tmp_path: Path) -> None:
    folder = tiny_shards(tmp_path / "train", 40, 1)
    for number in range(10, 40):
        (folder / f"shard-{number:06d}.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000010\.tar is missing.* and 18 more") as error:
        Dataset.open(folder)
    assert len(one_line(error)) < 1500


def test_a_start_with_one_bad_first_image_is_not_refused(folder: Path) -> None:
    tar, offset, _ = place(folder, 13)
    flip(tar, offset + 9)
    source = loader(config(folder))
    take(source, 4)
    assert [(s.planned, s.used) for s in source.substitutions] == [(13, 14)]


def test_a_shard_that_vanishes_under_a_run_is_asked_for_again_and_then_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_PAUSES_S", (0.1, 0.2, 0.2))
    source = loader(config(folder))
    (folder / "shard-000002.tar").rename(folder / "away")
    begun = time.monotonic()
    with pytest.raises(DataError, match=r"shard-000002\.tar: cannot be opened") as error:
        take(source, 4)
    one_line(error)
    assert time.monotonic() - begun >= 0.5


def test_a_shard_that_comes_back_in_time_costs_nothing(
    folder: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handles, "_PAUSES_S", (0.3, 0.3, 5.0))
    source = loader(config(folder))
    shutil.move(folder / "shard-000002.tar", folder / "away")
    back = threading.Timer(0.4, shutil.move, (folder / "away", folder / "shard-000002.tar"))
    back.start()
    got = joined(take(source, 4))
    back.join()
    want = joined(take(loader(config(sound)), 4))
    assert got[0] == want[0]
    assert torch.equal(got[2], want[2])
    assert source.substitutions == []


def test_another_file_in_place_of_an_open_shard_is_not_mixed_in(
    folder: Path, tmp_path: Path, at_once: None
) -> None:
    other = tmp_path / "other"
    dataset = Dataset.open(folder)
    want = dataset.read(np.arange(13, 26))
    other.write_bytes(bytes(reversed((folder / "shard-000001.tar").read_bytes())))
    other.rename(folder / "shard-000001.tar")
    still = dataset.read_checked(np.arange(13, 26))  # the old file is open
    assert [a.tobytes() for a in still.data] == [b.tobytes() for b in want]
    dataset.close()
    with pytest.raises(DataError, match=r"shard-000001\.tar: not one intact sample") as error:
        dataset.read_checked(np.arange(13, 26))
    assert "crc32 differs" in one_line(error)


# Storage


def test_short_reads_and_interrupted_ones_give_whole_images(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = Dataset.open(sound).read(np.arange(SAMPLES))
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
    assert [a.tobytes() for a in samples.data] == [b.tobytes() for b in want]


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
    want = joined(take(loader(cfg), 2))
    source, release, real = loader(cfg), threading.Event(), os.preadv
    delay = [0.05]

    def slow(file: int, buffers: Sequence[memoryview], offset: int) -> int:
        release.wait(delay[0])
        return real(file, buffers, offset)

    monkeypatch.setattr(shardfile.os, "preadv", slow)
    batches = iter(source)
    begun = time.monotonic()
    got = joined(list(islice(batches, 2)))
    assert time.monotonic() - begun > 1.0  # longer than any one answer may take
    assert torch.equal(got[2], want[2])
    delay[0] = 60.0
    with pytest.raises(DataError, match=r"rank 0 waits for data: .*storage has not answered"):
        list(islice(batches, 20))
    release.set()


def test_storage_that_stalls_before_the_first_batch_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, real = threading.Event(), Path.stat

    def stuck(self: Path, **options: bool) -> os.stat_result:
        if self.name == "shard-000003.tar":
            release.wait(60)
        return real(self, **options)

    monkeypatch.setattr(Path, "stat", stuck)
    with pytest.raises(DataError, match=r"rank 0 waits for data: .*shard-000003\.tar"):
        loader(config(folder, timeout_s=0.4))
    release.set()


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
from tests.data.test_damage import *
source = loader(config(Path({str(folder)!r}), timeout_s=0.5))
for path in Path({str(folder)!r}).glob("*.tar"):
    path.unlink()
    os.mkfifo(path)
try:
    take(source, 20)
except DataError as error:
    sys.exit(f"error: {{error}}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: rank 0 waits for data: ")
    assert done.stderr.count("\n") == 1


# Data that changed between runs


def test_a_run_does_not_go_on_with_data_that_changed(folder: Path, tmp_path: Path) -> None:
    cfg = config(folder)
    facts = {
        "experiment": frozen_part(cfg),
        "world_size": 1,
        "fingerprint": Dataset.open(folder).fingerprint,
    }
    same_experiment(cfg, facts, 1, Dataset.open(folder).fingerprint)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "moved"))
    same_experiment(config(elsewhere), facts, 1, Dataset.open(elsewhere).fingerprint)
    changed = rewritten(folder, tmp_path / "changed", {3: jpeg(WHOLE)})
    with pytest.raises(ConfigError, match="was started on other data"):
        same_experiment(config(changed), facts, 1, Dataset.open(changed).fingerprint)
    seeded = cfg.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"seed \(0 then, 1 now\)"):
        same_experiment(seeded, facts, 1, Dataset.open(folder).fingerprint)


def test_patience_and_budget_may_change_on_a_resume(folder: Path) -> None:
    cfg = config(folder)
    other = cfg.data.model_copy(update={"timeout_s": 1.0, "max_bad": 0.5})
    assert frozen_part(cfg.model_copy(update={"data": other})) == frozen_part(cfg)


# The list and the budget


def test_the_budget_is_a_share_of_the_images_but_never_less_than_a_few() -> None:
    assert bad_images_allowed(10**7, 1e-4) == 1000
    assert bad_images_allowed(100, 1e-4) == 10
    assert bad_images_allowed(10**7, 0.0) == 0


def entry(position: int, planned: int) -> Substitution:
    return Substitution(planned, planned + 1, "shard-000000.tar row 0: crc32 differs", position)


def test_the_ledger_lists_counts_and_forgets_what_a_resume_does_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run", allowed=2)
    ledger.restore(0)
    assert ledger.totals() == {"substituted_images": 0, "bad_images": 0}
    assert not (tmp_path / "run").exists()
    ledger.note([entry(16, 3), entry(32, 5)])
    ledger.note([entry(80, 3)])  # once more in the next epoch
    assert ledger.totals() == {"substituted_images": 3, "bad_images": 2}
    path = tmp_path / "run" / "substitutions.rank0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1] == {
        "planned": 5,
        "used": 6,
        "reason": "shard-000000.tar row 0: crc32 differs",
        "position": 32,
    }
    with path.open("a") as file:
        file.write('{"position": 96, "plan')  # torn by a crash
    resumed = Ledger(tmp_path / "run", allowed=2)
    resumed.restore(32)
    assert resumed.totals() == {"substituted_images": 2, "bad_images": 2}
    assert path.read_text().splitlines() == [json.dumps(line) for line in lines[:2]]
    resumed.note([entry(48, 9)])
    with pytest.raises(DataError, match=r"3 training images are damaged .* allows 2") as error:
        resumed.totals()
    assert "substitutions.rank*.jsonl" in one_line(error)


def keep_books(folder: Path) -> tuple[dict[str, float], str]:
    ledger = Ledger(folder, allowed=3)
    ledger.restore(100)
    ledger.note([entry(110, 40 + dist.rank()), entry(110, 7)])
    totals = ledger.totals()
    ledger.note([entry(120, 50)] if dist.rank() else [])
    try:
        ledger.totals()
    except DataError as error:
        return totals, str(error)
    return totals, ""


def test_all_ranks_count_the_same_and_stop_together_also_when_fewer_go_on(tmp_path: Path) -> None:
    before = ["0", "1", "2"]  # three ranks wrote these, two go on
    for rank in before:
        lines = [entry(90, 7), entry(105, 60)]
        with (tmp_path / f"substitutions.rank{rank}.jsonl").open("w") as file:
            file.writelines(json.dumps(vars(line)) + "\n" for line in lines)
    results = run_ranks(keep_books, 2, tmp_path)
    assert results[0] == results[1]
    totals, error = results[0]
    assert totals == {"substituted_images": 3 + 4, "bad_images": 3}
    assert error.startswith("4 training images are damaged")


def test_a_full_disk_costs_the_list_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    ledger = Ledger(tmp_path / "run", allowed=5)
    ledger.note([entry(16, 3)])
    assert ledger.totals()["bad_images"] == 1
    assert "warning: 1 bad images are not listed" in capsys.readouterr().out


def test_a_shard_of_one_sample_that_is_bad_is_one_line(
    sound: Path, tmp_path: Path, at_once: None
) -> None:
    samples = [s for shard in stored(sound) for s in shard]
    folder = write_shards(tmp_path / "train", [samples[:1], samples[1:8], samples[8:]])
    dataset = Dataset.open(folder)
    tar, offset, _ = place(folder, 0)
    flip(tar, offset + 20)
    with pytest.raises(DataError, match="not one intact sample") as error:
        dataset.read_checked(np.array([0]))
    one_line(error)
    with pytest.raises(DataError, match="damaged or swapped: shard-000000"):
        loader(config(folder))
