"""WebDatasets as others write them: their names of fields and files, and all that lies in them."""

from __future__ import annotations

import gzip
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
from data_prep.sources.tarlist import expand_braces
from tests.support.archives import jpeg, packed
from tests.support.sharding import refusal, sharded
from vssl_dist.data.store.dataset import Dataset

Files = list[tuple[str, bytes]]


run = partial(sharded, "webdataset")


def write(path: Path, files: Files) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed(files))
    return path


def contents(folder: Path) -> list[tuple[bytes, int]]:
    dataset = Dataset.open(folder)
    rows = dataset.read_checked(np.arange(dataset.samples))
    return sorted(zip((image.tobytes() for image in rows.data), rows.label.tolist(), strict=True))


def told(folder: Path) -> dict[str, tuple[str, str]]:
    lines = (folder / "rejects.jsonl").read_text().splitlines()
    return {one["file"]: (one["decision"], one["reason"]) for one in map(json.loads, lines)}


def samples(image: str, label: str, count: int = 4, first: int = 0) -> Files:
    pairs = [
        [(f"{n:04d}.{image}", jpeg(n)), (f"{n:04d}.{label}", b"%d\n" % (n % 3))]
        for n in range(first, first + count)
    ]
    return [file for pair in pairs for file in pair]


def want(count: int = 4, first: int = 0) -> list[tuple[bytes, int]]:
    return sorted((jpeg(n), n % 3) for n in range(first, first + count))


@pytest.mark.parametrize("field", ["image", "img", "jfif", "data", "jpg_large", "image.0", "avif"])
def test_an_image_is_found_by_its_bytes_in_a_field_of_any_name(tmp_path: Path, field: str) -> None:
    write(tmp_path / "raw" / "a.tar", samples(field, "cls"))
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert contents(tmp_path / "o" / "train") == want()


@pytest.mark.parametrize(
    ("field", "option"), [("label", "label"), ("target.txt", "target.txt"), ("Class", "class")]
)
def test_fields_are_named_by_options(tmp_path: Path, field: str, option: str) -> None:
    thumbs = [(f"{n:04d}.jpg", jpeg(900 + n)) for n in range(4)]
    files = sorted([*samples("full.jpg", field), *thumbs])
    write(tmp_path / "raw" / "a.tar", files)
    options = ("--image-field", "full.jpg", "--label-field", option)
    assert run(tmp_path / "raw", tmp_path / "o", *options) == 0
    assert contents(tmp_path / "o" / "train") == want()
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0


@pytest.mark.parametrize(
    ("field", "option", "state"),
    [
        ("json", "json:target", lambda n: {"target": n, "label": 77}),
        ("json", "json:meta.id", lambda n: {"meta": {"id": f"00{n}.0"}}),
        ("info.json", "info.json:y", lambda n: {"y": n}),
        ("txt", "txt:y", lambda n: {"y": float(n)}),
        ("json", "json", lambda n: {"label": n}),
    ],
)
def test_a_label_may_be_anywhere_in_a_json_member(
    tmp_path: Path, field: str, option: str, state: object
) -> None:
    assert callable(state)
    pairs = [
        ((f"{n}.jpg", jpeg(n)), (f"{n}.{field}", json.dumps(state(n % 3)).encode()))
        for n in range(4)
    ]
    write(tmp_path / "raw" / "a.tar", [file for pair in pairs for file in pair])
    assert run(tmp_path / "raw", tmp_path / "o", "--label-field", option) == 0
    assert contents(tmp_path / "o" / "train") == want()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--label-field", "target"), "of '0000' cannot be read (it has no field target, only cls, "
         "jpg, json (--label-field)"),
        (("--label-field", "json:target"), "(it has no target, only caption, id)"),
        (("--image-field", "png"), "0000: a sample without the field png: its fields are cls, jpg, "
         "json (--image-field"),
    ],
)  # fmt: skip
def test_an_error_lists_the_fields_that_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, str], said: str
) -> None:
    about = [(f"{n:04d}.json", b'{"id": 1, "caption": ""}') for n in range(4)]
    write(tmp_path / "raw" / "a.tar", sorted([*samples("jpg", "cls"), *about]))
    for more in ((), ("--on-bad", "skip")):
        assert run(tmp_path / "raw", tmp_path / "o", *options, *more) == 2
        assert said.partition("(")[2] in (line := refusal(capsys))
        assert more or said in line


