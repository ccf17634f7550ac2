"""Sound pictures are kept whatever stands around them, and what trainings cannot show never is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from data_prep import shard, verify
from data_prep.images.examine import (
    DEFAULT_RULES,
    ImageVerdict,
    examine_image,
)
from tests.support.kinds import DUE, ENCODE_ANEW, KEEP, KINDS, REJECT
from tests.support.photos import crop
from tests.support.shards import rewritten, tiny_shards
from vssl_dist.config import Normalisation
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.reference import decode
from vssl_dist.data.passes import evaluation_batches
from vssl_dist.data.store.dataset import Dataset

EACH = 10
LEVELS = Normalisation(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
TURNED = {
    "png turned": Image.Transpose.ROTATE_270,
    "png turned, told behind": Image.Transpose.ROTATE_90,
    "png turned by xmp": Image.Transpose.ROTATE_180,
    "jpeg turned by xmp": Image.Transpose.ROTATE_270,
    "png turned, told twice": Image.Transpose.ROTATE_270,
    "jpeg turned in 32 bits": Image.Transpose.ROTATE_270,
    "jpeg turned": Image.Transpose.ROTATE_270,
    "jpeg own turned": Image.Transpose.ROTATE_180,
    "tiff turned": Image.Transpose.ROTATE_270,
    "tiff turned by xmp": Image.Transpose.ROTATE_180,
    "webp turned": Image.Transpose.TRANSPOSE,
}
PICTURES = [crop(number, 16, (24, 40)) for number in range(EACH)]


class Sharded(NamedTuple):
    """All kinds, ten pictures each, as one dataset whose classes are the kinds."""

    folder: Path
    data: Dataset
    files: dict[str, list[bytes]]
    records: dict[str, list[dict[str, str]]]
    """Lines of rejects.jsonl, by kind."""

    def stored(self, kind: str) -> list[bytes]:
        ids = np.flatnonzero(self.labels() == self.data.classes.index(kind))
        return [image.tobytes() for image in self.data.read(ids)]

    def labels(self) -> np.ndarray:
        return self.data.rows(np.arange(self.data.samples))["label"]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    root = tmp_path_factory.mktemp("kinds")
    files = {kind: [make(pixels) for pixels in PICTURES] for kind, make in KINDS.items()}
    for kind, blobs in files.items():
        (root / "raw" / kind).mkdir(parents=True)
        for number, blob in enumerate(blobs):
            (root / "raw" / kind / f"{number}.{'png' if 'png' in kind else 'jpg'}").write_bytes(
                blob
            )
    call = ["imagefolder", "--root", str(root / "raw"), "--out", str(root / "o")]
    assert shard.main([*call, "--workers", "1", "--on-bad", "skip"]) == 0
    folder = root / "o" / "train"
    records: dict[str, list[dict[str, str]]] = {kind: [] for kind in KINDS}
    for line in (folder / "rejects.jsonl").read_text().splitlines():
        record = json.loads(line)
        records[record["file"].split("/")[-2]].append(record)
    return Sharded(folder, Dataset.open(folder), files, records)


def test_there_are_kinds_enough() -> None:
    assert len(KEEP) >= 60
    assert len(ENCODE_ANEW) >= 20
    assert len(REJECT) >= 20
    assert len(KINDS) == len(KEEP) + len(ENCODE_ANEW) + len(REJECT)
    assert ENCODE_ANEW.keys() >= TURNED.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_meets_with_what_was_written_down_for_it(sharded: Sharded, kind: str) -> None:
    records, stored = sharded.records[kind], sharded.stored(kind)
    decisions = [record["decision"] for record in records if record["decision"] != "duplicate"]
    if DUE[kind] is ImageVerdict.KEEP:
        assert sorted(stored) == sorted(sharded.files[kind])
        assert decisions == []
        return
    digests = {hashlib.sha256(blob).hexdigest() for blob in sharded.files[kind]}
    assert {record["sha256"] for record in records} == digests
    assert all(record["reason"] for record in records)
    assert not set(stored) & set(sharded.files[kind])
    if DUE[kind] is ImageVerdict.ENCODE_ANEW:
        assert decisions == ["normalised"] * EACH
        assert len(stored) == EACH
        assert all(
            examine_image(blob, DEFAULT_RULES).verdict is ImageVerdict.KEEP for blob in stored
        )
    else:
        assert decisions == ["rejected"] * EACH
        assert stored == []


@pytest.mark.parametrize("kind", [*KEEP, *TURNED])
def test_what_is_stored_is_the_picture_that_was_drawn(sharded: Sharded, kind: str) -> None:
    for blob in sharded.stored(kind):
        shown = np.asarray(decode(np.frombuffer(blob, np.uint8))).astype(int)
        assert min(_away(shown, pixels, kind) for pixels in PICTURES) < 8


def _away(shown: np.ndarray, pixels: np.ndarray, kind: str) -> float:
    """Mean difference, of 255, from what a kind should show of a picture."""
    image = Image.fromarray(pixels)
    if kind in TURNED:
        image = image.transpose(TURNED[kind])
    if image.size != shown.shape[1::-1]:
        return 255
    channel = image.getchannel(0)
    looks = [np.asarray(look.convert("RGB")) for look in (image, channel, image.convert("L"))]
    return min(float(np.abs(look.astype(int) - shown).mean()) for look in looks)


def test_neither_backend_replaces_anything_and_both_show_the_same(sharded: Sharded) -> None:
    spec = BackendSpec((), 32, LEVELS, 1, "cpu")
    shown = {}
    for backend in ("dali", "reference"):
        batches = list(evaluation_batches(sharded.data, spec, backend=backend, batch=64))
        assert [s for batch in batches for s in batch.substitutions] == []
        shown[backend] = np.concatenate([batch.views[0].numpy() for batch in batches])
    assert len(shown["dali"]) == EACH * (len(KEEP) + len(ENCODE_ANEW))
    away = np.abs(shown["dali"] - shown["reference"]).mean((1, 2, 3))
    assert away.max() <= 2


def test_verify_agrees(sharded: Sharded) -> None:
    assert verify.main([str(sharded.folder), "--workers", "1"]) == 0


def test_what_can_be_decoded_of_a_reject_is_stored_anew_when_asked(tmp_path: Path) -> None:
    for kind in ("png stream without its checksum", "jpeg without its end", "png 1 bit"):
        path = tmp_path / "raw" / "c" / f"{kind}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(KINDS[kind](PICTURES[1]))
    assert run("imagefolder", tmp_path / "raw", tmp_path / "o", "--on-bad", "reencode") == 0
    text = (tmp_path / "o" / "train" / "rejects.jsonl").read_text()
    assert sorted(json.loads(line)["decision"] for line in text.splitlines()) == [
        "normalised", "reencoded", "reencoded",
    ]  # fmt: skip
    assert replaced(tmp_path / "o" / "train") == {"dali": [], "reference": []}


def run(source: str, root: Path, out: Path, *options: str) -> int:
    return shard.main([source, "--root", str(root), "--out", str(out), "--workers", "1", *options])


def replaced(folder: Path) -> dict[str, list[str]]:
    """What each backend cannot show of a dataset."""
    spec, reasons = BackendSpec((), 32, LEVELS, 1, "cpu"), {}
    for backend in ("dali", "reference"):
        batches = evaluation_batches(Dataset.open(folder), spec, backend=backend, batch=8)
        reasons[backend] = [
            substitution.reason for batch in batches for substitution in batch.substitutions
        ]
    return reasons


def test_no_remark_costs_a_folder_a_picture(tmp_path: Path) -> None:
    """The four files that were refused, or left out, for their metadata."""
    root = tmp_path / "raw" / "c"
    root.mkdir(parents=True)
    names = ("png plain", "png 2 MB of text", "png xmp of 1.5 MB", "png exif of garbage")
    for kind, pixels in zip(names, PICTURES, strict=False):
        (root / f"{kind}.png").write_bytes(KINDS[kind](pixels))
    for out, options in ((tmp_path / "a", ()), (tmp_path / "b", ("--on-bad", "reencode"))):
        assert run("imagefolder", tmp_path / "raw", out, *options) == 0
        data = Dataset.open(out / "train")
        stored = {image.tobytes() for image in data.read(np.arange(data.samples))}
        assert stored == {path.read_bytes() for path in root.iterdir()}
        assert not (out / "train" / "rejects.jsonl").exists()
    assert replaced(out / "train") == {"dali": [], "reference": []}


def test_a_png_that_dali_cannot_decode_is_a_reject(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one that was kept, called intact and then replaced in trainings."""
    root = tmp_path / "raw" / "c"
    root.mkdir(parents=True)
    for number, pixels in enumerate(PICTURES[:8]):
        (root / f"{number}.jpg").write_bytes(KINDS["jpeg by pillow"](pixels))
    (root / "z.png").write_bytes(KINDS["png stream without its checksum"](PICTURES[8]))
    assert run("imagefolder", tmp_path / "raw", tmp_path / "d") == 2
    assert "z.png: not a readable image (the end of its coded" in capsys.readouterr().err
    (line,) = (tmp_path / "d" / "train" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["file"].endswith("z.png")
    for how, samples in (("skip", 8), ("reencode", 9)):
        folder = tmp_path / how / "train"
        assert run("imagefolder", tmp_path / "raw", folder.parent, "--on-bad", how) == 0
        assert "z.png" in (folder / "rejects.jsonl").read_text()
        assert Dataset.open(folder).samples == samples
        assert replaced(folder) == {"dali": [], "reference": []}


def test_verify_names_what_an_older_version_kept_and_dali_cannot_decode(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = KINDS["png stream without its checksum"](crop(0, 4, (32, 32)))
    text = KINDS["png private part of 9 MB"](crop(1, 4, (32, 32)))
    whole_split = tiny_shards(tmp_path / "whole" / "train", samples=4, shard_size=4)
    old = rewritten(whole_split, tmp_path / "old" / "train", {1: bad, 2: text})
    assert verify.main([str(old), "--workers", "1"]) == 1
    # Of the others it says that this tar was written by another program.
    output = capsys.readouterr().out
    assert "sample 1: not a readable image (the end of its coded pixels is missing)" in output
    assert "sample 2: not a plain image of 32x32 pixels (Pillow decodes it and DALI" in output
    assert output.count("tar and index disagree") == 2
