"""A lock is its user's alone, and whoever holds it is named."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

import pytest
from filelock import Timeout

from tests.support.others import done_as_nobody, locked_by_nobody, needs_root, shared_folder
from vssl_dist.locks import (
    describe_lock_holder,
    hold_lock,
    is_held_by_other_user,
    make_private_lock,
)


def test_the_process_that_holds_a_lock_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with make_private_lock(path):
        assert f"process {os.getpid()} of " in describe_lock_holder(path)
        with pytest.raises(Timeout):
            make_private_lock(path).acquire(timeout=0)
    assert describe_lock_holder(path) == "a process on another machine"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@needs_root
def test_who_may_only_read_can_neither_take_nor_keep_a_lock() -> None:
    with shared_folder() as folder:
        path = folder / "lock"
        with make_private_lock(path):
            assert not done_as_nobody(path.read_bytes)
        assert not done_as_nobody(path.read_bytes)


@needs_root
def test_a_lock_of_before_is_closed_to_others_and_who_still_holds_it_is_named() -> None:
    with shared_folder() as folder:
        path = folder / "lock"
        path.touch(mode=0o644)
        with locked_by_nobody(path) as pid:
            with pytest.raises(Timeout):
                make_private_lock(path).acquire(timeout=0.1)
            assert describe_lock_holder(path).startswith(f"process {pid} of ")
        with make_private_lock(path).acquire(timeout=5):
            assert not done_as_nobody(path.read_bytes)


def test_a_lock_is_no_way_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic"):
        make_private_lock(tmp_path / "lock").acquire(timeout=1)
    assert target.read_bytes() == b"mine"
    assert stat.S_IMODE(target.stat().st_mode) != 0o600


def test_whoever_waits_is_told_for_whom_and_how_long_and_not_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vssl_dist")
    path = tmp_path / "lock"
    with make_private_lock(path):
        assert not is_held_by_other_user(path)
        match = f"still held by process {os.getpid()} of "
        with pytest.raises(OSError, match=match) as error, hold_lock(path, max_wait_s=0.1):
            pass
        assert error.value.filename == str(path)
    (said,) = caplog.messages
    assert said.startswith("waiting, 2.77778e-05 h at most, for process ")
    assert said.endswith(f", which has {path}")
    with hold_lock(path), pytest.raises(Timeout):
        make_private_lock(path).acquire(timeout=0)


@needs_root
def test_nobody_waits_for_a_stranger() -> None:
    with shared_folder() as folder:
        path = folder / "lock"
        path.touch(mode=0o644)
        with locked_by_nobody(path) as pid:
            assert is_held_by_other_user(path)
            match = f"is held by process {pid} of "
            with pytest.raises(OSError, match=match) as error, hold_lock(path):
                pass
            assert error.value.filename == str(path)
        with hold_lock(path):
            pass


def test_a_link_in_the_place_of_a_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "target")
    match = "is a link and no lock: remove it"
    with pytest.raises(OSError, match=match), hold_lock(tmp_path / "lock"):
        pass
    assert not (tmp_path / "target").exists()
