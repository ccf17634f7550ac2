"""What lies in a folder of class folders: images, and whatever else."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vssl_dist.errors import DataError

from ..files import first_bytes
from ..images.signatures import (
    HEAD_BYTES,
    has_picture_suffix,
    is_picture,
)
from .base import LeftOut
from .split_folders import describe_left_out, is_folder, list_names, stat_error, unreadable_error

FileFacts = tuple[int, int, int, int]
"""What changes with a file: its size, times and inode."""
_UNREAD: FileFacts = (0, 0, 0, 0)


@dataclass
class FolderWalk:
    """What was seen below a folder; names are relative to it."""

    top: Path
    skips: bool
    """Whether what cannot be read is an image all the same, which is found bad later."""
    images: list[tuple[str, FileFacts]] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def enter(self, folder: Path, name: str, above: Sequence[Path] = ()) -> None:
        """See all that is in a folder of the tree.

        Args:
            folder: Its path.
            name: Its path from ``top``.
            above: The folders it lies in, within ``top``.

        Raises:
            DataError: Something cannot be read, and is not to be skipped.
        """
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._see(entry, f"{name}/{entry.name}", (*above, folder))
        except OSError as error:
            self._unread(folder, name, error)

    def _see(self, entry: os.DirEntry[str], name: str, above: tuple[Path, ...]) -> None:
        try:
            if entry.name.startswith("."):
                self.left_out.append(describe_left_out(Path(entry.path), name, "hidden"))
            elif entry.is_dir():
                self._see_folder(entry, name, above)
            else:
                self._see_file(entry, name)
        except OSError as error:
            self._unread(Path(entry.path), name, error)

    def _see_folder(self, entry: os.DirEntry[str], name: str, above: tuple[Path, ...]) -> None:
        around = (*above, self.top, *self.top.absolute().parents)
        if entry.is_symlink() and any(one.samefile(entry.path) for one in around):
            self.left_out.append(LeftOut.folder(name, "a link to a folder that it lies in"))
            return
        before = len(self.images) + len(self.left_out)
        self.enter(Path(entry.path), name, above)
        if len(self.images) + len(self.left_out) == before:
            self.left_out.append(LeftOut.folder(name, "an empty folder"))

    def _see_file(self, entry: os.DirEntry[str], name: str) -> None:
        facts = entry.stat()
        regular = stat.S_ISREG(facts.st_mode)
        if not has_picture_suffix(entry.name):
            # Not even opened if it is none: a pipe would be waited for, a device may do anything.
            if not regular:
                self.left_out.append(LeftOut.file(name, "not a regular file"))
                return
            if not is_picture(first_bytes(entry.path, HEAD_BYTES)):
                self.left_out.append(LeftOut.file(name))
                return
        inode = facts.st_ino & (1 << 63) - 1  # some file systems use all 64 bits
        self.images.append((name, (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, inode)))

    def _unread(self, path: Path, name: str, error: OSError) -> None:
        if not self.skips:
            raise unreadable_error(path, error) from error
        self.images.append((name, _UNREAD))


def walk_class_folder(top: Path, class_name: str, skips: bool) -> FolderWalk:
    """What lies in a class folder, sorted.

    Args:
        top: Holds the class folder.
        class_name: Its name.
        skips: Whether what cannot be read counts as an image.

    Raises:
        DataError: Something cannot be read, and is not to be skipped.
    """
    walk = FolderWalk(top, skips)
    walk.enter(top / class_name, class_name)
    walk.images.sort()
    walk.left_out.sort(key=lambda one: one.name)
    return walk


def list_classes(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a folder, sorted.

    Raises:
        DataError: It cannot be listed, or has none.
    """
    names = [name for name in list_names(folder) if is_class_folder(folder / name)]
    if not names:
        raise DataError(f"{folder}: no class folders in it (one folder per class is expected)")
    return tuple(names)


def list_classless(folder: Path, skips: bool) -> list[LeftOut]:
    """What lies beside the class folders, and in folders without a picture.

    Raises:
        DataError: A link to nothing, which may be a class, is not to be skipped.
    """
    left_out: list[LeftOut] = []
    for name in list_names(folder):
        path = folder / name
        if is_class_folder(path):
            continue
        if not skips and (error := stat_error(path)):
            raise unreadable_error(path, error)
        if is_folder(path) and not name.startswith("."):
            left_out += walk_class_folder(folder, name, skips=True).left_out
        else:
            left_out.append(describe_left_out(path, name, "lies in no class folder"))
    return left_out


def is_class_folder(path: Path) -> bool:
    """Whether there is a folder that is not hidden, and not one of other files than pictures.

    An empty one is a class: its pictures may be missing.
    """
    if not is_folder(path) or path.name.startswith("."):
        return False
    try:
        with os.scandir(path) as entries:
            if any(
                has_picture_suffix(one.name) and not one.name.startswith(".") for one in entries
            ):
                return True
    except OSError:
        return True
    walk = walk_class_folder(path.parent, path.name, skips=True)
    return bool(walk.images) or all(
        one.kind == "folder" and not one.within for one in walk.left_out
    )
