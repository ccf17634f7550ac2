"""Which folders of a root are splits: they go by many names."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Sequence
from pathlib import Path

from vssl_dist.errors import DataError

from .base import LeftOut

FOLDER_NAMES = {
    "train": frozenset({"train", "training"}),
    "val": frozenset({"val", "valid", "validation", "dev", "eval"}),
    "test": frozenset({"test", "testing"}),
}
"""What the folder of each split may be called, in letters of any case."""


def split_by_folder_name(name: str) -> str:
    """The split that a folder of some name is; "" for any other folder.

    >>> split_by_folder_name("Validation"), split_by_folder_name("cats")
    ('val', '')
    """
    return next((split for split, names in FOLDER_NAMES.items() if name.lower() in names), "")


def is_folder(path: Path) -> bool:
    """Whether there is a folder; whatever keeps it from being reached, there is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def find_split_folders(
    root: Path, holds: Callable[[Path], bool] = is_folder, skips: bool = False
) -> dict[str, Path]:
    """The folders of a root that are splits; a test split alone serves as ``val``.

    Args:
        root: A folder.
        holds: Whether a folder holds what is looked for.
        skips: Whether one that cannot be reached is left out.

    Raises:
        DataError: Two are the same split, one cannot be reached, or the root cannot be listed.
    """
    places: dict[str, Path] = {}
    for name in list_names(root):
        split = split_by_folder_name(name)
        if split and not skips and (error := stat_error(root / name)):
            raise unreadable_error(root / name, error)
        if not split or not is_folder(root / name) or not holds(root / name):
            continue
        if split in places and places[split].samefile(root / name):
            continue  # a link from one name to another
        if split in places:
            raise DataError(
                f"{root}: {places[split].name} and {name} are both a split {split}: merge them or "
                "move one elsewhere"
            )
        places[split] = root / name
    test = places.get("test")
    if test and ("val" not in places or test.samefile(places["val"])):
        places.setdefault("val", places.pop("test"))
    return {split: places[split] for split in FOLDER_NAMES if split in places}


def select_splits(
    asked: tuple[str, ...], explicit: bool, places: Container[str], test_serves: bool
) -> tuple[str, ...]:
    """Those of the splits asked for that are there; () if one that was named is not.

    Args:
        asked: Their names.
        explicit: Whether a user named them.
        places: Where each is that is there.
        test_serves: Whether the val is what somebody calls test, for lack of another.
    """
    named = ["val" if name == "test" and test_serves else name for name in asked]
    wanted = tuple(name for name in dict.fromkeys(named) if name in places)
    return () if explicit and len(wanted) < len(named) else wanted


def describe_splits(asked: Sequence[str]) -> str:
    """The folders that would do for splits, in words; a test is the val of who has no other."""
    return " or ".join("val or test" if name == "val" else name for name in asked)


def list_beside_splits(root: Path, splits: dict[str, Path], base: str = "..") -> list[LeftOut]:
    """What lies in a root besides its splits, by whatever name they are linked."""
    taken = {path.name for path in splits.values()}
    there = [path for path in splits.values() if not stat_error(path)]
    taken |= {
        name
        for name in list_names(root)
        if not stat_error(root / name) and any(path.samefile(root / name) for path in there)
    }
    return [
        describe_left_out(root / name, f"{base}/{name}" if base else name, "lies beside the splits")
        for name in list_names(root)
        if name not in taken
    ]


def describe_left_out(path: Path, name: str, reason: str) -> LeftOut:
    """A file or folder as one thing that is left out."""
    if error := stat_error(path):
        return LeftOut.file(name, f"cannot be read ({error.strerror})")
    if not is_folder(path):
        return LeftOut.file(name, reason)
    told = "a hidden folder" if path.name.startswith(".") else reason
    return LeftOut.folder(name, told, count_files(path))


def count_files(folder: Path) -> int:
    """How many files there are in a folder and those below; none in one that is only linked."""
    if folder.is_symlink():
        return 0
    return sum(len(names) for _, _, names in os.walk(folder))


def stat_error(path: Path) -> OSError | None:
    """What keeps a path from being followed, such as a link to nothing."""
    try:
        path.stat()
    except OSError as error:
        return error
    return None


def unreadable_error(path: Path, error: OSError) -> DataError:
    """The refusal of what cannot be read."""
    remedy = "repair or remove it, or give --on-bad skip"
    return DataError(f"{path}: cannot be read ({error.strerror}): {remedy}")


def list_names(folder: Path) -> list[str]:
    """What a folder holds, sorted.

    Raises:
        DataError: It cannot be listed.
    """
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror})") from error
