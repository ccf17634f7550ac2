"""Stored features are those that were computed, or they are computed again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch

from tests.support.others import link_of_nobody, needs_root, shared_folder
from vssl_dist.durable import file_sha256
from vssl_dist.evaluation.features.cache import (
    MAX_KEPT_NETWORKS,
    FeatureCache,
    cached_features,
)
from vssl_dist.evaluation.features.extract import FeatureBatches

NETWORK, IMAGES = {"export_sha256": "ab"}, {"fingerprint": "cd", "samples": 50}


class Source:
    """Features in uneven batches, and how often they were asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.features = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))
        self.labels = torch.arange(50) % 7
        self.asked = 0

    def __call__(self, scratch: Path) -> FeatureBatches:
        self.asked += 1
        for start in range(0, 50, 16):
            yield self.features[start : start + 16], self.labels[start : start + 16]


def entry(folder: Path) -> Path:
    (entry_path,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return entry_path


def test_what_is_stored_is_what_was_computed_and_is_computed_once(tmp_path: Path) -> None:
    source = Source()
    for _ in range(3):
        features = FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
        assert torch.equal(features.features, source.features)
        assert torch.equal(features.labels, source.labels)
    assert source.asked == 1
    assert features.features.numpy().base is not None
    assert np.array_equal(np.load(entry(tmp_path) / "features.npy"), source.features.numpy())


@pytest.mark.parametrize(
    ("network", "images"),
    [({"export_sha256": "x"}, IMAGES), (NETWORK, IMAGES | {"fingerprint": "x"})],
)
def test_other_facts_are_other_features(
    tmp_path: Path, network: dict[str, str], images: dict[str, object]
) -> None:
    first, other = Source(0), Source(1)
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, first)
    features = FeatureCache(tmp_path).get_or_compute(network, images, other)
    assert torch.equal(features.features, other.features)
    assert torch.equal(
        FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, first).features, first.features
    )
    assert (first.asked, other.asked) == (1, 1)


def one_bit(entry_folder: Path) -> None:
    content = bytearray((entry_folder / "features.npy").read_bytes())
    content[-5] ^= 4
    (entry_folder / "features.npy").write_bytes(content)


def one_label(entry_folder: Path) -> None:
    labels = np.load(entry_folder / "labels.npy")
    labels[3] += 1
    np.save(entry_folder / "labels.npy", labels)


def cut_short(entry_folder: Path) -> None:
    os.truncate(entry_folder / "features.npy", 500)


def without_labels(entry_folder: Path) -> None:
    (entry_folder / "labels.npy").unlink()


