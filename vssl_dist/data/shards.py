"""Datasets on disk: tar shards, one index row per sample, and a manifest that seals them.

A dataset is one folder for one split.  ``shard-000000.tar`` is a plain WebDataset tar,
``shard-000000.idx.npy`` holds one ``INDEX_DTYPE`` row per sample of it, ``manifest.json``
states what there must be.  A sample's id is its row in the concatenation of all shards.
Reading one is a single positioned read of its encoded bytes: nothing is unpacked and no tar
header is looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.manifest import (
    INDEX_DTYPE,
    DataError,
    Manifest,
    ill_sized,
    read_manifest,
)
from vssl_dist.data.shardfile import Bytes, ShardFile

__all__ = ["INDEX_DTYPE", "DataError", "Dataset", "Samples", "Substitution"]

# Above the streams that one rank usually owns, below the common limit of 1024 open files.
_OPEN_SHARDS = 256

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Substitution:
    """Sample ``planned`` could not be read; sample ``used`` of the same shard took its place."""

    planned: int
    used: int
    reason: str


@dataclass
class Samples:
    """Encoded images and what the index knows about them, row by row."""

    data: list[Bytes]
    """The bytes of each JPEG or PNG, as a flat array."""
    height: Ids
    width: Ids
    label: Ids
    substitutions: list[Substitution]


class Dataset:
    """One split on disk, opened lazily.

    Indices and file handles are kept for the shards last used; both are dropped when the
    object is pickled, so it can be handed to another process.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._starts: Ids = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        self._opened: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path, Manifest]]:
        return Dataset, (self.folder, self.manifest)

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Read the manifest of ``folder`` and see that its files are there in full length.

        Raises:
            DataError: One line: no dataset, or which shards are missing or of another size.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        wrong = [f"{name} {problem}" for name, problem in ill_sized(folder, manifest)]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise DataError(
                f"{folder}: {', '.join(wrong[:3])}{more} (data_prep/verify.py lists all)"
            )
        return cls(folder, manifest)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.manifest.samples

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.manifest.classes

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which itself states that of every file."""
        return self.manifest.fingerprint

    @property
    def shard_sizes(self) -> Ids:
        """``(shards,)`` int64: samples in each shard."""
        return np.array([shard.samples for shard in self.manifest.shards], np.int64)

    def locate(self, ids: Ids) -> tuple[Ids, Ids]:
        """Where samples lie.

        Args:
            ids: ``(B,)`` global sample ids.

        Returns:
            ``(B,)`` shard numbers and ``(B,)`` rows within the shard, int64.

        Raises:
            IndexError: An id is outside ``[0, samples)``.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.samples:
            raise IndexError(f"sample ids must be in [0, {self.samples})")
        shard = np.searchsorted(self._starts, ids, side="right") - 1
        return shard, ids - self._starts[shard]

    def rows(self, ids: Ids) -> NDArray[np.void]:
        """The index rows of samples: ``(B,)`` of ``INDEX_DTYPE``.

        Raises:
            DataError: An index file is missing or not the one the manifest was written for.
        """
        shards, rows = self.locate(ids)
        found = np.empty(len(rows), INDEX_DTYPE)
        for shard in np.unique(shards):
            here = shards == shard
            found[here] = self._shard(int(shard)).rows[rows[here]]
        return found

    def probe(self) -> None:
        """Check every index, and the first and last image of every shard.

        For the login node: damage within a shard is found, and mended, while reading.

        Raises:
            DataError: One line with the first damaged shard.
        """
        for entry in self.manifest.shards:
            shard = ShardFile.open(self.folder, entry)
            for row in (0, entry.samples - 1):
                if wrong := shard.checked(row)[1]:
                    raise DataError(
                        f"{self.folder / entry.name}: damaged (row {row}: {wrong}): "
                        "data_prep/verify.py lists all, data_prep/shard.py makes it anew"
                    )

    def read(self, ids: Ids) -> list[Bytes]:
        """The encoded bytes of samples, unchecked; see `read_checked` for training.

        Raises:
            DataError: A shard cannot be opened.
        """
        return [shard.read(row) for shard, _, row in self._places(ids)]

    def read_checked(self, ids: Ids) -> Samples:
        """Read samples and replace those whose bytes are not what was sharded.

        The replacement is the next sample of the same shard, cyclically, that is intact: the
        same one on every machine and at every time.  Its label and size come with it.

        Raises:
            DataError: A shard cannot be opened, or holds no intact sample.
        """
        data: list[Bytes] = []
        used = np.empty(len(ids), INDEX_DTYPE)
        substitutions: list[Substitution] = []
        for at, (shard, number, row) in enumerate(self._places(ids)):
            intact, image, reason = self._first_intact(shard, number, row)
            if intact != row:
                start = int(self._starts[number])
                substitutions.append(Substitution(start + row, start + intact, reason))
            data.append(image)
            used[at] = shard.rows[intact]
        height, width, label = (
            used[name].astype(np.int64) for name in ("height", "width", "label")
        )
        return Samples(data, height, width, label, substitutions)

    def _first_intact(self, shard: ShardFile, number: int, row: int) -> tuple[int, Bytes, str]:
        """The first good row from ``row`` on, its bytes, and what ``row`` itself suffers from."""
        name = self.manifest.shards[number].name
        planned = ""
        for step in range(len(shard.rows)):
            candidate = (row + step) % len(shard.rows)
            image, reason = shard.checked(candidate)
            planned = planned or f"{name} row {row}: {reason}"
            if not reason:
                return candidate, image, planned
        raise DataError(f"{self.folder / name}: not one intact sample ({planned})")

    def _places(self, ids: Ids) -> Iterator[tuple[ShardFile, int, int]]:
        shards, rows = self.locate(ids)
        for number, row in zip(shards.tolist(), rows.tolist(), strict=True):
            yield self._shard(number), number, row

    def _shard(self, number: int) -> ShardFile:
        with self._lock:
            if number not in self._opened:
                self._opened[number] = ShardFile.open(self.folder, self.manifest.shards[number])
                if len(self._opened) > _OPEN_SHARDS:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(number)
            return self._opened[number]
