"""Any WebDataset comes out with the samples that the webdataset library finds in it."""

from __future__ import annotations

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import shard, verify
from tests.support.archives import jpeg, packed
from tests.support.photos import tiny_dataset
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset

run = partial(sharded, "webdataset")


def contents(folder: Path) -> list[tuple[bytes, int]]:
    dataset = Dataset.open(folder)
    samples = dataset.read_checked(np.arange(dataset.samples))
    return sorted(
        zip((image.tobytes() for image in samples.data), samples.label.tolist(), strict=True)
    )


def write(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(files))
    return path


def sample(key: str, number: int, suffix: str = "jpg") -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", jpeg(number)), (f"{key}.cls", b"%d" % (number % 5))]


def test_samples_and_labels_are_those_that_the_library_reads(tmp_path: Path) -> None:
    for name in ("b", "a"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            for number in range(7):
                at = number + (7 if name == "b" else 0)
                writer.write({"__key__": f"deep/{at:04d}", "jpg": jpeg(at), "cls": at % 3})
    assert run(tmp_path, tmp_path / "o", "--shard-size", 4) == 0
    urls = [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    library = webdataset.WebDataset(urls, shardshuffle=False)
    want = sorted((sample_record["jpg"], int(sample_record["cls"])) for sample_record in library)
    assert contents(tmp_path / "o" / "train") == want
    assert Dataset.open(tmp_path / "o" / "train").classes == ("0", "1", "2")
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


def test_our_own_shards_can_be_sharded_anew_and_keep_their_class_names(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 500)):
        tiny_dataset(tmp_path / "old", samples=30, split=split, suffix="jpg", first=first)
    assert run(tmp_path / "old", tmp_path / "o", "--shard-size", 7) == 0
    for split in ("train", "val"):
        old, new = (Dataset.open(tmp_path / folder / split) for folder in ("old", "o"))
        assert contents(old.folder) == contents(new.folder)
        assert old.classes == new.classes
        assert max(new.shard_sizes) == 7


def test_a_tar_a_folder_and_a_pattern_are_the_same_root(tmp_path: Path) -> None:
    files = [file for number in range(4) for file in sample(f"{number}", number)]
    path = write(tmp_path / "raw" / "only.tar", files)
    for number, root in enumerate((path, path.parent, f"{path.parent}/on*.tar")):
        assert run(root, tmp_path / f"o{number}") == 0
    fingerprints = {Dataset.open(tmp_path / f"o{n}" / "train").fingerprint for n in range(3)}
    assert len(fingerprints) == 1
    assert run(path, tmp_path / "v", "--split", "val") == 0
    assert [folder.name for folder in (tmp_path / "v").iterdir()] == ["val"]


def test_extensions_labels_and_names_of_every_kind_are_understood(tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(jpeg(0)))
    forms: dict[str, bytes] = {}
    for suffix in ("PNG", "WEBP", "BMP", "TIFF", "GIF"):
        stream = io.BytesIO()
        image.save(stream, suffix)
        forms[suffix] = stream.getvalue()
    forms |= {"JPG": jpeg(1), "Jpeg": jpeg(2)}
    files: list[tuple[str, bytes]] = []
    for number, (suffix, data) in enumerate(forms.items()):
        key = "写真/" + "k" * 200 + str(number)
        label = json.dumps({"label": ["cat", "dog"][number % 2], "caption": "x"}).encode()
        files += [(f"{key}.{suffix}", data), (f"{key}.json", label), (f"{key}.txt", b"words")]
    write(tmp_path / "a.tar", files)
    assert run(tmp_path, tmp_path / "o") == 0
    dataset = Dataset.open(tmp_path / "o" / "train")
    assert (dataset.samples, dataset.classes) == (7, ("cat", "dog"))
    assert sorted(label for _, label in contents(dataset.folder)) == [0, 0, 0, 0, 1, 1, 1]


def test_without_labels_all_are_unlabelled(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [("1.jpg", jpeg(1)), ("2.jpg", jpeg(2)), ("2.json", b"{}")])
    assert run(tmp_path, tmp_path / "o") == 0
    dataset = Dataset.open(tmp_path / "o" / "train")
    assert dataset.classes == ()
    assert dataset.read_checked(np.arange(2)).label.tolist() == [-1, -1]
    assert verify.main([str(tmp_path / "o")]) == 0


A, B = sample("a", 1), sample("b", 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([*A, *B, *A], "the members of 'a' do not lie together, or it is there twice"),
        ([A[0], *B, A[1]], "the members of 'a' do not lie together"),
        ([*A, *A], "'a' has two members of one kind"),
        ([A[0], ("a.JPG", jpeg(3))], "'a' has two members of one kind"),
        ([*A, ("a.png", jpeg(3))], "'a' has more than one image (a.jpg and a.png)"),
        ([*A, ("b.jpg", jpeg(3))], "some samples have a label that others lack"),
        ([*A, ("b.jpg", jpeg(3)), ("b.cls", b"cat")], "numbers and names are mixed"),
        ([A[0], ("a.cls", b"")], "the label of 'a' cannot be read (it is empty)"),
        ([A[0], ("a.cls", b"\xff\xfe")], "the label of 'a' cannot be read"),
        ([A[0], ("a.cls", b"-3")], "a.tar/a.jpg: the label is -3"),
        ([A[0], ("a.json", b"{")], "the label of 'a' cannot be read"),
        ([A[0], ("a.json", b'{"label": [3]}')], "[3] is neither a whole number nor a name"),
        ([A[0], ("a.json", b'{"label": {}}')], "{} is neither a whole number nor a name"),
        ([A[0], ("a.json", b'{"cls": true}')], "True is neither a whole number nor a name"),
        ([A[0], ("a.json", b'{"class": 3.5}')], "3.5 is neither a whole number nor a name"),
        ([A[0], ("a.json", b'{"label": NaN}')], "nan is neither a whole number nor a name"),
        ([*A, B[0], ("b.cls", b"10020")], "a.tar/b.jpg: the label is 10020, but only 2 samples"),
        ([*A, B[0], ("b.cls", b"999999999")], "number the classes from 0 on, or give names"),
        ([("a\nc/b.jpg", jpeg(1))], "a name that leads out of its folder or cannot be printed"),
        ([A[0], ("a.json", b"[" * 100_000)], "the label of 'a' cannot be read"),
        ([("README", b"")], "no sample in it"),
        ([("a.txt", b"words")], "a.tar/a: a sample without an image"),
        ([("../a.jpg", jpeg(1))], "a.tar/../a.jpg: a name that leads out of its folder"),
        ([("/a.jpg", jpeg(1))], "a name that leads out of its folder"),
    ],
)
def test_samples_that_are_not_whole_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], files: list[tuple[str, bytes]], message: str
) -> None:
    write(tmp_path / "raw" / "a.tar", files)
    assert run(tmp_path / "raw", tmp_path / "o") == 2
    assert message in refusal(capsys)
    assert not list(tmp_path.rglob("manifest.json"))
    assert sorted((tmp_path / "raw").iterdir()) == [tmp_path / "raw" / "a.tar"]


