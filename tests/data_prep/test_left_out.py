"""Nothing in an image folder is left out without a count, and nothing for what it is called."""

from __future__ import annotations

import io
import json
import os
import pickle
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import shard, verify
from data_prep.sharding import dataset as dataset_builder
from data_prep.sharding.decisions import SplitDecisions
from data_prep.sharding.split_folder import change_recipe
from data_prep.sharding.writer import (
    NOTES_FOLDER_NAME,
    ShardWriteTask,
    UnreadableSampleError,
)
from data_prep.sources.class_folders import walk_class_folder
from tests.support.archives import jpeg, packed
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import read_manifest

# Nothing else is printed where an error is told, by whatever is collected afterwards.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")

LINES = {"notes.txt": b"words", "meta.json": b"{}", "x.npy": b"\x93NUMPY", "LICENSE": b"free"}


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def photos(folder: str, count: int, first: int = 0) -> dict[str, bytes]:
    return {f"{folder}/{'ab'[n % 2]}/{n}.jpg": jpeg(first + n) for n in range(count)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "raw", photos(".", 6))


run = partial(sharded, "imagefolder")


def told(folder: Path) -> dict[str, tuple[str, str]]:
    path = folder / "rejects.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    assert all(set(record) == {"file", "decision", "reason", "sha256"} for record in records)
    return {record["file"]: (record["decision"], record["reason"]) for record in records}


def stored(folder: Path) -> list[bytes]:
    dataset = Dataset.open(folder)
    rows = dataset.read_checked(np.arange(dataset.samples))
    return sorted(image.tobytes() for image in rows.data)


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg(77))).save(stream, kind)
    return stream.getvalue()


def test_a_jpeg_is_one_under_any_name(root: Path, tmp_path: Path) -> None:
    names = ("x.jfif", "x.jpe", "x.JPG_large", "x.avif", "x.heic", "x.jp2", "x.jpg.1", "x",
             "x.txt", "photo?size=large", "x.png")  # fmt: skip
    write(root, {f"a/{name}": jpeg(50 + n) for n, name in enumerate(names)})
    assert run(root, tmp_path / "o") == 0
    want = [jpeg(n) for n in (*range(6), *range(50, 50 + len(names)))]
    assert stored(tmp_path / "o" / "train") == sorted(want)
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0
    assert told(tmp_path / "o" / "train") == {}


@pytest.mark.parametrize("name", ["x.avif", "x.jpg", "x", "x.dat"])
def test_a_format_that_is_not_decoded_is_refused_and_can_be_skipped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    bad = {f"a/{name}": encoded("AVIF"), f"b/{name}": encoded("JPEG2000")}
    write(root, {**bad, "b/c.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"})
    assert run(root, tmp_path / "o") == 2
    message = refusal(capsys)
    assert (
        f"a/{name}: not a readable image (AVIF, which is not decoded here) (and 2 more" in message
    )
    assert run(root, tmp_path / "s", "--on-bad", "skip") == 0
    assert "; 3 rejected: see rejects.jsonl" in capsys.readouterr().out
    assert stored(tmp_path / "s" / "train") == sorted(jpeg(n) for n in range(6))
    assert {decision for decision, _ in told(tmp_path / "s" / "train").values()} == {"rejected"}
    assert told(tmp_path / "s" / "train")[f"b/{name}"][1].startswith("not a readable image (JPEG 2")


@pytest.mark.parametrize(
    ("name", "data"),
    [("x.jpg", b""), ("x.jfif", b""), ("x.JPEG", b"<html>404</html>"), ("x.heic", b"words")],
)
def test_no_picture_in_the_place_of_one_is_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, data: bytes
) -> None:
    write(root, {f"a/{name}": data})
    assert run(root, tmp_path / "o") == 2
    assert f"a/{name}: not a readable image (" in refusal(capsys)


