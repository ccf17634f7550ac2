"""ImageNet's official archives are read in place, and give what the unpacked folders give."""

from __future__ import annotations

import filecmp
import gzip
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from data_prep import shard, verify
from data_prep.sources.devkit import read_devkit
from tests.support.archives import (
    SYNSETS,
    devkit_files,
    jpeg,
    packed,
    train_files,
    val_files,
    write_devkit,
    write_imagenet,
    write_unpacked,
)
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset

CLASSES = Path(shard.__file__).parent / "sources" / "imagenet100.txt"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_imagenet(tmp_path / "raw")


run = partial(sharded, "imagenet")


def contents(folder: Path) -> list[tuple[str, bytes]]:
    """Class and bytes of every sample."""
    dataset = Dataset.open(folder)
    samples = dataset.read_checked(np.arange(dataset.samples))
    names = [dataset.classes[label] for label in samples.label]
    return sorted(zip(names, (image.tobytes() for image in samples.data), strict=True))


def same(left: Path, right: Path) -> bool:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    return filecmp.cmpfiles(left, right, names, shallow=False)[0] == names


def test_every_image_arrives_under_its_class_and_nothing_is_unpacked(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(root.rglob("*"))
    assert run(root, tmp_path / "o") == 0
    want = [(synset, data) for synset, files in train_files(5).items() for data in files.values()]
    assert contents(tmp_path / "o" / "train") == sorted(want)
    assert contents(tmp_path / "o" / "val") == sorted(val_files(8).values())
    assert Dataset.open(tmp_path / "o" / "val").classes == SYNSETS
    assert sorted(root.rglob("*")) == before
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_archives_folders_and_any_mixture_of_them_give_the_same_bytes(tmp_path: Path) -> None:
    archives = write_imagenet(tmp_path / "archives")
    folders = write_unpacked(tmp_path / "elsewhere" / "folders")
    mixture = write_unpacked(tmp_path / "mixture")
    (mixture / "train").rename(tmp_path / "gone")
    (mixture / "ILSVRC2012_img_train.tar").write_bytes(
        (archives / "ILSVRC2012_img_train.tar").read_bytes()
    )
    for number, root in enumerate((archives, folders, mixture)):
        assert run(root, tmp_path / f"o{number}", "--workers", 1 + number % 2) == 0
    for number in (1, 2):
        for split in ("train", "val"):
            assert same(tmp_path / "o0" / split, tmp_path / f"o{number}" / split)


def test_without_a_devkit_train_works_and_val_says_what_it_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_imagenet(tmp_path / "raw", devkit=False)
    assert run(root, tmp_path / "o", "--split", "train") == 0
    assert Dataset.open(tmp_path / "o" / "train").classes == SYNSETS
    for options in (("--split", "val"), ()):
        capsys.readouterr()
        assert run(root, tmp_path / "o", *options) == 2
        message = refusal(capsys)
        assert "ILSVRC2012_img_val.tar: its labels are in ILSVRC2012_devkit_t12.tar.gz" in message
        assert "a folder val of class folders" in message
    (root / "ILSVRC2012_img_val.tar").unlink()
    assert run(root, tmp_path / "o2") == 0
    assert run(root / "ILSVRC2012_img_train.tar", tmp_path / "o3") == 0
    assert same(tmp_path / "o2" / "train", tmp_path / "o3" / "train")


def test_the_validation_archive_needs_the_devkit_only(root: Path, tmp_path: Path) -> None:
    assert run(root, tmp_path / "both") == 0
    (root / "ILSVRC2012_img_train.tar").unlink()
    assert run(root, tmp_path / "alone", "--split", "val") == 0
    assert same(tmp_path / "both" / "val", tmp_path / "alone" / "val")


def test_an_unpacked_devkit_is_the_packed_one(root: Path) -> None:
    kit = read_devkit(root)
    (root / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert read_devkit(root) is None
    for name, data in devkit_files(val_files(8)).items():
        path = root / "ILSVRC2012_devkit_t12" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    assert read_devkit(root) == kit
    assert kit is not None
    assert kit.classes == SYNSETS
    assert list(kit.validation_synsets) == [synset for synset, _ in val_files(8).values()]


def test_a_class_list_selects_whatever_its_order(root: Path, tmp_path: Path) -> None:
    lists = ("n07753592\nn02102040\n", "# two\n n02102040 a word\n\nn07753592 # banana\n")
    for number, text in enumerate(lists):
        (tmp_path / "list.txt").write_text(text)
        assert run(root, tmp_path / f"o{number}", "--classes", tmp_path / "list.txt") == 0
    for split in ("train", "val"):
        assert same(tmp_path / "o0" / split, tmp_path / "o1" / split)
    train, val = (Dataset.open(tmp_path / "o0" / split) for split in ("train", "val"))
    assert train.classes == val.classes == ("n02102040", "n07753592")
    assert train.samples == 10
    want = [pair for pair in val_files(8).values() if pair[0] in train.classes]
    assert contents(tmp_path / "o0" / "val") == sorted(want)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"n02102040\nn99999999\n", "list.txt: line 2: n99999999 is none of the 4 classes"),
        (b"n02102040\nn02102040\n", "list.txt: line 2: n02102040 is listed twice"),
        (b"# nothing\n", "list.txt: lists no class"),
        (b"\xff\xfe\x00", "list.txt: cannot be read (not a text file)"),
        (None, "list.txt: cannot be read (No such file or directory)"),
    ],
)
def test_a_bad_class_list_is_one_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: bytes | None,
    message: str,
) -> None:
    if text is not None:
        (tmp_path / "list.txt").write_bytes(text)
    assert run(root, tmp_path / "o", "--classes", tmp_path / "list.txt") == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "o").exists()