def test_odd_members_are_left_out_and_listed_where_that_is_wanted(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    path = tmp_path / "raw" / "a.tar"
    path.parent.mkdir()
    path.write_bytes(packed([("a.jpg", jpeg(1)), (link, b""), ("../x.jpg", jpeg(2))]))
    assert run(path, tmp_path / "o", "--on-bad", "skip") == 0
    assert Dataset.open(tmp_path / "o" / "train").samples == 1
    lines = (tmp_path / "o" / "train" / "rejects.jsonl").read_text().splitlines()
    reasons = {record["file"]: record["reason"] for record in map(json.loads, lines)}
    assert reasons == {
        "a.tar/link.jpg": "a symbolic link and not a regular member",
        "a.tar/../x.jpg": "a name that leads out of its folder or cannot be printed",
    }


def test_a_root_without_tars_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for root in (tmp_path, tmp_path / "none", f"{tmp_path}/*.tar"):
        assert run(root, tmp_path / "o") == 2
        assert "no .tar in it" in refusal(capsys)
    assert shard.main(["webdataset", "--out", str(tmp_path / "o")]) == 2
    assert "--root is required" in refusal(capsys)
    write(tmp_path / "train" / "a.tar", A)
    assert run(tmp_path, tmp_path / "o", "--split", "val") == 2
    assert "no folder val or test with tars" in refusal(capsys)


def labelled(names: list[str], first: int) -> list[tuple[str, bytes]]:
    """Samples whose classes have names."""
    pairs = [
        [(f"{n}.jpg", jpeg(first + n)), (f"{n}.cls", name.encode())] for n, name in enumerate(names)
    ]
    return [file for pair in pairs for file in pair]


def test_named_classes_are_the_same_whichever_split_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "train" / "a.tar", labelled(["ant", "bee", "cat"], 0))
    write(tmp_path / "raw" / "val" / "a.tar", labelled(["cat", "bee", "dog"], 100))
    assert run(tmp_path / "raw", tmp_path / "both") == 0
    for split in ("train", "val"):
        assert run(tmp_path / "raw", tmp_path / "one", "--split", split) == 0
        from_both, from_one = (Dataset.open(tmp_path / name / split) for name in ("both", "one"))
        assert from_both.classes == from_one.classes == ("ant", "bee", "cat", "dog")
        assert contents(from_both.folder) == contents(from_one.folder)


