"""Unpacked archives are there once, held by one process, and go with it."""

from __future__ import annotations

import gzip
from contextlib import ExitStack
from pathlib import Path

import pytest

from data_prep.archives.unpack import (
    FOLDER,
    ArchiveUnpacker,
    archive_unpacker,
)
from vssl_dist.errors import DataError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(b"contents" * 1000))
    return path


def test_it_is_there_as_long_as_it_is_needed(archive: Path, tmp_path: Path) -> None:
    with archive_unpacker(tmp_path / "o") as unpack:
        assert not (tmp_path / "o").exists()
        unpacked = unpack(archive)
        assert unpacked.read_bytes() == b"contents" * 1000
        assert unpacked.parent == tmp_path / "o" / FOLDER
        assert unpack(archive) == unpacked
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    archive.write_bytes(gzip.compress(b"contents")[:-1])
    with (
        pytest.raises(DataError, match="damaged archive"),
        archive_unpacker(tmp_path / "o") as unpack,
    ):
        unpack(archive)
    assert list((tmp_path / "o").iterdir()) == []


def test_what_a_killed_process_left_is_used_if_it_is_whole_and_swept_away(
    archive: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "o" / FOLDER
    with ExitStack() as ending:
        unpacked = ArchiveUnpacker(folder, ending)(archive)
        inode = unpacked.stat().st_ino
        unpacked.with_name(f".{unpacked.name}.tmp-1").write_bytes(b"half")
        ending.pop_all()
    with archive_unpacker(tmp_path / "o") as unpack:
        assert unpack(archive).stat().st_ino == inode
        assert sorted(path.name for path in folder.iterdir()) == sorted([unpacked.name, "lock"])
        archive.write_bytes(gzip.compress(b"another"))
        assert unpack(archive).read_bytes() == b"another"
    assert not folder.exists()


def test_a_second_process_is_refused(archive: Path, tmp_path: Path) -> None:
    with archive_unpacker(tmp_path / "o") as unpack:
        unpacked = unpack(archive)
        with (
            pytest.raises(DataError, match="another process is unpacking into it: wait for it"),
            archive_unpacker(tmp_path / "o") as another,
        ):
            another(archive)
        assert unpacked.exists()
