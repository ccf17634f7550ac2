"""What becomes of bad, odd and repeated images, and that rejects.jsonl tells of each."""

from __future__ import annotations

import hashlib
import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import shard, verify
from data_prep.sharding import dataset as dataset_builder
from tests.support.archives import jpeg
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def plain_files() -> dict[str, bytes]:
    image_files = {f"train/{'ab'[n % 2]}/{n}.jpg": jpeg(n) for n in range(10)}
    return image_files | {f"val/{'ab'[n % 2]}/{n}.jpg": jpeg(100 + n) for n in range(4)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "raw", plain_files())


run = partial(sharded, "imagefolder")


def decisions_by_file(folder: Path) -> dict[str, tuple[str, str]]:
    """By file, the decision and its reason."""
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {record["file"]: (record["decision"], record["reason"]) for record in records}


def stored(folder: Path) -> list[bytes]:
    dataset = Dataset.open(folder)
    return [image.tobytes() for image in dataset.read_checked(np.arange(dataset.samples)).data]


def cmyk(number: int) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg(number))).convert("CMYK").save(stream, "JPEG", quality=95)
    return stream.getvalue()


BAD = {
    "train/a/cut.jpg": jpeg(50, (80, 90))[:-900],
    "train/a/empty.jpg": b"",
    "train/b/page.jpg": b"<html>404</html>",
    "train/b/noise.jpg": np.random.default_rng(0).bytes(3000),
}


def test_nothing_to_report_is_no_report(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "o") == 0
    assert not list(tmp_path.rglob("rejects.jsonl"))


def test_bad_images_stop_it_and_all_of_them_are_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, BAD)
    assert run(root, tmp_path / "o") == 2
    message = refusal(capsys)
    assert "a/cut.jpg: not a readable image" in message
    assert "(and 3 more, see rejects.jsonl)" in message
    assert "--on-bad skip" in message
    split_decisions = decisions_by_file(tmp_path / "o" / "train")
    assert {f"train/{name}" for name in split_decisions} == set(BAD)
    assert {decision for decision, _ in split_decisions.values()} == {"rejected"}
    assert "0x" not in (tmp_path / "o" / "train" / "rejects.jsonl").read_text()
    assert not list(tmp_path.rglob("manifest.json"))


def test_skipping_leaves_them_out_and_nothing_else(root: Path, tmp_path: Path) -> None:
    write(root, BAD)
    assert run(root, tmp_path / "o", "--on-bad", "skip", "--shard-size", 4) == 0
    good = [data for name, data in plain_files().items() if name.startswith("train")]
    assert sorted(stored(tmp_path / "o" / "train")) == sorted(good)
    assert Dataset.open(tmp_path / "o" / "train").shard_sizes.tolist() == [4, 4, 2]
    assert {f"train/{name}" for name in decisions_by_file(tmp_path / "o" / "train")} == set(BAD)
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_reencoding_keeps_what_can_be_decoded(root: Path, tmp_path: Path) -> None:
    write(root, BAD)
    assert run(root, tmp_path / "o", "--on-bad", "reencode") == 0
    split_decisions = decisions_by_file(tmp_path / "o" / "train")
    assert split_decisions["a/cut.jpg"][0] == "reencoded"
    assert [split_decisions[name][0] for name in ("a/empty.jpg", "b/page.jpg", "b/noise.jpg")] == [
        "rejected"
    ] * 3
    images = stored(tmp_path / "o" / "train")
    assert len(images) == 11
    large_image = np.asarray(Image.open(io.BytesIO(jpeg(50, (80, 90))))).astype(int)
    plain_images = set(plain_files().values())
    (salvaged,) = [data for data in images if data not in plain_images]
    rescued = np.asarray(Image.open(io.BytesIO(salvaged))).astype(int)
    assert np.abs(rescued[:16] - large_image[:16]).mean() < 3


def test_a_normalised_image_is_reported_with_its_oddity(root: Path, tmp_path: Path) -> None:
    write(root, {"train/a/odd.jpg": cmyk(60)})
    assert run(root, tmp_path / "o") == 0
    assert decisions_by_file(tmp_path / "o" / "train") == {
        "a/odd.jpg": ("normalised", "JPEG of mode CMYK")
    }
    line = json.loads((tmp_path / "o" / "train" / "rejects.jsonl").read_text())
    assert line["sha256"] == hashlib.sha256(cmyk(60)).hexdigest()


