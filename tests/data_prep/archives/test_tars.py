"""Archives are read by offset, and every kind of odd member is told apart, as tarfile makes it."""

from __future__ import annotations

import errno
import gzip
import io
import os
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_prep.archives import tars
from data_prep.archives.archived_images import ArchivedImages
from data_prep.archives.tars import (
    MAX_BYTES,
    ArchiveError,
    damage_as_archive_error,
    file_stamp,
    iter_members,
    read_gzipped_members,
)
from tests.support.archives import jpeg, packed
from vssl_dist.errors import DataError

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
    found = list(iter_members(path, 6, len(blob)))
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        want = [(m.name, m.offset_data + 6, m.size, "") for m in tar]
    assert [(m.name, m.offset, m.size, m.flaw) for m in found] == want
    archived = ArchivedImages.from_members([path], [(0, member) for member in found])
    order = np.arange(len(names))[::-1]
    read = [raw.data for raw in pickle.loads(pickle.dumps(archived.select_rows(order)))]
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
    found = list(iter_members(path))
    assert [bool(m.flaw) for m in found] == [False, True, False]
    assert flaw in found[1].flaw
    raws = list(ArchivedImages.from_members([path], [(0, m) for m in found]))
    assert [raw.data for raw in raws] == [PHOTO, b"", PHOTO]
    assert raws[1].flaw == found[1].flaw
    assert sorted(tmp_path.rglob("*")) == [path]