def test_the_shipped_imagenet_100_list_has_100_synsets() -> None:
    lines = [line for line in CLASSES.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines)) == 100
    assert all(len(line) == 9 and line[0] == "n" and line[1:].isdigit() for line in lines)


def inner(**changes: bytes) -> bytes:
    """The training archive with other contents for some of its archives."""
    return packed(
        (f"{synset}.tar", changes.get(synset, packed(files.items())))
        for synset, files in train_files(3).items()
    )


def whole() -> bytes:
    return packed(train_files(3)[SYNSETS[1]].items())


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (lambda: b"", "damaged archive"),
        (lambda: b"<html>not found</html>" * 100, "damaged archive"),
        (lambda: inner()[:-30_000], "damaged archive"),
        (lambda: inner()[: len(inner()) // 2], "damaged archive"),
        (lambda: inner(n02102040=whole()[:1024]), "damaged archive"),
        (lambda: inner(n02102040=b""), "damaged archive"),
        (lambda: inner(n02102040=packed([])), "n02102040.tar: no image in this class archive"),
        (lambda: inner(n02102040=packed([("a.txt", b"")])), "no image in this class archive"),
        (lambda: inner(n02102040=packed([("a.JPEG", b"x")] * 2)), "a.JPEG is in it twice"),
        (lambda: packed([("README", b"x")]), "README: is no archive of a synset"),
        (lambda: packed([("n00000001.tar", whole())] * 2), "n00000001.tar: is in it twice"),
        (lambda: packed([]), "an empty archive"),
    ],
)
def test_a_damaged_or_foreign_training_archive_is_one_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    blob: Callable[[], bytes],
    message: str,
) -> None:
    archive = root / "ILSVRC2012_img_train.tar"
    archive.write_bytes(blob())
    code = run(root, tmp_path / "o", "--split", "train")
    line = refusal(capsys)
    assert (code, line.startswith(f"{archive}: "), message in line) == (2, True, True), line
    assert not (tmp_path / "o").exists()


def test_a_changed_header_anywhere_in_the_archive_never_loses_images_silently(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = root / "ILSVRC2012_img_train.tar"
    blob = archive.read_bytes()
    want = contents_after(root, tmp_path / "o")
    headers = [at for at in range(0, len(blob), 512) if blob[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == len(SYNSETS) * 6
    for number, at in enumerate(headers):
        hurt = at + (number * 61) % 500
        archive.write_bytes(blob[:hurt] + bytes([blob[hurt] ^ 0x10]) + blob[hurt + 1 :])
        out = tmp_path / f"o{number}"
        code = run(root, out, "--split", "train")
        capsys.readouterr()
        assert code == 2 or contents(out / "train") == want


def contents_after(root: Path, out: Path) -> list[tuple[str, bytes]]:
    assert run(root, out, "--split", "train") == 0
    return contents(out / "train")


def cut_gzip(root: Path) -> None:
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(path.read_bytes()[:-50])


def no_truth(root: Path) -> None:
    files = devkit_files(val_files(8))
    write_devkit(root, {name: data for name, data in files.items() if name.endswith(".mat")})


def bad_truth(root: Path) -> None:
    files = devkit_files(val_files(8))
    write_devkit(
        root, {name: data if name.endswith(".mat") else b"1\nx\n" for name, data in files.items()}
    )


def unknown_number(root: Path) -> None:
    files = devkit_files(val_files(8))
    write_devkit(
        root, {name: data if name.endswith(".mat") else b"99\n" * 8 for name, data in files.items()}
    )


def bad_meta(root: Path) -> None:
    files = devkit_files(val_files(8))
    write_devkit(
        root, {name: data[:300] if name.endswith(".mat") else data for name, data in files.items()}
    )


def short_truth(root: Path) -> None:
    files = devkit_files(val_files(5))
    write_devkit(root, files)


def bomb(root: Path) -> None:
    path = root / "ILSVRC2012_devkit_t12.tar.gz"
    path.write_bytes(
        gzip.compress(packed([("ILSVRC2012_devkit_t12/data/meta.mat", bytes(1 << 27))]))
    )


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (cut_gzip, "damaged archive"),
        (no_truth, "has no data/ILSVRC2012_validation_ground_truth.txt"),
        (bad_truth, "ground_truth.txt: "),
        (unknown_number, "99 is no class of"),
        (bad_meta, "data/meta.mat: damaged"),
        (short_truth, "ILSVRC2012_val_00000006.JPEG: none of the 5 images"),
        (bomb, "has no data/meta.mat"),
    ],
)
def test_a_damaged_devkit_is_one_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    harm: Callable[[Path], None],
    message: str,
) -> None:
    harm(root)
    assert run(root, tmp_path / "o") == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "o").exists()


