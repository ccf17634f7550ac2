"""Folders of a root that are splits: they go by many names."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from vssl_dist.errors import DataError

from .base import LeftOutEntry

FOLDER_NAMES_BY_SPLIT = {
    "train": frozenset({"train", "training"}),
    "val": frozenset({"val", "valid", "validation", "dev", "eval"}),
    "test": frozenset({"test", "testing"}),
}
"""Names that the folder of each split may have, in letters of any case."""


def split_by_folder_name(name: str) -> str:
    """Return the split that a folder of some name is; "" for any other folder.

    >>> split_by_folder_name("Validation"), split_by_folder_name("cats")
    ('val', '')
    """
    return next(
        (split for split, names in FOLDER_NAMES_BY_SPLIT.items() if name.lower() in names), ""
    )


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder that can be reached."""
    try:
        return path.is_dir()
    except OSError:
        return False


def find_split_folders(
    root: Path, is_split: Callable[[Path], bool] = is_folder, skip_unreadable: bool = False
) -> dict[str, Path]:
    """Find the folders of a root that are splits; a test split alone serves as ``val``.

    Args:
        root: A folder.
        is_split: Whether a folder holds what is looked for.
        skip_unreadable: Whether a folder that cannot be reached is left out.

    Raises:
        DataError: Two are the same split, one cannot be reached, or the root cannot be listed.
    """
    folders: dict[str, Path] = {}
    for name in list_names(root):
        split = split_by_folder_name(name)
        if split and not skip_unreadable and (error := stat_error(root / name)):
            raise unreadable_error(root / name, error)
        if not split or not is_folder(root / name) or not is_split(root / name):
            continue
        if split in folders and folders[split].samefile(root / name):
            continue  # a link from one name to another
        if split in folders:
            raise DataError(
                f"{root}: {folders[split].name} and {name} are both a split {split}: merge them or "
                "move one elsewhere"
            )
        folders[split] = root / name
    test_folder = folders.get("test")
    if test_folder and ("val" not in folders or test_folder.samefile(folders["val"])):
        folders.setdefault("val", folders.pop("test"))
    return {split: folders[split] for split in FOLDER_NAMES_BY_SPLIT if split in folders}


def select_splits(
    requested_splits: tuple[str, ...],
    has_named_splits: bool,
    present_splits: Container[str],
    is_test_used_as_val: bool,
) -> tuple[str, ...]:
    """Select the requested splits that are there; () if one that a user named is not.

    Args:
        requested_splits: Names of the requested splits.
        has_named_splits: Whether a user named them.
        present_splits: The splits that are there.
        is_test_used_as_val: Whether ``val`` is a folder called test, for lack of another.
    """
    names = ["val" if name == "test" and is_test_used_as_val else name for name in requested_splits]
    selected = tuple(name for name in dict.fromkeys(names) if name in present_splits)
    return () if has_named_splits and len(selected) < len(names) else selected


def describe_splits(requested_splits: Sequence[str]) -> str:
    """Name the folders that would do for splits; a test split serves where there is no val."""
    return " or ".join("val or test" if name == "val" else name for name in requested_splits)


def list_beside_splits(
    root: Path, splits: dict[str, Path], name_prefix: str = ".."
) -> list[LeftOutEntry]:
    """List what lies in a root beside its splits, by whatever name these are linked."""
    split_names = {path.name for path in splits.values()}
    reachable_splits = [path for path in splits.values() if not stat_error(path)]
    split_names |= {
        name
        for name in list_names(root)
        if not stat_error(root / name)
        and any(path.samefile(root / name) for path in reachable_splits)
    }
    return [
        describe_left_out(
            root / name, f"{name_prefix}/{name}" if name_prefix else name, "lies beside the splits"
        )
        for name in list_names(root)
        if name not in split_names
    ]


def describe_left_out(path: Path, name: str, reason: str) -> LeftOutEntry:
    """Describe a file or folder as one entry that is left out."""
    if error := stat_error(path):
        return LeftOutEntry.file(name, f"cannot be read ({error.strerror})")
    if not is_folder(path):
        return LeftOutEntry.file(name, reason)
    folder_reason = "a hidden folder" if path.name.startswith(".") else reason
    return LeftOutEntry.folder(name, folder_reason, count_files(path))


def count_files(folder: Path) -> int:
    """Count the files in a folder and those below; a folder that is only linked counts none."""
    if folder.is_symlink():
        return 0
    return sum(len(names) for _, _, names in os.walk(folder))


def stat_error(path: Path) -> OSError | None:
    """Return what keeps a path from being followed, as at a link to nothing."""
    try:
        path.stat()
    except OSError as error:
        return error
    return None


def unreadable_error(path: Path, error: OSError) -> DataError:
    """Make the refusal of a file or folder that cannot be read."""
    remedy = "repair or remove it, or give --on-bad skip"
    return DataError(f"{path}: cannot be read ({error.strerror}): {remedy}")


def list_names(folder: Path) -> list[str]:
    """List the names in a folder, sorted.

    Raises:
        DataError: The folder cannot be listed.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
