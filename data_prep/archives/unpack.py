"""Compressed archives, unpacked for as long as they are read: their members have to be found again.

They lie in the folder of the dataset that is made from them, where there must be as much room
for its shards, and go when the program ends.  After a kill the same call finds them again.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ..files import (
    first_bytes,
    hold_lock,
    remove_partial_files,
    whole_file,
)
from .tars import damage_as_archive_error, file_stamp

FOLDER = ".unpacked"
_GZIP = b"\x1f\x8b"
_PIECE = 1 << 20


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed; not if it cannot be read.

    A file that begins like a gzip is one, whatever it is called.
    """
    try:
        return first_bytes(path, len(_GZIP)) == _GZIP
    except OSError:
        return False


class Unpacker:
    """Archives as they are without compression, in a folder that is made for the first of them."""

    def __init__(self, folder: Path, ending: ExitStack) -> None:
        self._folder = folder
        self._ending = ending
        self._claimed = False

    def __call__(self, path: Path) -> Path:
        """An uncompressed archive of the same contents.

        Raises:
            DataError: The archive is damaged, the disk full, or another process is at it.
        """
        if not self._claimed:
            self._claim()
        facts = f"{path.absolute()}\0{file_stamp(path)}".encode("utf-8", "surrogateescape")
        target = self._folder / f"{hashlib.sha256(facts).hexdigest()[:32]}.tar"
        if not target.exists():
            with whole_file(target) as file:
                for piece in _inflated(path):
                    file.write(piece)
        return target

    def _claim(self) -> None:
        """Hold the folder until the end, and let it go then with whatever is in it."""
        lone = not self._folder.parent.exists()
        lock = self._folder / "lock"
        self._ending.enter_context(hold_lock(lock, self._folder, "process is unpacking into it"))
        self._claimed = True
        if lone:
            self._ending.callback(_remove_empty, self._folder.parent)
        self._ending.callback(shutil.rmtree, self._folder, ignore_errors=True)
        remove_partial_files(self._folder)


@contextmanager
def unpacking(out: Path) -> Iterator[Unpacker]:
    """Have archives unpacked while the block runs.

    Args:
        out: Folder of the dataset; made when the first archive is unpacked.
    """
    with ExitStack() as ending:
        yield Unpacker(out / FOLDER, ending)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _inflated(path: Path) -> Iterator[bytes]:
    with damage_as_archive_error(path), gzip.open(path) as whole:
        while piece := whole.read(_PIECE):
            yield piece
