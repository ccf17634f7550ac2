"""Folders of class folders: their images, and whatever else lies there."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vssl_dist.errors import DataError

from ..files import first_bytes
from ..images.signatures import (
    FILE_HEAD_BYTES,
    has_picture_signature,
    has_picture_suffix,
)
from .base import LeftOutEntry
from .split_folders import describe_left_out, is_folder, list_names, stat_error, unreadable_error

FileStamp = tuple[int, int, int, int]
"""Size, times and inode of a file, which change when it is replaced."""
_UNREADABLE_FILE_STAMP: FileStamp = (0, 0, 0, 0)


@dataclass
class ClassFolderWalk:
    """What a walk through a folder saw; names are relative to ``top``."""

    top: Path
    skip_unreadable: bool
    """Whether a file that cannot be read is listed as an image, to be rejected later."""
    images: list[tuple[str, FileStamp]] = field(default_factory=list)
    left_out: list[LeftOutEntry] = field(default_factory=list)

    def add_folder(self, folder: Path, name: str, parent_folders: Sequence[Path] = ()) -> None:
        """Add all that is in a folder of the tree.

        Args:
            folder: Path of the folder.
            name: Path of the folder from ``top``.
            parent_folders: The folders that it lies in, within ``top``.

        Raises:
            DataError: Something cannot be read, and is not to be skipped.
        """
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    self._add_entry(entry, f"{name}/{entry.name}", (*parent_folders, folder))
        except OSError as error:
            self._add_unreadable(folder, name, error)

    def _add_entry(
        self, entry: os.DirEntry[str], name: str, parent_folders: tuple[Path, ...]
    ) -> None:
        try:
            if entry.name.startswith("."):
                self.left_out.append(describe_left_out(Path(entry.path), name, "hidden"))
            elif entry.is_dir():
                self._add_subfolder(entry, name, parent_folders)
            else:
                self._add_file(entry, name)
        except OSError as error:
            self._add_unreadable(Path(entry.path), name, error)

    def _add_subfolder(
        self, entry: os.DirEntry[str], name: str, parent_folders: tuple[Path, ...]
    ) -> None:
        enclosing_folders = (*parent_folders, self.top, *self.top.absolute().parents)
        if entry.is_symlink() and any(folder.samefile(entry.path) for folder in enclosing_folders):
            self.left_out.append(LeftOutEntry.folder(name, "a link to a folder that it lies in"))
            return
        num_entries_before = len(self.images) + len(self.left_out)
        self.add_folder(Path(entry.path), name, parent_folders)
        if len(self.images) + len(self.left_out) == num_entries_before:
            self.left_out.append(LeftOutEntry.folder(name, "an empty folder"))

    def _add_file(self, entry: os.DirEntry[str], name: str) -> None:
        file_status = entry.stat()
        is_regular = stat.S_ISREG(file_status.st_mode)
        if not has_picture_suffix(entry.name):
            # Not even opened if it is none: a pipe would be waited for, a device may do anything.
            if not is_regular:
                self.left_out.append(LeftOutEntry.file(name, "not a regular file"))
                return
            if not has_picture_signature(first_bytes(entry.path, FILE_HEAD_BYTES)):
                self.left_out.append(LeftOutEntry.file(name))
                return
        inode = file_status.st_ino & (1 << 63) - 1  # some file systems use all 64 bits
        self.images.append(
            (name, (file_status.st_size, file_status.st_mtime_ns, file_status.st_ctime_ns, inode))
        )

    def _add_unreadable(self, path: Path, name: str, error: OSError) -> None:
        if not self.skip_unreadable:
            raise unreadable_error(path, error) from error
        self.images.append((name, _UNREADABLE_FILE_STAMP))


def walk_class_folder(top: Path, class_name: str, skip_unreadable: bool) -> ClassFolderWalk:
    """Walk through a class folder; images and what is left out are sorted by name.

    Args:
        top: Folder that holds the class folder.
        class_name: Name of the class folder.
        skip_unreadable: Whether what cannot be read counts as an image.

    Raises:
        DataError: Something cannot be read, and is not to be skipped.
    """
    walk = ClassFolderWalk(top, skip_unreadable)
    walk.add_folder(top / class_name, class_name)
    walk.images.sort()
    walk.left_out.sort(key=lambda entry: entry.name)
    return walk


def list_classes(folder: Path) -> tuple[str, ...]:
    """List the names of the class folders in a folder, sorted.

    Raises:
        DataError: The folder cannot be listed, or has no class folder.
    """
    names = [name for name in list_names(folder) if is_class_folder(folder / name)]
    if not names:
        raise DataError(f"{folder}: no class folders in it (one folder per class is expected)")
    return tuple(names)


def list_outside_classes(folder: Path, skip_unreadable: bool) -> list[LeftOutEntry]:
    """List what lies beside the class folders, and in folders without a picture.

    Raises:
        DataError: A link to nothing, which may be a class, is not to be skipped.
    """
    left_out: list[LeftOutEntry] = []
    for name in list_names(folder):
        path = folder / name
        if is_class_folder(path):
            continue
        if not skip_unreadable and (error := stat_error(path)):
            raise unreadable_error(path, error)
        if is_folder(path) and not name.startswith("."):
            left_out += walk_class_folder(folder, name, skip_unreadable=True).left_out
        else:
            left_out.append(describe_left_out(path, name, "lies in no class folder"))
    return left_out


def is_class_folder(path: Path) -> bool:
    """Tell whether a path is a folder that is not hidden and does not only hold other files.

    An empty one is a class: its pictures may be missing.
    """
    if not is_folder(path) or path.name.startswith("."):
        return False
    try:
        with os.scandir(path) as entries:
            if any(
                has_picture_suffix(entry.name) and not entry.name.startswith(".")
                for entry in entries
            ):
                return True
    except OSError:
        return True
    walk = walk_class_folder(path.parent, path.name, skip_unreadable=True)
    return bool(walk.images) or all(
        entry.kind == "folder" and not entry.num_files_within for entry in walk.left_out
    )