def test_what_is_no_picture_is_counted_by_suffix_and_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tmp_path / "plain"
    assert run(root, plain) == 0
    write(
        root,
        {
            f"{parent_folder}/{name}": data
            for name, data in LINES.items()
            for parent_folder in ("a", "b/c")
        },
    )
    write(root, {"a/.DS_Store": b"\0\0\0\1Bud1", "b/._0.jpg": b"\0\5\x16\7", "a/empty.TXT": b""})
    write(root, {"a/.cache/1.jpg": jpeg(1), "readme.md": b"#", "lone.jpg": jpeg(9)})
    (root / "a" / "nothing").mkdir()
    os.mkfifo(root / "a" / "pipe")
    (root / "a" / "zero.bin").symlink_to("/dev/zero")
    (root / "b" / "around").symlink_to(root / "b")
    (root / "b" / "further").symlink_to(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "a" / "s.sock"))
    capsys.readouterr()
    assert run(root, tmp_path / "o") == 0
    message = capsys.readouterr().out
    assert (
        "; left out: 4 folders, 3 .txt, 3 without suffix, 2 .json, 2 .npy, 2 hidden, 1 .bin, "
        "1 .jpg, 1 .md, 1 .sock"
    ) in message
    records = told(tmp_path / "o" / "train")
    assert {decision for decision, _ in records.values()} == {"left out"}
    assert len(records) == 4 + 3 + 3 + 2 + 2 + 2 + 4
    assert records["b/c/notes.txt"] == ("left out", "no picture")
    assert records["a/.cache/"][1] == "a hidden folder"
    assert records["a/pipe"][1] == "not a regular file"
    assert records["b/around/"][1] == "a link to a folder that it lies in"
    assert records["lone.jpg"][1] == "lies in no class folder"
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0
    for name in ("shard-000000.tar", "shard-000000.idx.npy", "inputs.npy"):
        after = (tmp_path / "o" / "train" / name).read_bytes()
        assert after == (plain / "train" / name).read_bytes()