def test_copies_are_kept_and_reported_or_dropped(root: Path, tmp_path: Path) -> None:
    copies = {"train/a/x.jpg": jpeg(0), "train/b/y.jpg": jpeg(0), "train/b/z.jpg": jpeg(0)}
    write(root, copies)
    assert run(root, tmp_path / "kept") == 0
    assert Dataset.open(tmp_path / "kept" / "train").samples == 13
    assert run(root, tmp_path / "dropped", "--dedup") == 0
    assert Dataset.open(tmp_path / "dropped" / "train").samples == 10
    for out, decision in (("kept", "duplicate"), ("dropped", "dropped")):
        same = "the same bytes as a/0.jpg"
        assert decisions_by_file(tmp_path / out / "train") == {
            "a/x.jpg": (decision, same),
            "b/y.jpg": (decision, f"{same}, which is of another class"),
            "b/z.jpg": (decision, f"{same}, which is of another class"),
        }


def test_a_copy_that_was_also_normalised_is_told_twice(root: Path, tmp_path: Path) -> None:
    write(root, {"train/a/odd.jpg": cmyk(3), "train/a/odd2.jpg": cmyk(3)})
    for out, options, decisions in (
        ("kept", (), ["normalised", "normalised", "duplicate"]),
        ("dropped", ("--dedup",), ["normalised", "dropped"]),
    ):
        assert run(root, tmp_path / out, *options) == 0
        lines = (tmp_path / out / "train" / "rejects.jsonl").read_text().splitlines()
        assert [json.loads(line)["decision"] for line in lines] == decisions


@pytest.mark.parametrize("finished", [True, False])
def test_a_class_that_came_since_never_mixes_two_numberings(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    assert run(root, tmp_path / "o", "--split", "val") == 0
    if not finished:
        manifest = json.loads((tmp_path / "o" / "val" / "manifest.json").read_text())
        (tmp_path / "o" / "val" / "manifest.json").unlink()
        (tmp_path / "o" / "val" / ".sharding").mkdir()
        note = tmp_path / "o" / "val" / ".sharding" / "recipe.json"
        note.write_text(json.dumps(manifest["source"]))
    write(root, {"train/aa/new.jpg": jpeg(70)})
    assert run(root, tmp_path / "o", "--split", "val") == 2
    assert "was begun with another labelling" in refusal(capsys)


def test_pixels_without_a_white_are_refused(root: Path, tmp_path: Path) -> None:
    for name, pixels in (
        ("float", np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)),
        ("int", np.arange(600, dtype=np.int32).reshape(20, 30)),
    ):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "TIFF")
        write(root, {f"train/a/{name}.tiff": stream.getvalue()})
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 0
    split_decisions = decisions_by_file(tmp_path / "o" / "train")
    assert {name: split_decisions[f"a/{name}.tiff"][0] for name in ("float", "int")} == {
        "float": "rejected",
        "int": "rejected",
    }


LEAK = {"val/a/leaked.jpg": jpeg(4)}


