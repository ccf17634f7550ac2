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
_GZIP_MAGIC = b"\x1f\x8b"
_UNPACKED_PIECE_BYTES = 1 << 20


def is_gzip(path: Path) -> bool:
    """Tell whether a file is compressed; one that cannot be read is not.

    A file that begins like a gzip is one, whatever it is called.
    """
    try:
        return first_bytes(path, len(_GZIP_MAGIC)) == _GZIP_MAGIC
    except OSError:
        return False


class ArchiveUnpacker:
    """Unpacks archives into a folder that is made for the first of them."""

    def __init__(self, folder: Path, exit_stack: ExitStack) -> None:
        self._folder = folder
        self._exit_stack = exit_stack
        self._has_claimed_folder = False

    def __call__(self, path: Path) -> Path:
        """Unpack an archive, unless that was done; returns the path of the unpacked one.

        Raises:
            DataError: The archive is damaged, the disk full, or another process is at it.
        """
        if not self._has_claimed_folder:
            self._claim_folder()
        archive_identity = f"{path.absolute()}\0{file_stamp(path)}".encode(
            "utf-8", "surrogateescape"
        )
        unpacked_path = self._folder / f"{hashlib.sha256(archive_identity).hexdigest()[:32]}.tar"
        if not unpacked_path.exists():
            with whole_file(unpacked_path) as file:
                for piece in _iter_unpacked_pieces(path):
                    file.write(piece)
        return unpacked_path

    def _claim_folder(self) -> None:
        """Hold the folder until the end, and remove it then with whatever is in it."""
        is_new_dataset = not self._folder.parent.exists()
        lock_path = self._folder / "lock"
        self._exit_stack.enter_context(
            hold_lock(lock_path, self._folder, "process is unpacking into it")
        )
        self._has_claimed_folder = True
        if is_new_dataset:
            self._exit_stack.callback(_remove_empty_folder, self._folder.parent)
        self._exit_stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
        remove_partial_files(self._folder)


@contextmanager
def archive_unpacker(out: Path) -> Iterator[ArchiveUnpacker]:
    """Unpack archives for as long as the block runs.

    Args:
        out: Folder of the dataset; made when the first archive is unpacked.
    """
    with ExitStack() as exit_stack:
        yield ArchiveUnpacker(out / FOLDER, exit_stack)


def _remove_empty_folder(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _iter_unpacked_pieces(path: Path) -> Iterator[bytes]:
    with damage_as_archive_error(path), gzip.open(path) as gzip_file:
        while piece := gzip_file.read(_UNPACKED_PIECE_BYTES):
            yield piece