def test_files_that_come_and_go_beside_the_images_change_nothing_of_a_dataset(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o" / "train"
    write(root, {"a/1.txt": b"x", "a/bad.jpg": b""})
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write(root, {"a/2.txt": b"x", "b/.DS_Store": b"x"})
    (root / "a" / "1.txt").unlink()
    capsys.readouterr()
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 0
    message = capsys.readouterr().out
    assert "complete already" in message
    assert "left out: 1 .txt, 1 hidden" in message
    (out / "shard-000000.tar").unlink()
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("lost", ["shard-000000.tar", "inputs.npy"])
def test_a_dataset_of_before_is_finished_and_made_good_byte_for_byte(
    root: Path, tmp_path: Path, lost: str
) -> None:
    """What was not listed then does not make it another one."""
    out = tmp_path / "o" / "train"
    assert run(root, tmp_path / "o") == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "rejects.jsonl" not in before
    write(root, {"a/1.txt": b"x"})
    (out / lost).unlink()
    assert run(root, tmp_path / "o") == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def interrupted(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(task: ShardWriteTask) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset_builder, "write_shard", stop)
        assert run(root, out) == 130


def test_an_interrupted_call_goes_on_whatever_else_came_meanwhile(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, {"a/1.txt": b"x"})
    interrupted(root, tmp_path / "o", monkeypatch)
    write(root, {"a/2.txt": b"x"})
    assert run(root, tmp_path / "o") == 0
    assert set(told(tmp_path / "o" / "train")) == {"a/1.txt", "a/2.txt"}


def unreadable(root: Path) -> list[str]:
    """Files that nobody can read, whoever they are."""
    (root / "a" / "gone.jpg").symlink_to(root / "nowhere")
    (root / "a" / "circle.png").symlink_to(root / "a" / "circle.png")
    (root / "b" / "below.jpg").symlink_to(root / "b" / "1.jpg" / "x.jpg")
    (root / "b" / "long").symlink_to("n" * 300)
    os.mkfifo(root / "b" / "pipe.jpg")
    (root / "class").symlink_to("nowhere")
    return ["a/circle.png", "a/gone.jpg", "b/below.jpg", "b/long", "b/pipe.jpg"]


@pytest.mark.parametrize("workers", [1, 2])
def test_what_cannot_be_read_is_refused_or_skipped_and_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    names = unreadable(root)
    assert run(root, tmp_path / "o", "--workers", workers) == 2
    assert ": cannot be read (" in (message := refusal(capsys))
    assert "--on-bad skip" in message
    assert not (tmp_path / "o").exists()
    assert run(root, tmp_path / "s", "--on-bad", "skip", "--workers", workers) == 0
    records = told(tmp_path / "s" / "train")
    gone = "cannot be read (No such file or directory)"
    assert records.pop("class") == ("left out", gone)
    assert sorted(records) == names
    assert {decision for decision, _ in records.values()} == {"rejected"}
    assert records["a/gone.jpg"][1] == "cannot be read (No such file or directory)"
    assert records["a/circle.png"][1].startswith("cannot be read (Too many levels of symbolic")
    assert records["b/below.jpg"][1] == "cannot be read (Not a directory)"
    assert records["b/long"][1] == "cannot be read (File name too long)"
    assert stored(tmp_path / "s" / "train") == sorted(jpeg(n) for n in range(6))


def test_a_folder_called_like_an_image_is_a_folder(root: Path, tmp_path: Path) -> None:
    (root / "a" / "x.jpg").mkdir()
    write(root, {"b/y.png/deep.jpg": jpeg(40)})
    assert run(root, tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").samples == 7
    assert told(tmp_path / "o" / "train") == {"a/x.jpg/": ("left out", "an empty folder")}


def vanishing(monkeypatch: pytest.MonkeyPatch, victim: Path, good: int) -> None:
    """After so many reads a file is gone."""
    from data_prep.sources import imagefolder

    genuine, reads = imagefolder.read_regular_file, []

    def read(path: Path, limit: int) -> bytes:
        if path == victim:
            reads.append(path)
            if len(reads) > good:
                victim.unlink(missing_ok=True)
        return genuine(path, limit)

    monkeypatch.setattr(imagefolder, "read_regular_file", read)


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("number", [0, 3, 4])
def test_a_file_that_vanishes_at_any_time_is_skipped_and_leaves_a_whole_dataset(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int, number: int
) -> None:
    """Before it was looked at, or between that and its writing."""
    victim = root / "ab"[number % 2] / f"{number}.jpg"
    vanishing(monkeypatch, victim, good)
    assert run(root, tmp_path / "o", "--on-bad", "skip", "--shard-size", 2) == 0
    want = sorted(jpeg(n) for n in range(6) if n != number)
    assert stored(tmp_path / "o" / "train") == want
    assert Dataset.open(tmp_path / "o" / "train").shard_sizes.tolist() == [2, 2, 1]
    gone = ("rejected", "cannot be read (No such file or directory)")
    assert told(tmp_path / "o" / "train") == {f"{'ab'[number % 2]}/{number}.jpg": gone}
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_what_is_made_anew_leaves_both_files_of_each_shard_before_it_and_no_other(
    tmp_path: Path,
) -> None:
    notes = tmp_path / NOTES_FOLDER_NAME
    notes.mkdir()
    for number in range(4):
        for suffix in ("tar", "idx.npy"):
            (tmp_path / f"shard-{number:06d}.{suffix}").touch()
        (notes / f"shard-{number:06d}.json").touch()
    change_recipe(tmp_path, {}, SplitDecisions(np.arange(0), {}), 2)
    names = sorted(path.name for path in tmp_path.glob("**/shard-*"))
    assert names == [f"shard-00000{n}.{s}" for n in range(2) for s in ("idx.npy", "json", "tar")]


def test_a_tar_that_vanishes_takes_all_of_its_images_along_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at them and writing."""
    for name, first in (("a", 0), ("b", 20)):
        pairs = [((f"{n}.jpg", jpeg(first + n)), (f"{n}.cls", b"1")) for n in range(9)]
        path = tmp_path / "raw" / f"{name}.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(packed([file for pair in pairs for file in pair]))
    genuine, tasks = dataset_builder.write_shard, []

    def write_shard(task: ShardWriteTask) -> Iterator[int]:
        (tmp_path / "raw" / "a.tar").unlink(missing_ok=len(tasks) > 0)
        tasks.append(task)
        return genuine(task)

    monkeypatch.setattr(dataset_builder, "write_shard", write_shard)
    out = tmp_path / "o"
    arguments = ["webdataset", "--root", str(tmp_path / "raw"), "--out", str(out)]
    options = ["--workers", "1", "--shard-size", "4", "--on-bad", "skip"]
    assert shard.main([*arguments, *options]) == 0
    assert stored(out / "train") == sorted(jpeg(20 + n) for n in range(9))
    assert sorted(told(out / "train")) == [f"a.tar/{n}.jpg" for n in range(9)]
    assert verify.main([str(out), "--workers", "1"]) == 0
    assert len(tasks) < 9


def test_the_error_of_what_vanished_comes_whole_out_of_another_process() -> None:
    error = UnreadableSampleError("a.jpg: gone")
    error.flaws = {3: "gone"}
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.flaws) == ("a.jpg: gone", {3: "gone"})


def test_a_file_that_vanishes_is_an_error_where_nothing_is_skipped(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vanishing(monkeypatch, root / "a" / "2.jpg", 1)
    assert run(root, tmp_path / "o") == 2
    assert "a/2.jpg: cannot be read (No such file or directory)" in refusal(capsys)
    assert not list(tmp_path.rglob("manifest.json"))


def test_listing_opens_no_file_that_is_called_a_picture(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million images are not read twice."""
    from data_prep.sources import class_folders

    write(root, {"a/x.txt": b"", "a/y": jpeg(3)})
    opened: list[str] = []
    genuine = class_folders.first_bytes

    def count(path: str | Path, size: int) -> bytes:
        opened.append(Path(path).name)
        return genuine(path, size)

    monkeypatch.setattr(class_folders, "first_bytes", count)
    assert [name for name, _ in walk_class_folder(root, "a", skip_unreadable=False).images] == [
        "a/0.jpg", "a/2.jpg", "a/4.jpg", "a/y",
    ]  # fmt: skip
    assert sorted(opened) == ["x.txt", "y"]


@pytest.mark.parametrize(
    ("train", "name"),
    [("train", "validation"), ("train", "Val"), ("Training", "valid"), ("train", "dev"),
     ("TRAIN", "VALIDATION"), ("training", "Eval")],
)  # fmt: skip
def test_the_second_split_goes_by_many_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], train: str, name: str
) -> None:
    root = write(tmp_path / "raw", photos(train, 4) | photos(name, 2, 100) | {"list.csv": b"a,b"})
    assert run(root, tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["train", "val"]
    assert stored(tmp_path / "o" / "val") == sorted(jpeg(100 + n) for n in range(2))
    assert read_manifest(tmp_path / "o" / "val").split == "val"
    assert "/train: 4 samples" in (message := capsys.readouterr().out)
    assert "left out: 1 .csv" in message
    assert told(tmp_path / "o" / "train")["../list.csv"][1] == "lies beside the splits"


@pytest.mark.parametrize("name", ["test", "Testing"])
def test_a_third_split_is_test_and_a_second_one_serves_as_val(tmp_path: Path, name: str) -> None:
    root = write(tmp_path / "raw", photos("train", 4) | photos(name, 2, 100))
    other = write(tmp_path / "other", photos("train", 4) | photos("val", 2, 100))
    assert run(other, tmp_path / "none", "--split", "test") == 2  # a val is no test
    assert not (tmp_path / "none" / "val").exists()
    assert run(root, tmp_path / "two", "--split", "test") == 0
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["val"]
    write(root, photos("dev", 2, 200))
    assert run(root, tmp_path / "three") == 0
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == ["test", "train", "val"]
    assert stored(tmp_path / "three" / "test") == stored(tmp_path / "two" / "val")
    assert Dataset.open(tmp_path / "three" / "test").classes == ("a", "b")
    assert verify.main([str(tmp_path / "three"), "--workers", "1"]) == 0
    assert run(root, tmp_path / "one", "--split", "test") == 0
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["test"]
    assert run(root, tmp_path / "three") == 0


@pytest.mark.parametrize(
    ("one", "other"), [("val", "dev"), ("Train", "train"), ("test", "testing"), ("eval", "Valid")]
)
def test_two_folders_of_one_split_are_both_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], one: str, other: str
) -> None:
    root = write(tmp_path / "raw", photos("train", 4) | photos(one, 2, 8) | photos(other, 2, 16))
    assert run(root, tmp_path / "o") == 2
    message = refusal(capsys)
    assert f"{min(one, other)} and {max(one, other)} are both a split " in message
    assert not (tmp_path / "o").exists()


