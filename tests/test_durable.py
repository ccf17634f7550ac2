"""A published file is whole, stands where it was named, and replaces nothing but files."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.support.others import link_of_nobody, needs_root
from vssl_dist.durable import (
    append_to_file,
    is_partial_file_name,
    open_append,
    open_whole_file,
    write_durably,
    write_inside_folder,
)


def test_a_file_is_replaced_as_a_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    write_durably(path, b"first")
    with path.open("rb") as reader:
        write_durably(path, b"second")
        assert reader.read() == b"first"
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "elsewhere.png", tmp_path / "sheet.png"
    for before in (None, b"old"):
        if before:
            target.write_bytes(before)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_durably(link, b"new")
        assert link.is_symlink()
        assert target.read_bytes() == b"new"


def test_a_pipe_a_device_and_a_folder_are_left_alone(tmp_path: Path) -> None:
    pipe, folder, link = tmp_path / "pipe", tmp_path / "folder", tmp_path / "null"
    os.mkfifo(pipe)
    folder.mkdir()
    link.symlink_to("/dev/null")
    for path in (pipe, folder, link):
        with pytest.raises(OSError, match="no regular file") as caught:
            write_durably(path, b"x")
        assert caught.value.filename == str(path)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(link.stat().st_mode)
    assert sorted(tmp_path.iterdir()) == sorted([pipe, folder, link])


def test_an_error_names_the_file_that_was_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "one").symlink_to("other")
    (tmp_path / "other").symlink_to("one")
    for path in (tmp_path / "file" / "below.json", tmp_path / ("x" * 300), tmp_path / "one"):
        with pytest.raises(OSError, match=r".") as caught:
            write_durably(path, b"x")
        assert caught.value.filename == str(path)
        assert caught.value.strerror


@needs_root
def test_only_links_that_this_user_made_are_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "rc").write_bytes(b"mine")
    for name, target in (("file.json", victim / "rc"), ("folder", victim)):
        link = tmp_path / name
        link_of_nobody(link, target)
        path = link if target.is_file() else link / "rc"
        for write in (lambda p: write_durably(p, b"x"), open_append):
            with pytest.raises(PermissionError, match=r"is a link that .+ made: remove it"):
                write(path)
    own = tmp_path / "own.json"
    own.symlink_to("file.json")
    with pytest.raises(PermissionError, match=r"file\.json is a link that"):
        write_durably(own, b"x")
    assert (victim / "rc").read_bytes() == b"mine"
    assert list(victim.iterdir()) == [victim / "rc"]


def test_adding_goes_on_at_the_end_of_a_regular_file_alone(tmp_path: Path) -> None:
    path, link = tmp_path / "new" / "log", tmp_path / "link"
    link.symlink_to(path)
    for piece, name in ((b"one", path), (b"two", link)):
        with open_append(name) as file:
            file.write(piece)
    assert path.read_bytes() == b"onetwo"
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path / "new"):
        with pytest.raises(OSError, match=r".") as caught:
            open_append(other)
        assert caught.value.filename is not None


def test_a_file_written_piece_by_piece_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"old")
    with pytest.raises(TypeError), open_whole_file(path) as file:
        file.write(b"half" + file.write(b"half"))  # type: ignore[operator]
    assert path.read_bytes() == b"old"
    with open_whole_file(path, flush=False) as file:
        file.write(b"new")
        (partial,) = set(tmp_path.iterdir()) - {path}
        assert is_partial_file_name(partial.name)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_added_is_added_in_full_or_is_an_error(tmp_path: Path) -> None:
    append_to_file(tmp_path / "new" / "list", b"one")
    append_to_file(tmp_path / "new" / "list", b"two" * 100_000)
    assert (tmp_path / "new" / "list").read_bytes() == b"one" + b"two" * 100_000
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "run").mkdir()
    for target in ("/dev/full", "../mine"):
        link = tmp_path / "run" / Path(target).name
        link.symlink_to(target)
        with pytest.raises(OSError, match="is a link that leads out of its folder: remove it"):
            append_to_file(link, b"x")
    assert (tmp_path / "mine").read_bytes() == b"mine"


@needs_root
def test_no_file_is_written_into_a_folder_that_is_a_link_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "victim").mkdir()
    link_of_nobody(tmp_path / "folder", tmp_path / "victim")
    (tmp_path / "circle").symlink_to("circle")
    for folder, reason in (("folder", "is a link that .+ made"), ("circle", "symbolic links")):
        with (
            pytest.raises(OSError, match=reason),
            open_whole_file(tmp_path / folder / "file") as file,
        ):
            file.write(b"x")
    assert list((tmp_path / "victim").iterdir()) == []


def test_inside_is_inside_whoever_made_the_links(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "home" / "export"
    folder.mkdir(parents=True)
    (tmp_path / "via").symlink_to(folder)
    (folder / "inner").symlink_to("facts.json")
    write_inside_folder(tmp_path / "via" / "inner", b"new")
    assert (folder / "facts.json").read_bytes() == b"new"
    for number, target in enumerate(("../.bashrc", str(home / ".bashrc"), "../export2/x", "..")):
        link = folder / f"{number}.json"
        link.symlink_to(target)
        with pytest.raises(OSError, match="leads out of its folder: remove it") as caught:
            write_inside_folder(link, b"new")
        assert caught.value.filename == str(link)
    assert [path.name for path in home.iterdir()] == ["export"]
