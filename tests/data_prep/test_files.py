"""What sharding writes is whole, replaces nothing through a link, and removes only its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.archives.unpack import FOLDER, archive_unpacker
from data_prep.files import hold_lock, remove_partial_files, whole_file, write_whole
from data_prep.sharding.split_folder import claim_split_folder
from tests.support.others import done_as_nobody, link_of_nobody, needs_root, shared_folder
from vssl_dist.errors import DataError


def test_no_link_that_awaits_the_unfinished_file_is_written_through(tmp_path: Path) -> None:
    """The process is known beforehand, the name of its unfinished file is not."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    folder = tmp_path / "train"
    folder.mkdir()
    path = folder / "shard-000000.tar"
    (folder / f".{path.name}.tmp-{os.getpid()}").symlink_to(victim)
    names = []
    with whole_file(path) as file:
        file.write(b"new")
        names += [name.name for name in folder.iterdir()]
    with whole_file(path) as file:
        names += [name.name for name in folder.iterdir()]
    assert path.read_bytes() == b""
    assert victim.read_bytes() == b"mine"
    assert len(set(names)) == len({path.name, f".{path.name}.tmp-{os.getpid()}"}) + 2


def test_a_link_that_bears_the_name_is_replaced_and_not_followed(tmp_path: Path) -> None:
    """As in a folder of links into another dataset, which must stay as it is."""
    (tmp_path / "original.tar").write_bytes(b"original")
    (tmp_path / "shard.tar").symlink_to("original.tar")
    write_whole(tmp_path / "shard.tar", b"new")
    assert not (tmp_path / "shard.tar").is_symlink()
    assert (tmp_path / "original.tar").read_bytes() == b"original"


def test_nothing_is_left_of_a_file_that_fails_and_the_error_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"folder: cannot be written \(Is a directory\)"):
        write_whole(tmp_path / "folder", b"x")
    with pytest.raises(DataError, match=r"cannot be written \(No such file"):
        write_whole(tmp_path / "absent" / "file", b"x")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file"):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


OURS = [
    ".tmp-0123456789ab", ".shard-000000.tar.tmp-1", ".shard-000012.idx.npy.tmp-4711",
    ".shard-000001.tar.json.tmp-2", ".survey-000000.tmp-9", ".manifest.json.tmp-3",
    f".{'0a' * 16}.tar.tmp-12",
]  # fmt: skip
OTHERS = [
    ".thesis.tmp-1", ".manifest.json.tmp-mine", ".shard-000000.tar.tmp-", ".tmp-0123456789ab.tex",
    ".tmp-0123456789AB", ".tmp-mine", "x.tmp-0123456789ab", ".manifest.json.tmp-3\n",
]  # fmt: skip


def test_what_interrupted_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (*OURS, *OTHERS):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".tmp-00000000000a").mkdir()
    (tmp_path / ".tmp-00000000000b").symlink_to(tmp_path / OTHERS[0])
    remove_partial_files(tmp_path)
    remaining = {*OTHERS, ".tmp-00000000000a", ".tmp-00000000000b"}
    assert {path.name for path in tmp_path.iterdir()} == remaining


@needs_root
@pytest.mark.parametrize("where", ["split", ".sharding", FOLDER])
def test_no_folder_of_ones_own_is_swept_or_filled_through_a_link_of_another_user(
    tmp_path: Path, where: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / ".tmp-0123456789ab").touch()
    archive = tmp_path / "a.tar.gz"
    archive.write_bytes(b"\x1f\x8b")
    split = tmp_path / "out" / "train"
    split.parent.mkdir()
    link = {"split": split, ".sharding": split / ".sharding", FOLDER: split.parent / FOLDER}[where]
    link.parent.mkdir(exist_ok=True)
    link_of_nobody(link, victim)

    def unpacked() -> None:
        with archive_unpacker(split.parent) as unpack:
            unpack(archive)

    def sharded() -> None:
        with claim_split_folder(split):
            write_whole(split / "manifest.json", b"x")

    with pytest.raises(DataError, match=r"is a link that .+ made: remove it"):
        (unpacked if where == FOLDER else sharded)()
    assert [path.name for path in victim.iterdir()] == [".tmp-0123456789ab"]


@needs_root
def test_who_may_only_read_cannot_keep_a_dataset_locked() -> None:
    with shared_folder() as folder, hold_lock(folder / "lock", folder, "process is at it"):
        assert (folder / "lock").stat().st_mode & 0o077 == 0
        assert done_as_nobody(lambda: list(folder.iterdir()))
        assert not done_as_nobody(lambda: (folder / "lock").open())


def test_who_holds_a_dataset_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with (
        hold_lock(lock, tmp_path, "process is sharding into it"),
        pytest.raises(DataError, match=rf"wait for it \(process {os.getpid()} of "),
        hold_lock(lock, tmp_path, "process is sharding into it"),
    ):
        pass


@needs_root
def test_a_lock_of_another_user_is_named_with_its_owner() -> None:
    with shared_folder() as folder:
        lock = folder / "lock"
        lock.touch(0o600)
        folder.chmod(0o777)

        def refused() -> None:
            with (
                pytest.raises(DataError, match=f"{lock} belongs to root: remove it"),
                hold_lock(lock, folder, "process is sharding into it"),
            ):
                pass

        assert done_as_nobody(refused)
