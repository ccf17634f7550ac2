"""Datasets on disk: tar shards, one index row per sample, and a manifest that seals them.

A dataset is one folder for one split.  ``shard-000000.tar`` is a plain WebDataset tar,
``shard-000000.idx.npy`` holds one ``INDEX_DTYPE`` row per sample of it, ``manifest.json``
states what there must be.  A sample's id is its row in the concatenation of all shards.
Reading one is a single positioned read of its encoded bytes: nothing is unpacked and no tar
header is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.store.handles import Handles
from vssl_dist.data.store.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    ill_sized,
    listed,
    read_manifest,
)
from vssl_dist.data.store.shardfile import Bytes, ShardFile
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError

__all__ = ["INDEX_DTYPE", "Dataset", "Samples", "Substitution"]

# Where a substitute is looked for: so many in a sample's own shard, then in each of the next few.
_NEAR, _BEYOND = 64, 3

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Substitution:
    """Sample ``planned`` could not be shown; sample ``used`` took its place."""

    planned: int
    used: int
    reason: str
    position: int = 0
    """Samples that the whole job had consumed when it was shown."""


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

    Args:
        folder: The folder that holds ``manifest.json``.
        manifest: Its contents.
        watch: Told of every file operation, so that another thread can see which one hangs.
    """

    def __init__(self, folder: Path, manifest: Manifest, watch: StallWatch | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.watch = watch or StallWatch()
        self._starts: Ids = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(np.int64)
        self._handles = Handles(folder, manifest.shards, len(manifest.classes), self.watch)

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path, Manifest]]:
        return Dataset, (self.folder, self.manifest)

    @classmethod
    def open(cls, folder: Path, watch: StallWatch | None = None) -> Dataset:
        """Read the manifest of ``folder`` and see that its files are there in full length.

        Raises:
            DataError: One line: no dataset, or which files are missing, not readable or of
                another size.
        """
        folder, watch = Path(folder), watch or StallWatch()
        with watch(folder / MANIFEST):
            manifest = read_manifest(folder)
        wrong = [f"{name} {problem}" for name, problem in ill_sized(folder, manifest, watch)]
        if wrong:
            raise DataError(f"{folder}: {listed(wrong)} (data_prep/verify.py lists all)")
        return cls(folder, manifest, watch)

    def close(self) -> None:
        """Let go of all files; reading again opens them anew."""
        self._handles.close()

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

    @cached_property
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
            found[here] = self._handles.get(int(shard)).rows[rows[here]]
        return found

    def probe(self, share: slice = slice(None)) -> None:
        """See that shards are the ones of the manifest and not others of the same length.

        Checks the index, and that the first, the middle or the last image is the one that was
        sharded.  Damage within a shard is found, and mended, while reading, and so is that of a
        shard with one image.

        Args:
            share: Which shards to look at; all of them by default.

        Raises:
            DataError: One line with the shards that are not, or cannot be read.
        """
        if wrong := self._handles.foreign_shards(share):
            raise DataError(
                f"{self.folder}: damaged or swapped: {listed(wrong)} "
                "(data_prep/verify.py lists all, data_prep/shard.py makes them anew)"
            )

    def read(self, ids: Ids) -> list[Bytes]:
        """The encoded bytes of samples, unchecked; see `read_checked` for training.

        Raises:
            DataError: A shard cannot be opened.
        """
        return [shard.read(row) for shard, row in self._places(ids)]

    def read_checked(self, ids: Ids) -> Samples:
        """Read samples and replace those whose bytes are not what was sharded.

        The replacement is the `next_intact` sample.  Its label and size come with it.

        Raises:
            DataError: A shard cannot be opened, or there is no intact sample near.
        """
        data: list[Bytes] = []
        used = np.empty(len(ids), INDEX_DTYPE)
        substitutions: list[Substitution] = []
        shards, rows = (where.tolist() for where in self.locate(ids))
        for at, (number, row) in enumerate(zip(shards, rows, strict=True)):
            shard, image, reason = self._handles.checked(number, row)
            used[at] = shard.rows[row]
            if reason:
                reason = f"{self.manifest.shards[number].name} row {row}: {reason}"
                planned = int(self._starts[number]) + row
                intact, image, used[at] = self.next_intact(planned, planned, reason)
                substitutions.append(Substitution(planned, intact, reason))
            data.append(image)
        height, width, label = (used[n].astype(np.int64) for n in ("height", "width", "label"))
        return Samples(data, height, width, label, substitutions)

    def next_intact(self, planned: int, after: int, reason: str) -> tuple[int, Bytes, np.void]:
        """What takes the place of a sample: the same on every machine and at every time.

        The next 64 of its shard are looked at, cyclically, then the first 64 of each of the next
        three shards, and no more: nobody waits for a whole dataset to be read.

        Args:
            planned: The sample whose place is to be taken.
            after: Where the search goes on: at ``planned``, or at a substitute of no use.
            reason: What is wrong with it.

        Returns:
            Id, bytes and index row of the next intact sample.

        Raises:
            DataError: There is none, or a shard cannot be opened.
        """
        order = self._neighbours(planned)
        for candidate in order[order.index(after) + 1 :]:
            number, row = (int(where[0]) for where in self.locate(np.array([candidate])))
            shard, image, wrong = self._handles.checked(number, row)
            if not wrong:
                return candidate, image, shard.rows[row]
        raise DataError(
            f"{self.folder}: sample {planned}: not one usable image near it in its shard, nor in "
            f"the {_BEYOND} after that ({reason}): run data_prep/verify.py"
        )

    def _neighbours(self, planned: int) -> list[int]:
        """A sample, and those that may take its place, the first choice first."""
        number, count = int(self.locate(np.array([planned]))[0][0]), len(self.shard_sizes)
        near = [(number + step) % count for step in range(min(_BEYOND + 1, count))]
        own, *others = (range(*self._starts[n : n + 2].tolist()) for n in near)
        ring = [*range(planned, own.stop), *range(own.start, planned)]
        return [*ring[: _NEAR + 1], *chain(*(shard[:_NEAR] for shard in others))]

    def _places(self, ids: Ids) -> Iterator[tuple[ShardFile, int]]:
        shards, rows = self.locate(ids)
        for number, row in zip(shards.tolist(), rows.tolist(), strict=True):
            yield self._handles.get(number), row