def test_an_image_in_train_and_val_is_an_error_unless_train_gives_it_up(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(root, LEAK)
    assert run(root, tmp_path / "o") == 2
    message = refusal(capsys)
    assert "a/4.jpg: is in train and in val (1 such images): --dedup drops them" in message
    assert decisions_by_file(tmp_path / "o" / "train") == {
        "a/4.jpg": ("leak", "the same bytes as an image of val")
    }
    assert not list(tmp_path.rglob("manifest.json"))
    assert run(root, tmp_path / "o2", "--dedup") == 0
    assert Dataset.open(tmp_path / "o2" / "train").samples == 9
    assert Dataset.open(tmp_path / "o2" / "val").samples == 5
    assert jpeg(4) in stored(tmp_path / "o2" / "val")
    assert decisions_by_file(tmp_path / "o2" / "train") == {
        "a/4.jpg": ("dropped", "the same bytes as an image of val")
    }
    assert not (tmp_path / "o2" / "val" / "rejects.jsonl").exists()


@pytest.mark.parametrize("first", ["train", "val"])
def test_a_leak_is_found_when_the_splits_are_made_one_after_the_other(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    write(root, LEAK)
    second = {"train": "val", "val": "train"}[first]
    assert run(root, tmp_path / "o", "--split", first) == 0
    assert run(root, tmp_path / "o", "--split", second) == 2
    message = refusal(capsys)
    assert "is in " in message
    assert ("delete the finished training split" in message) == (first == "train")
    code = run(root, tmp_path / "o", "--split", second, "--dedup")
    if first == "train":  # nothing can be dropped from what is finished
        assert code == 2
        assert "delete the finished training split" in refusal(capsys)
    else:
        assert code == 0
        assert Dataset.open(tmp_path / "o" / "train").samples == 9


def test_reports_are_the_same_bytes_on_any_number_of_workers(root: Path, tmp_path: Path) -> None:
    write(root, BAD | LEAK | {"train/b/x.jpg": jpeg(2), "train/b/odd.jpg": cmyk(3)})
    (tmp_path / "moved").mkdir()
    root.rename(tmp_path / "moved" / "elsewhere")
    write(root, plain_files() | BAD | LEAK | {"train/b/x.jpg": jpeg(2), "train/b/odd.jpg": cmyk(3)})
    options = ("--on-bad", "skip", "--dedup")
    assert run(root, tmp_path / "one", *options) == 0
    assert run(tmp_path / "moved" / "elsewhere", tmp_path / "two", *options, "--workers", 2) == 0
    for path in (tmp_path / "one").rglob("*"):
        if path.is_file():
            twin = tmp_path / "two" / path.relative_to(tmp_path / "one")
            assert twin.read_bytes() == path.read_bytes()


def test_a_split_without_one_usable_image_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "raw", {"a/x.jpg": b"no"})
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 2
    assert "not one image of it can be used (rejects.jsonl tells why)" in refusal(capsys)
    assert decisions_by_file(tmp_path / "o" / "train")["a/x.jpg"][0] == "rejected"


def test_resizing_shrinks_the_shorter_side_and_leaves_small_images_alone(tmp_path: Path) -> None:
    files = {f"a/{n}.jpg": jpeg(n, (40, 150)) for n in range(12)}
    root = write(tmp_path / "raw", files)
    assert run(root, tmp_path / "o", "--resize-short", 64) == 0
    dataset = Dataset.open(tmp_path / "o" / "train")
    rows = dataset.rows(np.arange(12))
    before = sorted(Image.open(io.BytesIO(data)).size for data in files.values())
    assert min(map(min, before)) < 64 < max(map(min, before))
    want = []
    for width, height in before:
        scale = min(1, 64 / min(width, height))
        want.append((round(width * scale), round(height * scale)))
    assert sorted(zip(rows["width"].tolist(), rows["height"].tolist(), strict=True)) == sorted(want)
    small = {data for data in files.values() if min(Image.open(io.BytesIO(data)).size) <= 64}
    assert small <= set(stored(dataset.folder))
    for data in set(stored(dataset.folder)) - small:
        image = Image.open(io.BytesIO(data))
        source = min(
            files.values(),
            key=lambda raw: np.abs(
                np.asarray(Image.open(io.BytesIO(raw)).resize(image.size, Image.Resampling.LANCZOS))
                - np.asarray(image).astype(float)
            ).mean(),
        )
        golden = Image.open(io.BytesIO(source)).resize(image.size, Image.Resampling.LANCZOS)
        difference = np.abs(np.asarray(golden).astype(int) - np.asarray(image).astype(int))
        assert difference.mean() < 3
    assert not (dataset.folder / "rejects.jsonl").exists()
    assert run(root, tmp_path / "rough", "--resize-short", 64, "--quality", 40) == 0
    assert sum(map(len, stored(tmp_path / "rough" / "train"))) < sum(
        map(len, stored(dataset.folder))
    )
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cifar10", "--classes", "x"), "cifar10 has no --classes"),
        (("stl10", "--on-bad", "skip"), "stl10 has no --on-bad"),
        (("photos", "--quality", "90"), "photos has no --quality"),
        (("photos", "--root", "x"), "photos has no --root"),
        (("imagenet", "--root", "x", "--download"), "imagenet has no --download"),
        (("webdataset", "--classes", "x"), "webdataset has no --classes"),
        (("cifar100", "--resize-short", "16"), "cifar100 has no --resize-short"),
        (("imagefolder", "--split", "unlabeled"), "imagefolder has no split unlabeled"),
        (("imagefolder", "--quality", "101"), "--quality 101: is at most 100"),
        (("imagefolder", "--max-pixels", "999999999"), "no decoder here takes more than"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_is_read(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    assert shard.main([*arguments, "--out", str(tmp_path / "o")]) == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "o").exists()


def test_max_pixels_is_the_limit_also_for_verify(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, tmp_path / "o", "--max-pixels", 100) == 2
    assert "pixels are more than the limit of 100 (--max-pixels)" in refusal(capsys)
    assert run(root, tmp_path / "o", "--max-pixels", 8100) == 0
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_a_leak_into_a_split_that_another_process_finished_meanwhile_is_never_sealed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, LEAK)
    assert run(root, tmp_path / "o", "--split", "val") == 0
    genuine, calls = dataset_builder.read_sealed_digests, []

    def late(out: Path, names: set[str]) -> dict[str, np.ndarray]:
        calls.append(names)
        return genuine(out, names) if len(calls) > 1 else {}

    monkeypatch.setattr(dataset_builder, "read_sealed_digests", late)
    assert run(root, tmp_path / "o", "--split", "train") == 2
    assert "shares images with a split that was finished meanwhile" in refusal(capsys)
    assert not (tmp_path / "o" / "train" / "manifest.json").exists()