def half_a_seal(entry_folder: Path) -> None:
    text = (entry_folder / "seal.json").read_text()
    (entry_folder / "seal.json").write_text(text[: len(text) // 2])


def a_list_as_seal(entry_folder: Path) -> None:
    (entry_folder / "seal.json").write_text("[]")


def of_another_format(entry_folder: Path) -> None:
    seal = json.loads((entry_folder / "seal.json").read_text())
    (entry_folder / "seal.json").write_text(json.dumps(seal | {"format": 0}))


def a_file_in_its_place(entry_folder: Path) -> None:
    shutil.rmtree(entry_folder)
    entry_folder.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        one_bit, one_label, cut_short, without_labels, half_a_seal, a_list_as_seal,
        of_another_format, a_file_in_its_place,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_never_believed(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    source = Source()
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
    harm(entry(tmp_path))
    for _ in range(2):
        features = FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
        assert torch.equal(features.features, source.features)
        assert torch.equal(features.labels, source.labels)
    assert source.asked == 2, "computed again, once"


def test_two_that_want_the_same_compute_it_once(tmp_path: Path) -> None:
    source, going, more = Source(), Event(), Event()

    def slow(scratch: Path) -> FeatureBatches:
        going.set()
        assert more.wait(60)
        return source(scratch)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(FeatureCache(tmp_path).get_or_compute, NETWORK, IMAGES, slow)
        assert going.wait(60)
        second = pool.submit(FeatureCache(tmp_path).get_or_compute, NETWORK, IMAGES, source)
        more.set()
        features = first.result(60), second.result(60)
    assert source.asked == 1
    assert all(torch.equal(one.features, source.features) for one in features)


def test_a_failed_pass_leaves_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    def broken(scratch: Path) -> FeatureBatches:
        yield torch.zeros(16, 8), torch.zeros(16)
        raise ValueError("shard 3 is damaged")

    with pytest.raises(ValueError, match="shard 3"):
        cached_features(FeatureCache(tmp_path), NETWORK, IMAGES, broken)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == []


def test_where_nothing_can_be_stored_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="are not kept"):
        assert cached_features(FeatureCache(tmp_path / "file"), NETWORK, IMAGES, Source()) is None

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vssl_dist.evaluation.features.cache.sync_to_disk", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert cached_features(FeatureCache(tmp_path / "full"), NETWORK, IMAGES, Source()) is None
    assert not [p for p in (tmp_path / "full").iterdir() if not p.name.startswith(".lock")]


def test_what_a_killed_writer_left_is_cleared_by_the_next_one(tmp_path: Path) -> None:
    source = Source()
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
    whole = entry(tmp_path)
    whole.rename(tmp_path / f".tmp-{whole.name}-0123456789ab")
    features = FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
    assert source.asked == 2
    assert torch.equal(features.features, source.features)
    assert not list(tmp_path.glob(".tmp-*"))


def test_features_of_old_exports_and_of_killed_writers_go(tmp_path: Path) -> None:
    killed = tmp_path / f".tmp-{'0' * 16}-{'1' * 16}-{'2' * 12}"
    (killed / "parts" / "0.partial").mkdir(parents=True)
    (killed / "parts" / "0.partial" / "features.npy").touch()
    os.utime(killed, (0, 0))
    cache, source = FeatureCache(tmp_path), Source()
    for number in range(MAX_KEPT_NETWORKS + 2):
        held = cache.get_or_compute({"export_sha256": str(number)}, IMAGES, source)
        seal = max(tmp_path.glob("*/seal.json"), key=lambda path: path.stat().st_mtime)
        os.utime(seal, (1e9 + number, 1e9 + number))
    assert len(list(tmp_path.glob("*/seal.json"))) == MAX_KEPT_NETWORKS
    assert not killed.exists()
    newest = cache.get_or_compute({"export_sha256": str(MAX_KEPT_NETWORKS + 1)}, IMAGES, source)
    assert source.asked == MAX_KEPT_NETWORKS + 2
    assert torch.equal(newest.features, held.features)


def fill(folder: Path, count: int = MAX_KEPT_NETWORKS + 2) -> None:
    """Have features of more networks asked for than are kept."""
    for number in range(count):
        FeatureCache(folder).get_or_compute({"export_sha256": str(number)}, IMAGES, Source())


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


HEX = "0123456789abcdef"
KEY = HEX[:12]


@pytest.mark.parametrize(
    "name",
    [
        "my-thesis", "old-data", "a-b", "*-x", "[a-f]-x", "[..]-x", f"{HEX}-{HEX}", f"{HEX}-x",
        f".tmp-{HEX}-{HEX}-{KEY}", ".tmp-mine", f"{HEX.upper()}-{HEX}", f"{HEX}-{HEX}-{KEY}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("content", ["thesis.tex", "features.npy", "seal.json"])
def test_nothing_is_deleted_that_is_not_the_caches_own(
    tmp_path: Path, name: str, content: str
) -> None:
    """By the user's own link the folder is any of the user's folders."""
    own = tmp_path / "own"
    (own / name / "more").mkdir(parents=True)
    (own / name / content).write_text('{"format": 2, "network": {}, "images": {}}')
    os.utime(own / name, (0, 0))
    (tmp_path / "features").symlink_to(own)
    before = tree(own)
    fill(tmp_path / "features")
    assert before.items() <= tree(own).items()
    assert len(list(own.glob("*/labels.npy"))) == MAX_KEPT_NETWORKS


def test_a_folder_of_files_that_are_called_as_ours_stays_without_our_seal(tmp_path: Path) -> None:
    theirs = tmp_path / f"{HEX}-{HEX}"
    theirs.mkdir()
    np.save(theirs / "features.npy", np.zeros(3))
    fill(tmp_path)
    assert (theirs / "features.npy").exists()


def test_an_entry_in_which_somebody_keeps_something_is_never_deleted(tmp_path: Path) -> None:
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, Source())
    first = entry(tmp_path)
    (first / "notes.txt").write_text("mine")
    os.utime(first / "seal.json", (0, 0))
    fill(tmp_path)
    assert (first / "notes.txt").read_text() == "mine"
    (first / "seal.json").write_text("{")
    with pytest.warns(UserWarning, match="is no features of ours: move it away"):
        assert cached_features(FeatureCache(tmp_path), NETWORK, IMAGES, Source()) is None
    assert (first / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("version", [1, 2])
def test_entries_of_earlier_versions_are_recognised_and_pruned(
    tmp_path: Path, version: int
) -> None:
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, Source())
    old = entry(tmp_path)
    seal = json.loads((old / "seal.json").read_text())
    (old / "seal.json").write_text(json.dumps(seal | {"format": version}))
    os.utime(old / "seal.json", (0, 0))
    fill(tmp_path, MAX_KEPT_NETWORKS)
    assert not old.exists()


def test_links_in_the_place_of_an_entry_or_its_files_lead_nowhere(tmp_path: Path) -> None:
    FeatureCache(tmp_path / "c").get_or_compute(NETWORK, IMAGES, Source())
    entry_folder = entry(tmp_path / "c")
    moved_entry = entry_folder.rename(tmp_path / "kept")
    entry_folder.symlink_to(moved_entry)
    before = tree(moved_entry)
    fill(tmp_path / "c")
    entry_folder.unlink()
    entry_folder.mkdir()
    for name in before:
        (entry_folder / name).symlink_to(moved_entry / name)
    with pytest.warns(UserWarning, match="move it away"):
        assert cached_features(FeatureCache(tmp_path / "c"), NETWORK, IMAGES, Source()) is None
    fill(tmp_path / "c")
    assert tree(moved_entry) == before


@needs_root
def test_a_folder_by_another_users_link_is_refused() -> None:
    with shared_folder() as folder:
        (folder / "mine").mkdir()
        link_of_nobody(folder / "features", folder / "mine")
        with pytest.raises(OSError, match="nobody made: remove it"):
            FeatureCache(folder / "features").get_or_compute(NETWORK, IMAGES, Source())
        assert not list((folder / "mine").iterdir())


def misshapen(entry_folder: Path) -> None:
    np.save(entry_folder / "features.npy", np.zeros((3, 2, 2), np.float32))


def of_objects(entry_folder: Path) -> None:
    np.save(entry_folder / "features.npy", np.zeros((50, 8), complex))


def labels_of_floats(entry_folder: Path) -> None:
    np.save(entry_folder / "labels.npy", np.zeros(50))


@pytest.mark.parametrize("harm", [misshapen, of_objects, labels_of_floats])
def test_an_entry_whose_seal_agrees_with_nonsense_is_computed_again(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    source = Source()
    FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
    entry_folder = entry(tmp_path)
    harm(entry_folder)
    seal = json.loads((entry_folder / "seal.json").read_text())
    seal["sha256"] = {name: file_sha256(entry_folder / name) for name in seal["sha256"]}
    (entry_folder / "seal.json").write_text(json.dumps(seal))
    features = FeatureCache(tmp_path).get_or_compute(NETWORK, IMAGES, source)
    assert torch.equal(features.features, source.features)
    assert source.asked == 2
