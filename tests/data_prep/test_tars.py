"""Archives are read by offset, and every kind of odd member is told apart, as tarfile makes it."""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_prep import tars
from data_prep.tars import MAX_BYTES, Spans, gzipped, members, stamp
from tests.support.archives import jpeg, packed
from vssl_dist.data.manifest import DataError

PHOTO = jpeg(0)


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def sparse() -> bytes:
    """An old GNU sparse member that claims 10 GB."""
    member = tarfile.TarInfo("big.jpg")
    member.size = 512
    head = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[386:398], head[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    head[483:495] = b"\x80" + (10 << 30).to_bytes(11, "big")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + b"x" * 512 + bytes(1024)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_regular_members_lie_where_tarfile_finds_them(tmp_path: Path, format: int) -> None:
    names = ["a/b.JPEG", "UPPER.JPG", "x" * 90 + "/" + "y" * 90 + ".jpg", "plain"]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 200 + ".jpg", "ünï/写真.jpg"]
    blob = packed([(name, PHOTO[number:]) for number, name in enumerate(names)], format)
    path = tmp_path / "a.tar"
    path.write_bytes(b"before" + blob + b"after")
    found = list(members(path, 6, len(blob)))
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        want = [(m.name, m.offset_data + 6, m.size, "") for m in tar]
    assert [(m.name, m.offset, m.size, m.flaw) for m in found] == want
    spans = Spans.of([path], [(0, member) for member in found])
    order = np.arange(len(names))[::-1]
    read = [raw.data for raw in pickle.loads(pickle.dumps(spans.take(order)))]
    assert read == [PHOTO[number:] for number in order]


@pytest.mark.parametrize(
    ("member", "flaw"),
    [
        (special("a.jpg", tarfile.SYMTYPE, "/etc/passwd"), "a symbolic link"),
        (special("a.jpg", tarfile.LNKTYPE, "b.jpg"), "a hard link"),
        (special("a.jpg", tarfile.CHRTYPE), "a device"),
        (special("a.jpg", tarfile.BLKTYPE), "a device"),
        (special("a.jpg", tarfile.FIFOTYPE), "a pipe"),
        (("../../etc/a.jpg", b"x"), "a name that leads out of its folder"),
        (("/etc/a.jpg", b"x"), "a name that leads out of its folder"),
        (("a/../../b.jpg", b"x"), "a name that leads out of its folder"),
        (("a\nb.jpg", b"x"), "cannot be printed"),
    ],
)
def test_an_odd_member_is_told_and_its_bytes_are_never_read(
    tmp_path: Path, member: tuple[tarfile.TarInfo | str, bytes], flaw: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([("one.jpg", PHOTO), member, ("two.jpg", PHOTO)]))
    found = list(members(path))
    assert [bool(m.flaw) for m in found] == [False, True, False]
    assert flaw in found[1].flaw
    raws = list(Spans.of([path], [(0, m) for m in found]))
    assert [raw.data for raw in raws] == [PHOTO, b"", PHOTO]
    assert raws[1].flaw == found[1].flaw
    assert sorted(tmp_path.rglob("*")) == [path]


def test_a_sparse_member_and_a_huge_one_are_flaws(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(sparse())
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse()
    (found,) = members(path)
    assert found.flaw == "a sparse file and not a regular member"
    (raw,) = Spans.of([path], [(0, found)])
    assert raw.data == b""
    member = tarfile.TarInfo("big.jpg")
    member.size = MAX_BYTES + 1
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + -(-member.size // 512) * 512 + 1024)
    (found,) = members(path)
    assert "more than the limit" in found.flaw


def test_folders_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([special("folder", tarfile.DIRTYPE), ("folder/a.jpg", PHOTO)]))
    assert [m.name for m in members(path)] == ["folder/a.jpg"]


def header(**fields: bytes) -> bytearray:
    made = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    places = {"size": slice(124, 136), "kind": slice(156, 157)}
    for name, value in fields.items():
        made[places[name]] = value
    made[148:156] = b" " * 8
    made[148:156] = b"%06o\0 " % sum(made)
    return made


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\0" * 100,
        b"no archive" * 100,
        packed([("a.jpg", PHOTO)])[:700],
        packed([("a.jpg", PHOTO)])[: 512 + len(PHOTO)],
        packed([("a.jpg", b"x" * 512)])[:1024],
        packed([("a.jpg", b"x" * 512)])[:1024] + b"garbage" * 512,
        bytes(header(size=b"\xff" * 11 + b"\x00")) + bytes(2048),
        bytes(header(size=b"\xff" * 10 + b"\xfe\x00", kind=b"L")) + bytes(2048),
        bytes(header(size=b"\x80" + (1 << 40).to_bytes(11, "big"), kind=b"L")) + bytes(2048),
        bytes(header(size=b"\x80" + (1 << 40).to_bytes(11, "big"), kind=b"x")) + bytes(2048),
        bytes(header(size=b"\x80" + (1 << 40).to_bytes(11, "big"))) + bytes(2048),
        bytes(header(size=b"\xff" * 11 + b"\x00", kind=b"x")) + bytes(2048),
    ],
    ids=[
        "empty", "zeros", "text", "cut data", "cut padding", "no end", "garbage", "negative",
        "negative name", "huge name", "huge header", "huge member", "negative header",
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_archive_is_refused_in_one_line_at_once(
    tmp_path: Path, blob: bytes
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(blob)
    with pytest.raises(DataError) as caught:
        list(members(path))
    assert str(caught.value).startswith(f"{path}: damaged archive (")
    assert "\n" not in str(caught.value)


def test_no_cut_of_an_archive_loses_members_silently(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    blob = packed([(f"{number}.jpg", PHOTO[:900]) for number in range(4)])
    want = None
    for cut in range(len(blob), 0, -128):
        path.write_bytes(blob[:cut])
        try:
            found = [(m.name, m.offset, m.size) for m in members(path)]
        except DataError:
            continue
        want = want or found
        assert found == want
        assert len(found) == 4


def test_an_archive_that_shrinks_after_it_was_listed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([("a.jpg", PHOTO)]))
    before = stamp(path)
    spans = Spans.of([path], [(0, m) for m in members(path)])
    path.write_bytes(path.read_bytes()[:600])
    assert stamp(path) != before
    with pytest.raises(DataError, match=r"cut short at a\.jpg"):
        list(spans)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        list(spans)
    with pytest.raises(DataError, match="No such file"):
        stamp(path)


def test_gzipped_members_are_found_by_exact_name_and_only_if_regular(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member, data in (
            special("link", tarfile.SYMTYPE, "real"),
            (tarfile.TarInfo("real"), b"12345"),
            (tarfile.TarInfo("long"), b"1234567"),
            (tarfile.TarInfo("x/real"), b"no"),
        ):
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert gzipped(path, ["link", "real", "long", "none"], limit=5) == {"real": b"12345"}


def test_nothing_here_can_write(tmp_path: Path) -> None:
    text = Path(tars.__file__).read_text()
    assert "extractall" not in text
    assert ".extract(" not in text
    assert "pickle" not in text.replace("picklable", "")
