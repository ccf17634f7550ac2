"""ImageNet's development kit: which synset each validation image shows."""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import numpy as np

from vssl_dist.errors import DataError

from ..archives.tars import read_gzipped_members

FOLDER = "ILSVRC2012_devkit_t12"
ARCHIVE = f"{FOLDER}.tar.gz"

_META_FILE_NAME = "data/meta.mat"
_TRUTH_FILE_NAME = "data/ILSVRC2012_validation_ground_truth.txt"
_MAX_FILE_BYTES = 1 << 26


@dataclass(frozen=True)
class Devkit:
    """What sharding needs of the kit."""

    classes: tuple[str, ...]
    """All synsets that images are of, sorted."""
    validation_synsets: tuple[str, ...]
    """The synset of each validation image, in the order of their numbers."""


def read_devkit(root: Path) -> Devkit | None:
    """Read the kit in ``root``, packed or unpacked; None if there is none.

    Raises:
        DataError: It is damaged.
    """
    archive = root.parent / ARCHIVE if root.is_file() else root / ARCHIVE
    folder = archive.with_name(FOLDER)
    if archive.is_file():
        members = read_gzipped_members(
            archive,
            [f"{FOLDER}/{name}" for name in (_META_FILE_NAME, _TRUTH_FILE_NAME)],
            _MAX_FILE_BYTES,
        )
        content_by_name = {name.removeprefix(f"{FOLDER}/"): blob for name, blob in members.items()}
        location = archive
    elif folder.is_dir():
        files = [folder / name for name in (_META_FILE_NAME, _TRUTH_FILE_NAME)]
        readable_files = [
            path for path in files if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES
        ]
        content_by_name = {
            path.relative_to(folder).as_posix(): path.read_bytes() for path in readable_files
        }
        location = folder
    else:
        return None
    for name in (_META_FILE_NAME, _TRUTH_FILE_NAME):
        if name not in content_by_name:
            raise DataError(f"{location}: has no {name}: fetch the official {ARCHIVE}")
    synsets = _read_synsets(content_by_name[_META_FILE_NAME], location)
    try:
        synset_numbers = [int(line) for line in content_by_name[_TRUTH_FILE_NAME].decode().split()]
        return Devkit(
            tuple(sorted(synsets.values())), tuple(synsets[number] for number in synset_numbers)
        )
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{location}: {_TRUTH_FILE_NAME}: {error} is no class of {_META_FILE_NAME}"
        ) from error


def _read_synsets(blob: bytes, location: Path) -> dict[int, str]:
    """Read the WordNet ids of synsets without children, by their numbers in the ground truth."""
    # Imported here, because it takes time that only the validation archive should cost.
    loadmat = import_module("scipy.io").loadmat
    try:
        table = np.atleast_1d(loadmat(io.BytesIO(blob), squeeze_me=True)["synsets"])
        leaf_rows = [row for row in table if int(row["num_children"]) == 0]
        synsets = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaf_rows}
    # A damaged file fails in any way that the reader of the format can.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{location}: {_META_FILE_NAME}: damaged ({reason}): fetch {ARCHIVE} again"
        ) from error
    if not synsets:
        raise DataError(f"{location}: {_META_FILE_NAME}: names no synsets: fetch {ARCHIVE} again")
    return synsets
