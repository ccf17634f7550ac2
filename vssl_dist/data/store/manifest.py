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
_SHARD_NAME = re.compile(r"shard-\d{6,18}\.tar")
_SEARCHED_ENTRIES = 100  # of a folder in which pictures are searched, to name one in a message
_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_MAX_MANIFEST = 2**30  # a million shards take 300 MB: a larger file is no manifest
# numpy's header of an index, which it pads, takes a few hundred bytes.
INDEX_HEADER = 4096
_MAX_LISTED = 12  # files that a message names, so that it stays one line that a person reads


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
    body = {key: value for key, value in contents.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "digest": digest}, indent=1) + "\n").encode()


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
        status = path.stat()  # a pipe would be waited for
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MANIFEST:
            raise DataError(f"{path}: not a file of at most {_MAX_MANIFEST} bytes")
        blob = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_absence(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        manifest, intact = _parse(blob)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise DataError(f"{path}: damaged manifest ({reason}): shard the data anew") from error
    if sealed and not intact:
        raise DataError(f"{path}: was edited or damaged after sharding: shard the data anew")
    return manifest


def _parse(blob: bytes) -> tuple[Manifest, bool]:
    """Return the manifest, and whether its bytes are the ones that `seal` wrote."""
    raw = json.loads(blob)
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r} is not {FORMAT!r}")
    shards = tuple(
        ShardEntry(
            name=str(entry["name"]),
            bytes=_count(entry["bytes"]),
            samples=_count(entry["samples"]),
            sha256=str(entry["sha256"]),
            index_sha256=str(entry["index_sha256"]),
        )
        for entry in raw["shards"]
    )
    if not all(_SHARD_NAME.fullmatch(shard.name) for shard in shards):
        raise ValueError("a shard with an odd name")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("a shard is listed twice")
    if _count(raw["samples"]) != sum(shard.samples for shard in shards):
        raise ValueError("the samples of the shards do not add up")
    manifest = Manifest(
        name=str(raw["name"]),
        split=str(raw["split"]),
        samples=raw["samples"],
        classes=tuple(str(name) for name in raw["classes"]),
        shards=shards,
        source=dict(raw["source"]),
        fingerprint=hashlib.sha256(blob).hexdigest(),
    )
    return manifest, blob == seal(raw)


def _count(value: object) -> int:
    """Check a number of bytes or samples: whole, above 0 and within an int64."""
    if type(value) is not int or not 0 < value < 2**63:
        raise ValueError(f"{value!r:.50} is not a number of bytes or samples")
    return value


def _absence(folder: Path) -> str:
    """Say why a folder has no manifest, and what to do."""
    if not folder.is_dir():
        return f"{folder}: no such folder of shards (make it with data_prep/shard.py)"
    splits = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if splits:
        choices = " or ".join(str(folder / split) for split in splits)
        return f"{folder}: holds splits, name one of them: {choices}"
    if _is_link(folder / MANIFEST):
        return f"{folder / MANIFEST}: links to what is missing (is its file system mounted?)"
    if picture := _picture_name(folder):
        shard_command = command_line("data_prep/shard.py")
        return (
            f"{folder}: holds pictures such as {picture}, no shards: {shard_command} "
            f"imagefolder --root {folder} --out FOLDER, then give FOLDER/train"
        )
    return f"{folder}: no {MANIFEST}, so sharding did not finish (run data_prep/shard.py again)"


def _picture_name(folder: Path) -> str:
    """Return the name of a picture in a folder or in one of its first folders, or ""."""
    try:
        entries = list(islice(folder.iterdir(), _SEARCHED_ENTRIES))
        below = [
            islice(entry.iterdir(), _SEARCHED_ENTRIES) for entry in entries[:3] if entry.is_dir()
        ]
        paths = [
            path for path in chain(entries, *below) if path.suffix.lower() in _PICTURE_SUFFIXES
        ]
    except OSError:
        return ""
    return str(min(paths).relative_to(folder)) if paths else ""


def size_problems(
    folder: Path,
    manifest: Manifest,
    waiting: Callable[[Path], AbstractContextManager[object]] = nullcontext,
) -> Iterator[tuple[str, str]]:
    """Yield each file that is missing, unreadable or of another size, without reading any.

    Args:
        folder: The folder of one split.
        manifest: The files that there must be.
        waiting: Called with a path; entered while the file system is asked about it.

    Yields:
        File name, and what is wrong with the file.
    """
    for entry in manifest.shards:
        index_size = entry.samples * INDEX_DTYPE.itemsize
        files = ((entry.name, entry.bytes, 0), (entry.index_name, index_size, INDEX_HEADER))
        for name, size, slack in files:
            with waiting(folder / name):
                problem = _size_problem(folder / name, size, slack)
            if problem:
                yield name, problem


def join_first(problems: Sequence[str]) -> str:
    """Join the first problems, and say how many more there are."""
    more = f" and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
    return f"{', '.join(problems[:_MAX_LISTED])}{more}"


def _size_problem(path: Path, size: int, slack: int) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        return "links to what is missing" if _is_link(path) else "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if not size <= status.st_size <= size + slack:
        return f"has {status.st_size} bytes instead of {size}"
    return "" if os.access(path, os.R_OK) else "may not be read (permission denied)"


def _is_link(path: Path) -> bool:
    try:
        return path.is_symlink()
    except OSError:  # storage that fails now and then
        return False