def test_a_link_from_one_name_of_a_split_to_another_is_no_second_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "raw", photos("train", 4) | photos("validation", 2, 100))
    for name in ("val", "test"):
        (root / name).symlink_to("validation")
    (root / "Train").symlink_to("train")
    assert run(root, tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["train", "val"]
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("flat", ["test/1.jpg", "test/images/1.jpg"])
def test_a_test_split_without_classes_is_left_out_unless_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flat: str
) -> None:
    files = photos("train", 4) | photos("val", 2, 100) | {flat: jpeg(300)}
    root = write(tmp_path / "raw", files)
    assert run(root, tmp_path / "o") == 0
    assert "left out: 1 folder" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["train", "val"]
    assert run(root, tmp_path / "p", "--split", "test") == 2
    assert "raw/test" in refusal(capsys)


def test_a_class_may_be_called_training(tmp_path: Path) -> None:
    files = {f"{name}/{n}.jpg": jpeg(n) for n, name in enumerate(("training", "resting") * 2)}
    assert run(write(tmp_path / "raw", files), tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").classes == ("resting", "training")


def test_a_folder_with_the_name_of_a_split_and_no_pictures_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "raw", photos("train", 4) | {"eval/scores.json": b"{}"})
    assert run(root, tmp_path / "o") == 0
    assert "left out: 1 folder" in capsys.readouterr().out
    write(root, {"eval/1.jpg": jpeg(50)})
    assert run(root, tmp_path / "p") == 2
    assert "raw/eval: no class folders in it" in refusal(capsys)