def test_samples_without_and_with_several_images_list_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "none" / "a.tar", [("1.data", b"words"), ("1.cls", b"1")])
    assert run(tmp_path / "none", tmp_path / "o") == 2
    assert "a.tar/1: a sample without an image: its fields are cls, data" in refusal(capsys)
    write(tmp_path / "two" / "a.tar", [("1.left", jpeg(1)), ("1.right", jpeg(2))])
    assert run(tmp_path / "two", tmp_path / "o") == 2
    assert "more than one image (1.left and 1.right): --image-field says which" in refusal(capsys)
    assert run(tmp_path / "two", tmp_path / "o", "--image-field", "right") == 0
    assert contents(tmp_path / "o" / "train") == [(jpeg(2), -1)]


def test_a_dataset_that_seems_to_have_no_labels_says_what_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw" / "a.tar", samples("jpg", "target"))
    assert run(tmp_path / "raw", tmp_path / "o") == 0
    assert "; no labels: the fields are jpg, target (--label-field" in capsys.readouterr().out


def test_other_options_and_sources_do_not_take_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["imagefolder", "--root", str(tmp_path), "--out", str(tmp_path / "o")]
    assert shard.main([*arguments, "--label-field", "x"]) == 2
    assert "imagefolder has no --label-field" in refusal(capsys)


@pytest.mark.parametrize("form", ["1e3", "0x10", "3.5", "-0", "+1", "\u0661"])
def test_a_label_that_could_be_several_numbers_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    files = [*samples("jpg", "cls"), ("odd.jpg", jpeg(50)), ("odd.cls", form.encode())]
    write(tmp_path / "raw" / "a.tar", files)
    assert run(tmp_path / "raw", tmp_path / "o") == 2
    assert f"a.tar: the label of 'odd' cannot be read ({form!r} could be" in refusal(capsys)
    assert run(tmp_path / "raw", tmp_path / "s", "--on-bad", "skip") == 0
    assert contents(tmp_path / "s" / "train") == want()
    decision, reason = told(tmp_path / "s" / "train")["a.tar/odd.jpg"]
    assert (decision, reason[:27]) == ("rejected", "its label cannot be read ('")


def test_what_is_no_sample_is_counted_and_a_sample_without_its_image_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    others = [("README.md", b"#"), ("LICENSE", b"x"), ("a/.DS_Store", b"x"), ("._0.jpg", b"x")]
    folder = tmp_path / "raw"
    write(folder / "a.tar", [*others, *samples("jpg", "cls")])
    (folder / "index.json").write_text("{}")
    (folder / "a.idx").write_text("")
    (folder / "further.tar").mkdir()
    assert run(folder, tmp_path / "o") == 0
    said = capsys.readouterr().out
    assert "left out: 2 hidden, 1 .idx, 1 .json, 1 .md, 1 folder, 1 without suffix" in said
    assert contents(tmp_path / "o" / "train") == want()
    assert told(tmp_path / "o" / "train")["a.tar/README.md"] == ("left out", "no picture")
    assert verify.main([str(tmp_path / "o"), "--workers", "1"]) == 0
    write(folder / "b.tar", [("lost.cls", b"1"), ("0001", jpeg(70))])
    assert run(folder, tmp_path / "p") == 2
    assert "b.tar/lost: a sample without an image: its fields are cls (" in refusal(capsys)
    assert run(folder, tmp_path / "p", "--on-bad", "skip") == 0
    records = told(tmp_path / "p" / "train")
    assert records["b.tar/0001"] == (
        "rejected",
        "a picture without a field in its name, such as .jpg",
    )
    assert records["b.tar/lost"][0] == "rejected"


