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

from vssl_dist.evaluation.cache import KEPT_NETWORKS, FeatureCache, features_of
from vssl_dist.evaluation.features import Rows

NETWORK, IMAGES = {"export_sha256": "ab"}, {"fingerprint": "cd", "samples": 50}


class Source:
    """Features in uneven batches, and how often they were asked for."""

    def __init__(self, seed: int = 0) -> None:
        self.features = torch.randn(50, 8, generator=torch.Generator().manual_seed(seed))
        self.labels = torch.arange(50) % 7
        self.asked = 0

    def __call__(self, scratch: Path) -> Rows:
        self.asked += 1
        for start in range(0, 50, 16):
            yield self.features[start : start + 16], self.labels[start : start + 16]


def entry(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if not path.name.startswith("."))
    return found


def test_what_is_stored_is_what_was_computed_and_is_computed_once(tmp_path: Path) -> None:
    source = Source()
    for _ in range(3):
        found = FeatureCache(tmp_path).get(NETWORK, IMAGES, source)
        assert torch.equal(found.features, source.features)
        assert torch.equal(found.labels, source.labels)
    assert source.asked == 1
    assert found.features.numpy().base is not None
    assert np.array_equal(np.load(entry(tmp_path) / "features.npy"), source.features.numpy())


@pytest.mark.parametrize(
    ("network", "images"),
    [({"export_sha256": "x"}, IMAGES), (NETWORK, IMAGES | {"fingerprint": "x"})],
)
def test_other_facts_are_other_features(
    tmp_path: Path, network: dict[str, str], images: dict[str, object]
) -> None:
    first, other = Source(0), Source(1)
    FeatureCache(tmp_path).get(NETWORK, IMAGES, first)
    found = FeatureCache(tmp_path).get(network, images, other)
    assert torch.equal(found.features, other.features)
    assert torch.equal(FeatureCache(tmp_path).get(NETWORK, IMAGES, first).features, first.features)
    assert (first.asked, other.asked) == (1, 1)


def one_bit(place: Path) -> None:
    content = bytearray((place / "features.npy").read_bytes())
    content[-5] ^= 4
    (place / "features.npy").write_bytes(content)


def one_label(place: Path) -> None:
    labels = np.load(place / "labels.npy")
    labels[3] += 1
    np.save(place / "labels.npy", labels)


def cut_short(place: Path) -> None:
    os.truncate(place / "features.npy", 500)


def without_labels(place: Path) -> None:
    (place / "labels.npy").unlink()


def half_a_seal(place: Path) -> None:
    text = (place / "seal.json").read_text()
    (place / "seal.json").write_text(text[: len(text) // 2])


def a_list_as_seal(place: Path) -> None:
    (place / "seal.json").write_text("[]")


def of_another_format(place: Path) -> None:
    seal = json.loads((place / "seal.json").read_text())
    (place / "seal.json").write_text(json.dumps(seal | {"format": 0}))


def a_file_in_its_place(place: Path) -> None:
    shutil.rmtree(place)
    place.mkdir()


@pytest.mark.parametrize(
    "harm",
    [
        one_bit, one_label, cut_short, without_labels, half_a_seal, a_list_as_seal,
        of_another_format, a_file_in_its_place,
    ],
)  # fmt: skip
def test_a_damaged_entry_is_never_believed(tmp_path: Path, harm: Callable[[Path], None]) -> None:
    source = Source()
    FeatureCache(tmp_path).get(NETWORK, IMAGES, source)
    harm(entry(tmp_path))
    for _ in range(2):
        found = FeatureCache(tmp_path).get(NETWORK, IMAGES, source)
        assert torch.equal(found.features, source.features)
        assert torch.equal(found.labels, source.labels)
    assert source.asked == 2, "computed again, once"


def test_two_that_want_the_same_compute_it_once(tmp_path: Path) -> None:
    source, going, more = Source(), Event(), Event()

    def slow(scratch: Path) -> Rows:
        going.set()
        assert more.wait(60)
        return source(scratch)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(FeatureCache(tmp_path).get, NETWORK, IMAGES, slow)
        assert going.wait(60)
        second = pool.submit(FeatureCache(tmp_path).get, NETWORK, IMAGES, source)
        more.set()
        found = first.result(60), second.result(60)
    assert source.asked == 1
    assert all(torch.equal(one.features, source.features) for one in found)


def test_a_failed_pass_leaves_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    def broken(scratch: Path) -> Rows:
        yield torch.zeros(16, 8), torch.zeros(16)
        raise ValueError("shard 3 is damaged")

    with pytest.raises(ValueError, match="shard 3"):
        features_of(FeatureCache(tmp_path), NETWORK, IMAGES, broken)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".lock")] == []


def test_where_nothing_can_be_stored_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="are not kept"):
        assert features_of(FeatureCache(tmp_path / "file"), NETWORK, IMAGES, Source()) is None

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vssl_dist.evaluation.cache.sync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert features_of(FeatureCache(tmp_path / "full"), NETWORK, IMAGES, Source()) is None
    assert not [p for p in (tmp_path / "full").iterdir() if not p.name.startswith(".lock")]


def test_what_a_killed_writer_left_is_cleared_by_the_next_one(tmp_path: Path) -> None:
    source = Source()
    FeatureCache(tmp_path).get(NETWORK, IMAGES, source)
    whole = entry(tmp_path)
    whole.rename(tmp_path / f".tmp-{whole.name}-0123456789ab")
    found = FeatureCache(tmp_path).get(NETWORK, IMAGES, source)
    assert source.asked == 2
    assert torch.equal(found.features, source.features)
    assert not list(tmp_path.glob(".tmp-*"))


def test_features_of_old_exports_and_of_killed_writers_go(tmp_path: Path) -> None:
    killed = tmp_path / ".tmp-x-y"
    killed.mkdir()
    os.utime(killed, (0, 0))
    cache, source = FeatureCache(tmp_path), Source()
    for number in range(KEPT_NETWORKS + 2):
        held = cache.get({"export_sha256": str(number)}, IMAGES, source)
        seal = max(tmp_path.glob("*/seal.json"), key=lambda path: path.stat().st_mtime)
        os.utime(seal, (1e9 + number, 1e9 + number))
    assert len(list(tmp_path.glob("*/seal.json"))) == KEPT_NETWORKS
    assert not killed.exists()
    newest = cache.get({"export_sha256": str(KEPT_NETWORKS + 1)}, IMAGES, source)
    assert source.asked == KEPT_NETWORKS + 2
    assert torch.equal(newest.features, held.features)
