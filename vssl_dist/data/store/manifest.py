"""The manifest: what a folder of shards consists of, and the layout of an index row.

It is written last and states names, counts, sizes and checksums, so that a folder with a
manifest is a whole one.  Its last entry is a digest of the others; the digest of the file's
bytes is the dataset's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from vssl_dist.errors import DataError as DataError  # whoever reads manifests has both
from vssl_dist.installed import command_line

FORMAT = "vssl-dist/1"
MANIFEST = "manifest.json"
INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("label", "<i8"),
        ("crc32", "<u4"),
    ]
)
_SHARD_NAME_PATTERN = re.compile(r"shard-\d{6,18}\.tar")
_MAX_SEARCHED_ENTRIES = 100  # of a folder in which pictures are searched, to name one in a message
_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_MAX_MANIFEST_BYTES = 2**30  # a million shards take 300 MB: a larger file is no manifest
# numpy's header of an index, which it pads, takes a few hundred bytes.
MAX_INDEX_HEADER_BYTES = 4096
# Files that a message names, so that it stays one line that a person reads.
_MAX_LISTED_PROBLEMS = 12


@dataclass(frozen=True)
class ShardEntry:
    """The statements of the manifest about one shard."""

    name: str
    bytes: int
    samples: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Return the file name of the shard's index.

        >>> ShardEntry("shard-000007.tar", 0, 0, "", "").index_name
        'shard-000007.idx.npy'
        """
        return self.name.removesuffix(".tar") + ".idx.npy"


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json`` and the digest of its bytes."""

    name: str
    split: str
    samples: int
    classes: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    source: dict[str, Any]
    fingerprint: str


def seal(contents: Mapping[str, object]) -> bytes:
    """Encode the contents of a manifest as JSON that ends with a digest of the contents."""
    unsealed_contents = {key: value for key, value in contents.items() if key != "digest"}
    contents_digest = hashlib.sha256(
        json.dumps(unsealed_contents, sort_keys=True).encode()
    ).hexdigest()
    return (json.dumps({**unsealed_contents, "digest": contents_digest}, indent=1) + "\n").encode()


def read_manifest(folder: Path, *, sealed: bool = True) -> Manifest:
    """Read and check ``folder/manifest.json`` and no other file.

    Args:
        folder: The folder of one split.
        sealed: Whether every byte must be as it was written.

    Raises:
        DataError: There is no dataset here, or its manifest is damaged or was edited.
    """
    path = folder / MANIFEST
    try:
        file_status = path.stat()  # a pipe would be waited for
        if not stat.S_ISREG(file_status.st_mode) or file_status.st_size > _MAX_MANIFEST_BYTES:
            raise DataError(f"{path}: not a file of at most {_MAX_MANIFEST_BYTES} bytes")
        manifest_bytes = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_explain_absence(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        manifest, is_unchanged = _parse_manifest(manifest_bytes)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path}: damaged manifest ({reason}): shard the data anew") from error
    if sealed and not is_unchanged:
        raise DataError(f"{path}: was edited or damaged after sharding: shard the data anew")
    return manifest


def _parse_manifest(manifest_bytes: bytes) -> tuple[Manifest, bool]:
    """Return the manifest, and whether its bytes are the ones that `seal` wrote."""
    manifest_json = json.loads(manifest_bytes)
    if manifest_json["format"] != FORMAT:
        raise ValueError(f"format {manifest_json['format']!r} is not {FORMAT!r}")
    shards = tuple(
        ShardEntry(
            name=str(entry["name"]),
            bytes=_check_count(entry["bytes"]),
            samples=_check_count(entry["samples"]),
            sha256=str(entry["sha256"]),
            index_sha256=str(entry["index_sha256"]),
        )
        for entry in manifest_json["shards"]
    )
    if not all(_SHARD_NAME_PATTERN.fullmatch(shard.name) for shard in shards):
        raise ValueError("a shard with an odd name")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    if _check_count(manifest_json["samples"]) != sum(shard.samples for shard in shards):
        raise ValueError("the samples of the shards do not add up")
    manifest = Manifest(
        name=str(manifest_json["name"]),
        split=str(manifest_json["split"]),
        samples=manifest_json["samples"],
        classes=tuple(str(name) for name in manifest_json["classes"]),
        shards=shards,
        source=dict(manifest_json["source"]),
        fingerprint=hashlib.sha256(manifest_bytes).hexdigest(),
    )
    return manifest, manifest_bytes == seal(manifest_json)


def _check_count(value: object) -> int:
    """Check a number of bytes or samples: whole, above 0 and within an int64."""
    if type(value) is not int or not 0 < value < 2**63:
        raise ValueError(f"{value!r:.50} is not a number of bytes or samples")
    return value


def _explain_absence(folder: Path) -> str:
    """Say why a folder has no manifest, and what to do."""
    if not folder.is_dir():
        return f"{folder}: no such folder of shards (make it with data_prep/shard.py)"
    split_names = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if split_names:
        split_folders_text = " or ".join(str(folder / split) for split in split_names)
        return f"{folder}: holds splits, name one of them: {split_folders_text}"
    if _is_link(folder / MANIFEST):
        return f"{folder / MANIFEST}: links to what is missing (is its file system mounted?)"
    if picture_name := _find_picture_name(folder):
        shard_command = command_line("data_prep/shard.py")
        return (
            f"{folder}: holds pictures such as {picture_name}, no shards: {shard_command} "
            f"imagefolder --root {folder} --out FOLDER, then give FOLDER/train"
        )
    return f"{folder}: no {MANIFEST}, so sharding did not finish (run data_prep/shard.py again)"


def _find_picture_name(folder: Path) -> str:
    """Return the name of a picture in a folder or in one of its first folders, or ""."""
    try:
        entries = list(islice(folder.iterdir(), _MAX_SEARCHED_ENTRIES))
        entries_below = [
            islice(entry.iterdir(), _MAX_SEARCHED_ENTRIES)
            for entry in entries[:3]
            if entry.is_dir()
        ]
        paths = [
            path
            for path in chain(entries, *entries_below)
            if path.suffix.lower() in _PICTURE_SUFFIXES
        ]
    except OSError:
        return ""
    return str(min(paths).relative_to(folder)) if paths else ""


def iter_size_problems(
    folder: Path,
    manifest: Manifest,
    waiting_for: Callable[[Path], AbstractContextManager[object]] = nullcontext,
) -> Iterator[tuple[str, str]]:
    """Yield each file that is missing, unreadable or of another size, without reading any.

    Args:
        folder: The folder of one split.
        manifest: The files that there must be.
        waiting_for: Called with a path; entered while the file system is asked about it.

    Yields:
        File name, and what is wrong with the file.
    """
    for entry in manifest.shards:
        index_row_bytes = entry.samples * INDEX_DTYPE.itemsize
        files = (
            (entry.name, entry.bytes, 0),
            (entry.index_name, index_row_bytes, MAX_INDEX_HEADER_BYTES),
        )
        for name, expected_bytes, slack_bytes in files:
            with waiting_for(folder / name):
                problem = _find_size_problem(folder / name, expected_bytes, slack_bytes)
            if problem:
                yield name, problem


def join_first_problems(problems: Sequence[str]) -> str:
    """Join the first problems, and say how many more there are."""
    rest_text = (
        f" and {len(problems) - _MAX_LISTED_PROBLEMS} more"
        if len(problems) > _MAX_LISTED_PROBLEMS
        else ""
    )
    return f"{', '.join(problems[:_MAX_LISTED_PROBLEMS])}{rest_text}"


def _find_size_problem(path: Path, expected_bytes: int, slack_bytes: int) -> str:
    try:
        file_status = path.stat()
    except FileNotFoundError:
        return "links to what is missing" if _is_link(path) else "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(file_status.st_mode):
        return "is not a regular file"
    if not expected_bytes <= file_status.st_size <= expected_bytes + slack_bytes:
        return f"has {file_status.st_size} bytes instead of {expected_bytes}"
    return "" if os.access(path, os.R_OK) else "may not be read (permission denied)"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # storage that fails now and then
        return False