def test_a_sparse_member_and_a_huge_one_are_flaws(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(sparse())
    with tarfile.open(path) as tar:
        assert tar.getmembers()[0].issparse()
    (found,) = iter_members(path)
    assert found.flaw == "a sparse file and not a regular member"
    (raw,) = ArchivedImages.from_members([path], [(0, found)])
    assert raw.data == b""
    member = tarfile.TarInfo("big.jpg")
    member.size = MAX_BYTES + 1
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(512 + -(-member.size // 512) * 512 + 1024)
    (found,) = iter_members(path)
    assert "more than the limit" in found.flaw


def test_folders_are_no_members(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([special("folder", tarfile.DIRTYPE), ("folder/a.jpg", PHOTO)]))
    assert [m.name for m in iter_members(path)] == ["folder/a.jpg"]


def header(**fields: bytes) -> bytearray:
    raw_header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header_fields = {"size": slice(124, 136), "kind": slice(156, 157)}
    for name, value in fields.items():
        raw_header[header_fields[name]] = value
    raw_header[148:156] = b" " * 8
    raw_header[148:156] = b"%06o\0 " % sum(raw_header)
    return raw_header


def described(kind: bytes, text: bytes, times: int) -> bytes:
    """A member that is described by so many headers, one upon the other."""
    member = tarfile.TarInfo("about")
    member.type, member.size = kind, len(text)
    header_blocks = member.tobuf(tarfile.GNU_FORMAT) + text.ljust(512, b"\0")
    return packed([("0.jpg", PHOTO)])[: 512 + -(-len(PHOTO) // 512) * 512] + header_blocks * times


def goes_on(blob: bytes) -> bytes:
    """A sparse member that says that its map goes on in the next block."""
    head = bytearray(blob[:512])
    head[482] = 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


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
        described(b"L", b"a.jpg\0", 3000) + packed([("b.jpg", PHOTO)]),
        described(b"x", b"14 path=a.jpg\n", 3000) + packed([("b.jpg", PHOTO)]),
        goes_on(sparse()),
        goes_on(sparse()) + (b"\xff" * 504 + b"\1" * 8) * 3000,
    ],
    ids=[
        "empty", "zeros", "text", "cut data", "cut padding", "no end", "garbage", "negative",
        "negative name", "huge name", "huge header", "huge member", "negative header",
        "chain of names", "chain of headers", "endless map", "long map",
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_archive_is_refused_in_one_line_at_once(
    tmp_path: Path, blob: bytes
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(blob)
    with pytest.raises(DataError) as caught:
        list(iter_members(path))
    assert str(caught.value).startswith(f"{path}: damaged archive (")
    assert "\n" not in str(caught.value)


def test_no_cut_of_an_archive_loses_members_silently(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    blob = packed([(f"{number}.jpg", PHOTO[:900]) for number in range(4)])
    want = None
    for cut in range(len(blob), 0, -128):
        path.write_bytes(blob[:cut])
        try:
            found = [(m.name, m.offset, m.size) for m in iter_members(path)]
        except DataError:
            continue
        want = want or found
        assert found == want
        assert len(found) == 4


def test_an_archive_that_shrinks_after_it_was_listed_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([("a.jpg", PHOTO)]))
    before = file_stamp(path)
    archived = ArchivedImages.from_members([path], [(0, m) for m in iter_members(path)])
    path.write_bytes(path.read_bytes()[:600])
    assert file_stamp(path) != before
    with pytest.raises(DataError, match=r"cut short at a\.jpg"):
        list(archived)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        list(archived)
    with pytest.raises(DataError, match="No such file"):
        file_stamp(path)


def test_members_of_an_archive_that_is_gone_are_flawed_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed([("a.jpg", PHOTO), ("b.jpg", PHOTO)]))
    archived = ArchivedImages.from_members(
        [path], [(0, m) for m in iter_members(path)], skip_unreadable=True
    )
    assert [raw.flaw for raw in archived] == ["", ""]
    path.unlink()
    raws = list(pickle.loads(pickle.dumps(archived.select_rows(np.arange(2)))))
    assert {raw.flaw for raw in raws} == {"cannot be read (No such file or directory)"}
    assert all(raw.may_be_read_later for raw in raws)


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
    assert read_gzipped_members(path, ["link", "real", "long", "none"], max_member_bytes=5) == {
        "real": b"12345"
    }


@pytest.mark.parametrize("sizes", [(3 << 20, 512), (512, (1 << 20) + 5, 0, 1 << 20)])
def test_gzipped_members_of_any_size_are_whole(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    noise = np.random.Generator(np.random.Philox(0)).bytes(max(sizes))
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for number, size in enumerate(sizes):
            member = tarfile.TarInfo(str(number))
            member.size = size
            tar.addfile(member, io.BytesIO(noise[:size]))
    found = read_gzipped_members(
        path, [str(number) for number in range(len(sizes))], max_member_bytes=max(sizes)
    )
    assert list(found.values()) == [noise[:size] for size in sizes]


@pytest.mark.parametrize(
    ("kind", "stated", "there"),
    [(b"x", 8 << 20, 8 << 20), (b"L", 8 << 20, 8 << 20), (b"x", 1 << 40, 0), (b"0", 1 << 31, 0)],
)
def test_what_a_gzipped_archive_only_states_takes_no_memory(
    tmp_path: Path, kind: bytes, stated: int, there: int
) -> None:
    path = tmp_path / "a.tar.gz"
    size = b"\x80" + stated.to_bytes(11, "big")
    blob = bytes(header(size=size, kind=kind)) + bytes(there)
    path.write_bytes(gzip.compress(blob + packed([("b.jpg", PHOTO)]), 1))
    del blob
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a\.tar\.gz: damaged archive \("):
            read_gzipped_members(path, ["a.jpg"], max_member_bytes=1 << 32)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_a_gzipped_archive_that_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar\.gz: cannot be read \(No such file"):
        read_gzipped_members(tmp_path / "none.tar.gz", ["a"], max_member_bytes=5)


def test_nothing_here_can_write(tmp_path: Path) -> None:
    text = Path(tars.__file__).read_text()
    assert "extractall" not in text
    assert ".extract(" not in text
    assert "pickle" not in text.replace("picklable", "")


def some(first: int, count: int, format: int = tarfile.GNU_FORMAT) -> bytes:
    return packed([(f"{n}.jpg", PHOTO[: 400 * n + 1]) for n in range(first, first + count)], format)


ENDED = {
    "two": some(0, 3) + some(3, 2),
    "three of several formats": some(0, 2)
    + some(2, 1, tarfile.PAX_FORMAT)
    + some(3, 2, tarfile.USTAR_FORMAT),
    "an empty one first": packed([]) + some(0, 3),
    "an empty one between": some(0, 2) + packed([]) + some(2, 2),
    "more padding": some(0, 2) + bytes(51200),
    "padding to no block": some(0, 2) + bytes(300),
    "padding and another": some(0, 2) + bytes(512 * 7) + some(2, 1),
    "one zero block": some(0, 1).rstrip(b"\0").ljust(1536, b"\0") + bytes(512) + some(1, 2),
}


@pytest.mark.parametrize("name", ENDED)
def test_archives_behind_one_another_are_read_as_tar_reads_them_that_ignores_zeros(
    tmp_path: Path, name: str
) -> None:
    blob = ENDED[name]
    path = tmp_path / "a.tar"
    path.write_bytes(b"before" + blob + b"after")
    with tarfile.open(fileobj=io.BytesIO(blob), ignore_zeros=True) as tar:
        want = [(m.name, m.offset_data + 6, m.size) for m in tar]
    assert [(m.name, m.offset, m.size) for m in iter_members(path, 6, len(blob))] == want
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(blob))
    read = read_gzipped_members(
        tmp_path / "a.tar.gz", [member_name for member_name, _, _ in want], max_member_bytes=1 << 20
    )
    assert read == {
        member_name: (b"before" + blob)[at : at + size] for member_name, at, size in want
    }


@pytest.mark.parametrize(
    "rest",
    [b"x", b"words that follow", bytes(511) + b"\1", some(1, 2)[3:], b"\0" + some(1, 2), PHOTO],
    ids=[
        "a byte",
        "words",
        "a byte later",
        "a cut archive",
        "an archive out of place",
        "a picture",
    ],
)
def test_what_follows_an_end_and_is_no_archive_is_refused(tmp_path: Path, rest: bytes) -> None:
    blob = some(0, 2)
    path = tmp_path / "a.tar"
    path.write_bytes(blob + rest)
    message = (
        rf"a\.tar: damaged archive \(what follows its end, from byte {len(blob)} on, is no archive"
    )
    with pytest.raises(DataError, match=message):
        list(iter_members(path))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(blob + rest))
    with pytest.raises(DataError, match=message.replace("a\\.tar:", "b\\.tar\\.gz:")):
        read_gzipped_members(tmp_path / "b.tar.gz", ["0.jpg"], max_member_bytes=1 << 20)


@pytest.mark.parametrize("cut", [100, 700, 1400])
def test_a_second_archive_that_is_cut_short_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(some(0, 2) + some(2, 2)[:cut])
    with pytest.raises(DataError, match=r"a\.tar: damaged archive \("):
        list(iter_members(path))


def test_a_hole_behind_the_end_takes_no_time(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(some(0, 2))
    with path.open("r+b") as file:
        file.truncate(1 << 42)
    assert len(list(iter_members(path))) == 2


def test_storage_that_fails_and_a_lack_of_memory_are_no_damage_of_an_archive(
    tmp_path: Path,
) -> None:
    archive = tmp_path / "a.tar"
    with pytest.raises(ArchiveError) as caught, damage_as_archive_error(archive):
        raise OSError(errno.EIO, "Input/output error")
    assert str(caught.value) == f"{archive}: cannot be read (Input/output error)"
    with pytest.raises(MemoryError), damage_as_archive_error(archive):
        raise MemoryError


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match=r"a\.tar: cannot be read \(not a regular file\)"):
        list(iter_members(tmp_path / "a.tar"))
