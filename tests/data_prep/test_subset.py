"""Some classes of a split: the same images and labels as picked by hand, and no second copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import subset, verify
from tests.support.photos import tiny_dataset
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import read_manifest

SAMPLES, CLASSES = 60, 5


@pytest.fixture(scope="module")
def whole_split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(
        tmp_path_factory.mktemp("whole"), samples=SAMPLES, classes=CLASSES, shard_size=7
    )


def run(folder: Path, classes: str, out: Path) -> int:
    return subset.main([str(folder), "--classes", classes, "--out", str(out)])


def content(folder: Path) -> list[tuple[bytes, str]]:
    """Bytes and class name of each sample, in order."""
    dataset = Dataset.open(folder)
    read_samples = dataset.read_checked(np.arange(dataset.samples))
    assert read_samples.substitutions == []
    names = [dataset.classes[label] for label in read_samples.label.tolist()]
    return list(zip((data.tobytes() for data in read_samples.data), names, strict=True))


@pytest.mark.parametrize("labels", [[0], [3], [1, 4], [0, 1, 2, 3, 4]])
def test_it_is_what_one_picks_by_hand(whole_split: Path, tmp_path: Path, labels: list[int]) -> None:
    names = [Dataset.open(whole_split).classes[label] for label in labels]
    assert run(whole_split, ",".join(reversed(names)), tmp_path / "some") == 0
    assert content(tmp_path / "some") == [pair for pair in content(whole_split) if pair[1] in names]
    assert list(Dataset.open(tmp_path / "some").classes) == names
    assert verify.main([str(tmp_path / "some"), "--workers", "1"]) == 0


def test_it_takes_no_room(whole_split: Path, tmp_path: Path) -> None:
    name = Dataset.open(whole_split).classes[2]
    assert run(whole_split, name, tmp_path / "some") == 0
    tars = sorted((tmp_path / "some").glob("*.tar"))
    assert tars
    assert all(tar.is_symlink() and tar.samefile(whole_split / tar.name) for tar in tars)


def test_data_and_links_move_together(whole_split: Path, tmp_path: Path) -> None:
    shutil.copytree(whole_split, tmp_path / "a" / "train")
    name = Dataset.open(whole_split).classes[2]
    assert run(tmp_path / "a" / "train", name, tmp_path / "a" / "some") == 0
    before = content(tmp_path / "a" / "some")
    (tmp_path / "a").rename(tmp_path / "b")
    assert content(tmp_path / "b" / "some") == before


def test_classes_of_classes_are_found_too(whole_split: Path, tmp_path: Path) -> None:
    names = Dataset.open(whole_split).classes
    assert run(whole_split, ",".join(names[1:4]), tmp_path / "three") == 0
    assert run(tmp_path / "three", names[3], tmp_path / "one") == 0
    assert content(tmp_path / "one") == [
        pair for pair in content(whole_split) if pair[1] == names[3]
    ]
    assert verify.main([str(tmp_path / "one"), "--workers", "1"]) == 0


def test_other_classes_or_other_data_have_another_fingerprint(
    whole_split: Path, tmp_path: Path
) -> None:
    names = Dataset.open(whole_split).classes
    other = tiny_dataset(tmp_path, samples=SAMPLES, classes=CLASSES, shard_size=7, first=5000)
    for number, (folder, name) in enumerate(
        [(whole_split, names[0]), (whole_split, names[1]), (other, names[0])]
    ):
        assert run(folder, name, tmp_path / str(number)) == 0
    assert len({read_manifest(tmp_path / n).fingerprint for n in "012"}) == 3


def test_the_same_call_changes_nothing_and_mends_what_is_missing(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = Dataset.open(whole_split).classes
    out = tmp_path / "some"
    assert run(whole_split, names[1], out) == 0
    before = {path.name: path.lstat().st_mtime_ns for path in out.iterdir()}
    assert run(whole_split, names[1], out) == 0
    assert {path.name: path.lstat().st_mtime_ns for path in out.iterdir()} == before
    min(out.glob("*.tar")).unlink()
    (tmp_path / ".some.tmp-1").mkdir()  # of a call that was killed
    assert run(whole_split, names[1], out) == 0
    assert {path.name for path in out.iterdir()} == set(before)
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    capsys.readouterr()
    assert run(whole_split, names[2], out) == 2
    assert "holds another dataset" in capsys.readouterr().err


def test_what_cannot_be_made_is_one_line(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Dataset.open(whole_split).classes[0]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    few = tiny_dataset(tmp_path / "few", samples=2, classes=CLASSES)
    absent = Dataset.open(whole_split).classes[4]
    cases = [
        (whole_split, "zebra", tmp_path / "o", "zebra is none of "),
        (whole_split, " ,", tmp_path / "o", "nothing is none of "),
        (whole_split, name, foreign, "holds files that are no dataset"),
        (whole_split, name, whole_split, "holds another dataset"),
        (tmp_path / "none", name, tmp_path / "o", "no such folder of shards"),
        (few, absent, tmp_path / "o", f"has no image of {absent}"),
    ]
    for folder, classes, out, message in cases:
        assert run(folder, classes, out) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "o").exists()
    assert sorted(path.name for path in foreign.iterdir()) == ["thesis.tex"]
    assert len(content(whole_split)) == SAMPLES


@pytest.mark.parametrize("kind", ["file", "link to a file", "link to a folder", "dangling link"])
def test_an_out_that_is_no_folder_is_named_and_left_alone(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out"
    if kind == "file":
        (tmp_path / "file").rename(out)
    else:
        out.symlink_to(tmp_path / kind.rsplit(" ", 1)[1])
    before = sorted(tmp_path.iterdir())
    assert run(whole_split, Dataset.open(whole_split).classes[0], out) == 2
    error = capsys.readouterr().err
    assert error == f"error: {out}: is a link or a file and no folder: choose another --out\n"
    assert sorted(tmp_path.iterdir()) == before


def test_a_second_call_at_once_is_refused_and_takes_nothing_from_the_first(
    whole_split: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name, out = Dataset.open(whole_split).classes[0], tmp_path / "some"
    genuine, codes = subset.write_whole, []

    def meanwhile(path: Path, blob: bytes) -> None:
        codes.append(run(whole_split, name, out))
        genuine(path, blob)

    monkeypatch.setattr(subset, "write_whole", meanwhile)
    assert run(whole_split, name, out) == 0
    assert set(codes) == {2}
    assert capsys.readouterr().err.startswith(f"error: {out}: another call is making it: wait")
    assert content(out) == [pair for pair in content(whole_split) if pair[1] == name]
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


def test_an_out_beside_which_nothing_can_be_made_is_named(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file/some", "loop/some"):
        assert run(whole_split, Dataset.open(whole_split).classes[0], tmp_path / name) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: cannot be made (")


def test_damage_is_found_behind_the_links(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole_split, tmp_path / "train")
    assert run(tmp_path / "train", Dataset.open(whole_split).classes[2], tmp_path / "some") == 0
    row = Dataset.open(tmp_path / "some").rows(np.array([3]))[0]
    number, _ = Dataset.open(tmp_path / "some").locate(np.array([3]))
    tar = sorted((tmp_path / "some").glob("*.tar"))[number[0]]
    blob = bytearray(tar.read_bytes())
    blob[int(row["offset"]) + 40] ^= 1
    tar.write_bytes(blob)
    capsys.readouterr()
    assert verify.main([str(tmp_path / "some"), "--workers", "1"]) == 1
    assert "sample 3: crc32 differs" in capsys.readouterr().out


def test_only_remains_of_calls_for_this_split_are_removed(
    whole_split: Path, tmp_path: Path
) -> None:
    """Not what a name that reads as a pattern matches, nor what others call likewise."""
    foreign_names = [".a.tmp-1", ".b.tmp-mine", ".[ab].tmp-thesis", ".[ab].tmp-12 copy"]
    leftover_names = [".[ab].tmp-77", ".[ab].tmp-0123456789ab"]
    occupied_name = ".[ab].tmp-78"  # somebody has put a file of his own into it
    for name in (*foreign_names, *leftover_names, occupied_name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard-000000.tar").touch()
        (tmp_path / name / ".tmp-0123456789ab").touch()
    (tmp_path / occupied_name / "thesis.tex").touch()
    (tmp_path / ".[ab].tmp-5").symlink_to(".a.tmp-1")
    assert run(whole_split, Dataset.open(whole_split).classes[0], tmp_path / "[ab]") == 0
    remaining = sorted(path.name for path in tmp_path.iterdir())
    assert remaining == sorted([*foreign_names, occupied_name, ".[ab].tmp-5", "[ab]"])
    assert len(list((tmp_path / ".a.tmp-1").iterdir())) == 2
    assert len(list((tmp_path / occupied_name).iterdir())) == 3


def test_a_damaged_split_with_files_of_the_users_own_is_named_and_left_alone(
    whole_split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, out = Dataset.open(whole_split).classes[0], tmp_path / "out"
    assert run(whole_split, name, out) == 0
    min(out.glob("*.tar")).unlink()
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert run(whole_split, name, out) == 2
    message = capsys.readouterr().err
    assert message == (
        f"error: {out}: is damaged, and holds notes.txt, too: move that, or delete the rest\n"
    )
    assert (out / "notes.txt").read_text() == "mine"