def test_a_bad_image_within_the_archives_is_named_with_its_place(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [("n02102040_1.JPEG", jpeg(3)[:200]), ("n02102040_2.JPEG", jpeg(3))]
    (root / "ILSVRC2012_img_train.tar").write_bytes(inner(n02102040=packed(files)))
    assert run(root, tmp_path / "o", "--split", "train") == 2
    message = refusal(capsys)
    assert "ILSVRC2012_img_train.tar/n02102040/n02102040_1.JPEG: not a readable image" in message
    assert run(root, tmp_path / "o", "--split", "train", "--on-bad", "skip") == 0
    assert Dataset.open(tmp_path / "o" / "train").samples == 3 * 3 + 1


def test_what_is_no_picture_in_an_archive_is_left_out_and_listed(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the leaves of another system."""
    assert run(root, tmp_path / "plain") == 0
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"):
        other_members = packed([("README.txt", b"words"), (f"._{name}", b"\0\5\x16\7")])
        (root / name).write_bytes(other_members + (root / name).read_bytes())
    capsys.readouterr()
    assert run(root, tmp_path / "o") == 0
    assert capsys.readouterr().out.count("left out: 1 .txt, 1 hidden") == 2
    for split in ("train", "val"):
        shards = [
            folder / split / "shard-000000.tar" for folder in (tmp_path / "plain", tmp_path / "o")
        ]
        assert shards[0].read_bytes() == shards[1].read_bytes()
    with (root / "ILSVRC2012_img_val.tar").open("ab") as file:
        file.write(packed([("odd", val_files(1).popitem()[1][1])]))
    assert run(root, tmp_path / "p") == 2
    assert "odd: none of the 8 images that ILSVRC2012_devkit" in refusal(capsys)


def test_an_empty_root_says_what_it_should_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, tmp_path / "o") == 2
    assert "ILSVRC2012_img_train.tar" in refusal(capsys)


@pytest.mark.parametrize("inside", [True, False])
def test_every_byte_behind_an_end_is_accounted_for(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], inside: bool
) -> None:
    archive = root / "ILSVRC2012_img_train.tar"
    extra = packed([("more.JPEG", jpeg(70)), ("words.txt", b"x"), ("lone", jpeg(71))])
    if inside:
        archive.write_bytes(inner(n02102040=whole() + extra))
        count = 4 * 3 + 2
    else:
        archive.write_bytes(inner() + packed([("n09999999.tar", extra)]))
        count = 4 * 3 + 2
    (root / "list.csv").write_text("a")
    assert run(root, tmp_path / "o", "--split", "train") == 0
    assert Dataset.open(tmp_path / "o" / "train").samples == count
    assert "left out: 1 .csv, 1 .txt" in capsys.readouterr().out
    archive.write_bytes(inner(n02102040=whole() + b"words") if inside else inner() + b"words")
    assert run(root, tmp_path / "p", "--split", "train") == 2
    assert "is no archive" in refusal(capsys)


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "validation")])
def test_its_folders_go_by_other_names_as_well(tmp_path: Path, train: str, val: str) -> None:
    root = write_unpacked(tmp_path / "raw")
    assert run(root, tmp_path / "o0") == 0
    (root / "train").rename(root / train)
    (root / "val").rename(root / val)
    assert run(root, tmp_path / "o1") == 0
    for split in ("train", "val"):
        assert same(tmp_path / "o0" / split, tmp_path / "o1" / split)