def test_a_split_without_labels_does_not_keep_the_other_from_its_own(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "train" / "a.tar", labelled(["ant", "bee"], 0))
    write(tmp_path / "raw" / "test" / "a.tar", [("0.jpg", jpeg(100))])
    for split in ("train", "val"):
        assert run(tmp_path / "raw", tmp_path / "o", "--split", split) == 0
        assert Dataset.open(tmp_path / "o" / split).classes == ("ant", "bee")
    assert [label for _, label in contents(tmp_path / "o" / "val")] == [-1]


def test_labels_may_be_as_large_as_their_number_makes_likely(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "a.tar", [*A, B[0], ("b.cls", b"10019")])
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert len(Dataset.open(tmp_path / "o" / "train").classes) == 10020


def test_a_whole_number_that_json_writes_as_a_float_is_one(tmp_path: Path) -> None:
    texts = (b'{"label": 2.0}', b'{"label": null, "cls": 1}', b'{"class": 0}')
    files = [
        pair
        for number, text in enumerate(texts)
        for pair in ((f"{number}.jpg", jpeg(number)), (f"{number}.json", text))
    ]
    write(tmp_path / "raw" / "a.tar", files)
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert sorted(label for _, label in contents(tmp_path / "o" / "train")) == [0, 1, 2]


@pytest.mark.parametrize("text", ['{"shards": ["a.tar"]}', '["a.tar"]', "a.tar 2", ""])
def test_a_manifest_of_another_tool_is_none_of_ours(tmp_path: Path, text: str) -> None:
    write(tmp_path / "raw" / "a.tar", [*A, *B])
    (tmp_path / "raw" / "manifest.json").write_text(text)
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert Dataset.open(tmp_path / "o" / "train").classes == ("0", "1", "2")


def test_a_damaged_manifest_of_ours_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_dataset(tmp_path, samples=10, suffix="jpg")
    whole = (folder / "manifest.json").read_text()
    for harmed in (whole[: len(whole) // 2], whole.replace("vssl-dist/1", "vssl-dist/9")):
        (folder / "manifest.json").write_text(harmed)
        assert run(folder, tmp_path / "o") == 2
        assert "manifest.json: damaged manifest" in refusal(capsys)


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a\nb", "a\nc/b"])
def test_the_label_of_an_image_that_is_left_out_need_not_be_readable(
    tmp_path: Path, name: str
) -> None:
    odd = [(f"{name}.jpg", jpeg(5)), (f"{name}.cls", b"2")]
    write(tmp_path / "raw" / "a.tar", [*A, *odd, *B])
    assert run(tmp_path / "raw", tmp_path / "o", "--on-bad", "skip") == 0
    assert contents(tmp_path / "o" / "train") == sorted([(A[0][1], 1), (B[0][1], 2)])
    (line,) = (tmp_path / "o" / "train" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == f"a.tar/{name}.jpg"


def test_a_pattern_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.tar", A)
    assert run(f"{tmp_path}/**.tar", tmp_path / "o") == 2
    assert "**.tar: not a pattern (" in refusal(capsys)