def test_an_image_that_is_not_decoded_is_refused_by_its_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.BytesIO()
    Image.open(io.BytesIO(jpeg(3))).save(stream, "AVIF")
    for field in ("avif", "image"):
        files = [*samples("jpg", "cls"), (f"x.{field}", stream.getvalue()), ("x.cls", b"1")]
        write(tmp_path / field / "a.tar", files)
        assert run(tmp_path / field, tmp_path / "o") == 2
        assert f"a.tar/x.{field}: not a readable image (AVIF, which is" in refusal(capsys)


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_compressed_tar_gives_the_bytes_of_a_plain_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    plain = write(tmp_path / "plain" / "a.tar", samples("jpg", "cls", 7))
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert run(plain, tmp_path / "p", "--shard-size", 3) == 0
    for root in (tmp_path / "raw", tmp_path / "raw" / name, tmp_path / "raw" / f"*{name[-3:]}"):
        assert run(root, tmp_path / "o", "--shard-size", 3) == 0
        names = [path.name for path in (tmp_path / "p" / "train").glob("*.tar")]
        assert len(names) == 3
        for one in names:
            after = (tmp_path / "o" / "train" / one).read_bytes()
            assert after == (tmp_path / "p" / "train" / one).read_bytes()
        assert [path.name for path in (tmp_path / "o").iterdir()] == ["train"]
    assert "complete already" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [name]
    library = webdataset.WebDataset(str(tmp_path / "raw" / name), shardshuffle=False)
    assert contents(tmp_path / "o" / "train") == sorted((s["jpg"], int(s["cls"])) for s in library)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda blob: blob[:-30], "damaged archive ("),
        (lambda blob: blob[:400], "damaged archive ("),
        (lambda blob: blob[:-8] + b"\1" + blob[-7:], "damaged archive (CRC check failed"),
        (lambda blob: blob + b"garbage", "damaged archive (Not a gzipped file (b'ga'))"),
        (lambda blob: gzip.compress(b"no tar" * 200), "damaged archive ("),
        (lambda blob: blob + gzip.compress(b"words"), "what follows its end, from byte 20480 on"),
    ],
)
def test_a_damaged_compressed_tar_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: object, said: str
) -> None:
    assert callable(harm)
    blob = gzip.compress(packed(samples("jpg", "cls", 3)).ljust(20480, b"\0")[:20480])
    path = tmp_path / "raw" / "a.tar.gz"
    path.parent.mkdir()
    path.write_bytes(harm(blob))
    assert run(path, tmp_path / "o") == 2
    line = refusal(capsys)
    assert line.startswith(f"{path}: ")
    assert said in line
    assert not (tmp_path / "o").exists()


def test_a_gzip_of_several_members_is_all_read(tmp_path: Path) -> None:
    first, second = packed(samples("jpg", "cls", 3)), packed(samples("jpg", "cls", 3, 3))
    (tmp_path / "a.tgz").write_bytes(gzip.compress(first) + gzip.compress(second) + bytes(700))
    assert run(tmp_path / "a.tgz", tmp_path / "o") == 0
    assert contents(tmp_path / "o" / "train") == want(6)


def test_a_pattern_with_braces_means_all_of_its_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(8, 12):
        write(tmp_path / f"x-{number:03d}.tar", samples("jpg", "cls", 2, 2 * number))
    assert run(f"{tmp_path}/x-{{008..010}}.tar", tmp_path / "o") == 0
    assert contents(tmp_path / "o" / "train") == want(6, 16)
    assert run(f"{tmp_path}/x-0{{08,11}}.tar", tmp_path / "p") == 0
    assert Dataset.open(tmp_path / "p" / "train").samples == 4
    (tmp_path / "x-009.tar").unlink()
    assert run(f"{tmp_path}/x-{{007..011}}.tar", tmp_path / "q") == 2
    assert refusal(capsys).startswith(f"{tmp_path}/x-007.tar: no such file (and 1 more), of 5 that")
    assert run(f"{tmp_path}/x-{{9..1}}.tar", tmp_path / "q") == 2
    assert "{9..1}: not a range of numbers, the smaller one first" in refusal(capsys)
    assert run(f"{tmp_path}/{{0..99999}}-{{0..99999}}.tar", tmp_path / "q") == 2
    assert ".tar: means more than 1000000 files" in refusal(capsys)
    assert expand_braces("x-{0..2}") == ["x-0", "x-1", "x-2"]
    assert expand_braces("x-{0..10}")[-1] == "x-10"
    assert expand_braces("{a,b}-{01..02}") == ["a-01", "a-02", "b-01", "b-02"]