def test_an_image_in_train_and_test_is_a_leak(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = photos("train", 4) | photos("val", 2, 100) | photos("test", 2, 200)
    root = write(tmp_path / "raw", files | {"test/a/leak.jpg": jpeg(2)})
    assert run(root, tmp_path / "o") == 2
    assert "a/2.jpg: is in train and in test (1 such images): --dedup drops them" in refusal(capsys)
    assert run(root, tmp_path / "p", "--dedup") == 0
    assert Dataset.open(tmp_path / "p" / "train").samples == 3
    assert Dataset.open(tmp_path / "p" / "test").samples == 3
    reason = ("dropped", "the same bytes as an image of test")
    assert told(tmp_path / "p" / "train") == {"a/2.jpg": reason}
    assert run(root, tmp_path / "q", "--split", "train") == 0
    assert run(root, tmp_path / "q", "--split", "test") == 2
    assert "is in test and in a training split" in refusal(capsys)


@pytest.mark.parametrize("name", ["val", "Validation", "testing"])
def test_a_split_that_cannot_be_reached_is_refused_or_skipped_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """As where the disk that a link leads to is not mounted."""
    root = write(tmp_path / "raw", photos("train", 4))
    (root / name).symlink_to("nowhere")
    assert run(root, tmp_path / "o") == 2
    assert f"raw/{name}: cannot be read (No such file or directory): repair" in refusal(capsys)
    assert run(root, tmp_path / "o", "--on-bad", "skip") == 0
    gone = ("left out", "cannot be read (No such file or directory)")
    assert told(tmp_path / "o" / "train") == {f"../{name}": gone}
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["train"]


def test_without_a_split_to_train_on_classes_may_be_called_like_several_of_one(
    tmp_path: Path,
) -> None:
    names = ("cat", "dev", "eval", "test", "testing", "val")
    root = write(tmp_path / "raw", {f"{name}/{name}.jpg": jpeg(n) for n, name in enumerate(names)})
    assert run(root, tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").classes == names
    (root / "cat" / "cat.jpg").unlink()
    (root / "cat").rmdir()
    assert run(root, tmp_path / "p") == 0
    assert Dataset.open(tmp_path / "p" / "train").classes == names[1:]


def test_splits_without_class_folders_are_not_taken_for_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "raw", {"Training/1.jpg": jpeg(1), "Validation/2.jpg": jpeg(2)})
    assert run(root, tmp_path / "o") == 2
    assert "raw/Training: no class folders in it" in refusal(capsys)


def test_splits_that_lie_one_folder_deeper_are_not_taken_for_one_class(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw", photos("Images/Train", 4) | photos("Images/Val", 2, 50))
    assert run(tmp_path / "raw", tmp_path / "o") == 2
    message = refusal(capsys)
    assert (
        f"its only folder Images holds the splits: give {tmp_path}/raw/Images as --root" in message
    )
    assert run(tmp_path / "raw" / "Images", tmp_path / "o") == 0


def test_a_folder_of_other_files_is_no_class_and_its_files_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = photos("train", 4) | photos("val", 2, 50)
    for top in ("train", "val"):
        names = ("boxes/1.xml", "boxes/deep/2.xml", "__MACOSX/a/._0.jpg", "__MACOSX/._a")
        files |= {f"{top}/{name}": b"\0\5\16\7" for name in names}
    root = write(tmp_path / "raw", files | {"val/b/1.jpg": b"words"})
    (root / "val" / "b" / "1.jpg").rename(root / "val" / "b" / "1.txt")
    assert run(root, tmp_path / "o") == 0
    message = capsys.readouterr().out.splitlines()
    assert message[0].endswith("left out: 2 .xml, 2 hidden")
    assert message[1].endswith("left out: 2 .xml, 2 hidden, 1 .txt")
    assert Dataset.open(tmp_path / "o" / "train").classes == ("a", "b")
    assert stored(tmp_path / "o" / "val") == [jpeg(50)]
    records = told(tmp_path / "o" / "train")
    assert records["boxes/deep/2.xml"] == ("left out", "no picture")
    assert records["__MACOSX/a/._0.jpg"] == ("left out", "a hidden file")
    write(root, {"train/boxes/1.jpg": b""})
    assert run(root, tmp_path / "p") == 2
    assert "boxes/1.jpg: not a readable image (empty file)" in refusal(capsys)
