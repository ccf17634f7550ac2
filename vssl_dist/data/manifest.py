"""The manifest: what a folder of shards consists of, and how the rows of an index look.

It is written last and states names, counts, sizes and checksums, so that a folder with a
manifest is a whole one.  Its last entry is a digest of the others; the digest of the file's
bytes is the dataset's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

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
_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")


class DataError(ValueError):
    """The data cannot be used; the message is one line with the file and the remedy."""


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest states about one shard."""

    name: str
    bytes: int
    samples: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """File name of the shard's index.

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


def seal(contents: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest file: the contents as JSON, closed by a digest of themselves."""
    body = {key: value for key, value in contents.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**body, "digest": digest}, indent=1) + "\n").encode()


def read_manifest(folder: Path, *, sealed: bool = True) -> Manifest:
    """Read and check ``folder/manifest.json``; looks at no other file.

    Args:
        folder: The folder of one split.
        sealed: Insist that every byte is as it was written.

    Raises:
        DataError: There is no dataset here, or its manifest is damaged or was edited.
    """
    path = folder / MANIFEST
    try:
        blob = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_absent(folder)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        manifest, intact = _parse(blob)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}: damaged manifest ({reason}): shard the data anew") from error
    if sealed and not intact:
        raise DataError(f"{path}: was edited or damaged after sharding: shard the data anew")
    return manifest


def _parse(blob: bytes) -> tuple[Manifest, bool]:
    """The manifest, and whether its bytes are the ones that `seal` wrote."""
    raw = json.loads(blob)
    if raw["format"] != FORMAT:
        raise ValueError(f"format {raw['format']!r} is not {FORMAT!r}")
    shards = tuple(
        ShardEntry(
            name=str(entry["name"]),
            bytes=int(entry["bytes"]),
            samples=int(entry["samples"]),
            sha256=str(entry["sha256"]),
            index_sha256=str(entry["index_sha256"]),
        )
        for entry in raw["shards"]
    )
    if any(not _SHARD_NAME.fullmatch(shard.name) or shard.samples <= 0 for shard in shards):
        raise ValueError("a shard with an odd name or without samples")
    if int(raw["samples"]) != sum(shard.samples for shard in shards) or not shards:
        raise ValueError("the samples of the shards do not add up")
    manifest = Manifest(
        name=str(raw["name"]),
        split=str(raw["split"]),
        samples=int(raw["samples"]),
        classes=tuple(str(name) for name in raw["classes"]),
        shards=shards,
        source=dict(raw["source"]),
        fingerprint=hashlib.sha256(blob).hexdigest(),
    )
    return manifest, blob == seal(raw)


def _absent(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: no such folder of shards (make it with data_prep/shard.py)"
    below = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if below:
        choices = " or ".join(str(folder / name) for name in below)
        return f"{folder}: holds splits, name one of them: {choices}"
    return f"{folder}: no {MANIFEST}, so sharding did not finish (run data_prep/shard.py again)"


def ill_sized(folder: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What stat alone tells: each file that is missing or of another length, and how so."""
    for entry in manifest.shards:
        rows = entry.samples * INDEX_DTYPE.itemsize
        for name, least in ((entry.name, entry.bytes), (entry.index_name, rows)):
            try:
                size = (folder / name).stat().st_size
            except OSError as error:
                yield name, f"is missing ({error.strerror})"
                continue
            # An index also has a header, whose length is numpy's affair.
            if size < least or (size > least and name == entry.name):
                yield name, f"has {size} bytes instead of {least}"