def test_splits_of_tars_go_by_many_names_and_two_of_one_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    for number, name in enumerate(("Train", "validation", "testing", "more")):
        write(root / name / "a.tar", samples("jpg", "cls", 3, 10 * number))
    assert run(root, tmp_path / "o") == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["test", "train", "val"]
    assert contents(tmp_path / "o" / "test") == want(3, 20)
    assert "left out: 1 folder" in capsys.readouterr().out
    (root / "more").rename(root / "dev")
    assert run(root, tmp_path / "p") == 2
    assert "dev and validation are both a split val" in refusal(capsys)


def test_archives_that_cannot_be_read_to_their_end_are_skipped_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "raw"
    write(root / "a.tar", samples("jpg", "cls", 3))
    whole = packed(samples("jpg", "cls", 4, 3))
    (root / "b.tar").write_bytes(whole[: whole.rindex(b"0006.jpg") + 700])
    (root / "c.tar").symlink_to("nowhere")
    (root / "d.tar.gz").write_bytes(gzip.compress(whole)[:-20])
    assert run(root, tmp_path / "o") == 2
    assert refusal(capsys).startswith(f"{root}/b.tar: damaged archive (")
    assert run(root, tmp_path / "s", "--on-bad", "skip") == 0
    # What stands right before the damage may lack a part.
    assert contents(tmp_path / "s" / "train") == want(5)
    records = told(tmp_path / "s" / "train")
    assert sorted(records) == ["b.tar", "b.tar/0005.jpg", "c.tar", "d.tar.gz"]
    assert records["c.tar"] == ("rejected", "cannot be read (No such file or directory)")
    assert records["b.tar"][1].startswith("damaged archive (")
    assert str(tmp_path) not in (tmp_path / "s" / "train" / "rejects.jsonl").read_text()
    assert verify.main([str(tmp_path / "s"), "--workers", "1"]) == 0


def test_links_and_the_like_are_rejects_where_a_picture_could_be(tmp_path: Path) -> None:
    files: list[tuple[str | tarfile.TarInfo, bytes]] = [*samples("jpg", "cls", 2)]
    for name in ("link.jpg", "other", "hard.png"):
        link = tarfile.TarInfo(name)
        link.type, link.linkname = tarfile.SYMTYPE, "0000.jpg"
        files.append((link, b""))
    path = tmp_path / "a.tar"
    path.write_bytes(packed(files))
    assert run(path, tmp_path / "o", "--on-bad", "skip") == 0
    records = told(tmp_path / "o" / "train")
    assert {name: decision for name, (decision, _) in records.items()} == {
        "a.tar/link.jpg": "rejected",
        "a.tar/hard.png": "rejected",
        "a.tar/other": "left out",
    }


def test_members_of_samples_that_are_not_used_are_counted_by_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions, masks, other labels: one line for a field, however many there are."""
    rest = [(".txt", b"a cat"), (".seg.png", jpeg(9)), (".json", b'{"label": 77}'), (".png", b"")]
    files = [(f"{n:04d}{field}", data) for n in range(4) for field, data in rest]
    write(tmp_path / "raw" / "a.tar", sorted([*samples("jpg", "cls"), *files[:-1]]))
    options = ("--image-field", "jpg", "--label-field", "cls")
    assert run(tmp_path / "raw", tmp_path / "o", *options) == 0
    said = capsys.readouterr().out
    assert "; left out: 4 .json, 4 .seg.png, 4 .txt, 3 .png" in said
    assert contents(tmp_path / "o" / "train") == want()
    reason = "in samples, neither image nor label"
    assert told(tmp_path / "o" / "train") == {
        f"*{field}": ("left out", f"{3 if field == '.png' else 4} {reason}") for field, _ in rest
    }
    assert run(tmp_path / "raw", tmp_path / "o", *options) == 0
    assert "complete already); left out: 4 .json" in capsys.readouterr().out


def test_a_split_of_tars_that_cannot_be_reached_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "raw" / "train" / "a.tar", samples("jpg", "cls"))
    (tmp_path / "raw" / "valid").symlink_to("nowhere")
    assert run(tmp_path / "raw", tmp_path / "o") == 2
    assert "raw/valid: cannot be read (No such file or directory): repair" in refusal(capsys)
    assert run(tmp_path / "raw", tmp_path / "o", "--on-bad", "skip") == 0
    assert told(tmp_path / "o" / "train")["../valid"][0] == "left out"
