"""Files that exist only when they are whole."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import Timeout

from vssl_dist import durable
from vssl_dist.durable import open_regular_file
from vssl_dist.errors import DataError
from vssl_dist.locks import describe_lock_holder, make_private_lock

_EARLIER_PARTIAL_NAME = re.compile(
    r"\.(shard-\d+[\w.]*|survey-\d+|[0-9a-f]{32}\.tar|(manifest|recipe)\.json|inputs\.npy|rejects\.jsonl)"
    r"\.tmp-\d+",
    re.ASCII,
)
"""``.NAME.tmp-PID``, as earlier versions called what was not yet whole."""


def first_bytes(path: str | Path, size: int) -> bytes:
    """Read the first bytes of a file.

    Raises:
        OSError: The file is not regular, or cannot be read.
    """
    with open_regular_file(Path(path)) as file:
        return os.read(file.fileno(), size)


@contextmanager
def whole_file(path: Path, *, flush: bool = True) -> Iterator[BinaryIO]:
    """Write a file that exists only when it is whole, by `durable.open_whole_file`.

    Args:
        path: The file.
        flush: Wait for the disk; not needed for what a power cut may take.

    Raises:
        DataError: The disk is full, the folder read-only, or the like.
    """
    try:
        with durable.open_whole_file(path, flush=flush) as file:
            yield file
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_whole(path: Path, blob: bytes, *, flush: bool = True) -> None:
    """Write ``blob`` as a file that exists only when it is whole."""
    with whole_file(path, flush=flush) as file:
        file.write(blob)


@contextmanager
def hold_lock(lock_path: Path, folder: Path, activity: str) -> Iterator[None]:
    """Hold a lock while the block runs, in a folder that is made if needed.

    Args:
        lock_path: The lock's file.
        folder: The folder that the lock guards, to be named in a refusal.
        activity: What another process is doing there.

    Raises:
        DataError: Another process has the lock, or the file system refuses something.
    """
    try:
        for path in (lock_path.parent, lock_path):
            durable.resolve_trusted_links(path)
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        acquired_lock = make_private_lock(lock_path)
        acquired_lock.acquire(timeout=0)
    except Timeout:
        raise DataError(
            f"{folder}: another {activity}: wait for it ({describe_lock_holder(lock_path)})"
        ) from None
    except PermissionError as error:
        reason = error.strerror
        if lock_path.exists():  # also of a colleague whose call was killed
            owner_name = durable.user_name(lock_path.lstat().st_uid)
            reason = f"{lock_path} belongs to {owner_name}: remove it"
        raise DataError(f"{folder}: cannot be made ({reason})") from error
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        yield
    finally:
        acquired_lock.release()


def remove_partial_files(folder: Path) -> None:
    """Remove what interrupted writers left behind, also those of earlier versions."""
    for path in folder.glob(".*"):
        is_partial = durable.is_partial_file_name(path.name)
        is_partial = is_partial or bool(_EARLIER_PARTIAL_NAME.fullmatch(path.name))
        if is_partial and stat.S_ISREG(path.lstat().st_mode):
            path.unlink(missing_ok=True)
