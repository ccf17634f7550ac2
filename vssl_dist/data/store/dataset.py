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

from vssl_dist.data.store.handles import ShardHandles
from vssl_dist.data.store.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    iter_size_problems,
    join_first_problems,
    read_manifest,
)
from vssl_dist.data.store.shardfile import Bytes, ShardFile
from vssl_dist.data.store.stall import StallWatch
from vssl_dist.errors import DataError

__all__ = ["INDEX_DTYPE", "Dataset", "Samples", "Substitution"]

_CANDIDATES_PER_SHARD = 64
"""Samples that are tried as substitutes in each shard."""
_NUM_NEXT_SHARDS = 3
"""Shards that are tried after the damaged sample's own."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Substitution:
    """Sample ``planned`` could not be shown; sample ``used`` took its place."""

    planned: int
    used: int
    reason: str
    position: int = 0
    """Samples that the whole job had consumed when the substitute was shown."""


@dataclass
class Samples:
    """Encoded images and what the index states about them, row by row."""

    data: list[Bytes]
    """The bytes of each JPEG or PNG, as a flat array."""
    height: Ids
    width: Ids
    label: Ids
    """Number of the class, -1 for unlabelled."""
    substitutions: list[Substitution]


class Dataset:
    """One split on disk, opened lazily.

    Indices and file handles are kept for the shards last used; both are dropped when the
    object is pickled, so it can be handed to another process.

    Args:
        folder: The folder that holds ``manifest.json``.
        manifest: The contents of that file.
        watch: Entered during every file operation, so that another thread sees which one hangs.
    """

    def __init__(self, folder: Path, manifest: Manifest, watch: StallWatch | None = None) -> None:
        self.folder = folder
        self.manifest = manifest
        self.watch = watch or StallWatch()
        self._first_id_of_shard: Ids = np.concatenate([[0], np.cumsum(self.shard_sizes)]).astype(
            np.int64
        )
        self._shard_handles = ShardHandles(
            folder, manifest.shards, len(manifest.classes), self.watch
        )

    def __reduce__(self) -> tuple[type[Dataset], tuple[Path, Manifest]]:
        return Dataset, (self.folder, self.manifest)

    @classmethod
    def open(cls, folder: Path, watch: StallWatch | None = None) -> Dataset:
        """Read the manifest of ``folder`` and check that its files are there in full length.

        Raises:
            DataError: One line: no dataset, or which files are missing, not readable or of
                another size.
        """
        folder = Path(folder)
        watch = watch or StallWatch()
        with watch(folder / MANIFEST):
            manifest = read_manifest(folder)
        problems = [
            f"{name} {problem}" for name, problem in iter_size_problems(folder, manifest, watch)
        ]
        if problems:
            raise DataError(
                f"{folder}: {join_first_problems(problems)} (data_prep/verify.py lists all)"
            )
        return cls(folder, manifest, watch)

    def keep_open(self, num_shards: int) -> int:
        """Keep so many shards open at once, or what the process may; return how many."""
        return self._shard_handles.keep_open(num_shards)

    def close(self) -> None:
        """Close all files; reading again opens them anew."""
        self._shard_handles.close()

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.manifest.samples

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the labels."""
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
        """Find the shards and rows in which samples lie.

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
        shard_numbers = np.searchsorted(self._first_id_of_shard, ids, side="right") - 1
        return shard_numbers, ids - self._first_id_of_shard[shard_numbers]

    def rows(self, ids: Ids) -> NDArray[np.void]:
        """Return the index rows of samples: ``(B,)`` of ``INDEX_DTYPE``.

        Raises:
            DataError: An index file is missing or not the one the manifest was written for.
        """
        shard_numbers, rows_in_shards = self.locate(ids)
        index_rows = np.empty(len(rows_in_shards), INDEX_DTYPE)
        for shard in np.unique(shard_numbers):
            is_in_shard = shard_numbers == shard
            index_rows[is_in_shard] = self._shard_handles.get(int(shard)).rows[
                rows_in_shards[is_in_shard]
            ]
        return index_rows

    def probe(self, probed_shards: slice = slice(None)) -> None:
        """Check that shards are the ones of the manifest and not others of the same length.

        The index is checked, and that the first, the middle or the last image is the one that was
        sharded.  Damage within a shard, or of its only image, is found while reading, and the image
        replaced.

        Args:
            probed_shards: Which shards to check; all of them by default.

        Raises:
            DataError: One line with the shards that are others, or cannot be read.
        """
        if problems := self._shard_handles.find_foreign_shards(probed_shards):
            raise DataError(
                f"{self.folder}: damaged or swapped: {join_first_problems(problems)} "
                "(data_prep/verify.py lists all, data_prep/shard.py makes them anew)"
            )

    def read(self, ids: Ids) -> list[Bytes]:
        """Read the encoded bytes of samples unchecked; training uses `read_checked`.

        Raises:
            DataError: A shard cannot be opened.
        """
        return [shard.read(row) for shard, row in self._locate_in_shard_files(ids)]

    def read_checked(self, ids: Ids) -> Samples:
        """Read samples and replace those whose bytes are not what was sharded.

        The replacement is that of `find_intact_substitute`.  Its label and size come with it.

        Raises:
            DataError: A shard cannot be opened, or there is no intact sample near.
        """
        data: list[Bytes] = []
        index_rows = np.empty(len(ids), INDEX_DTYPE)
        substitutions: list[Substitution] = []
        shard_numbers, rows_in_shards = self.locate(ids)
        for batch_row, (shard_number, row) in enumerate(
            zip(shard_numbers.tolist(), rows_in_shards.tolist(), strict=True)
        ):
            shard, image, reason = self._shard_handles.read_checked(shard_number, row)
            index_rows[batch_row] = shard.rows[row]
            if reason:
                reason = f"{self.manifest.shards[shard_number].name} row {row}: {reason}"
                planned = int(self._first_id_of_shard[shard_number]) + row
                substitute_id, image, index_rows[batch_row] = self.find_intact_substitute(
                    planned, planned, reason
                )
                substitutions.append(Substitution(planned, substitute_id, reason))
            data.append(image)
        height, width, label = (
            index_rows[field].astype(np.int64) for field in ("height", "width", "label")
        )
        return Samples(data, height, width, label, substitutions)

    def find_intact_substitute(
        self, planned: int, last_tried_id: int, reason: str
    ) -> tuple[int, Bytes, np.void]:
        """Find the substitute of a sample: the same one on every machine and at every time.

        The next 64 of its shard are looked at, cyclically, then the first 64 of each of the next
        three shards, and no more: nobody waits for a whole dataset to be read.

        Args:
            planned: The sample that is to be replaced.
            last_tried_id: Where the search goes on: at ``planned``, or at a substitute of no use.
            reason: What is wrong with ``planned``, for the message.

        Returns:
            Id, bytes and index row of the next intact sample.

        Raises:
            DataError: No sample near is intact, or a shard cannot be opened.
        """
        candidate_ids = self._substitute_candidates(planned)
        for candidate_id in candidate_ids[candidate_ids.index(last_tried_id) + 1 :]:
            shards, rows = self.locate(np.array([candidate_id]))
            shard_number, row = int(shards[0]), int(rows[0])
            shard, image, problem = self._shard_handles.read_checked(shard_number, row)
            if not problem:
                return candidate_id, image, shard.rows[row]
        raise DataError(
            f"{self.folder}: sample {planned}: not one usable image near it in its shard, nor in "
            f"the {_NUM_NEXT_SHARDS} after that ({reason}): run data_prep/verify.py"
        )

    def _substitute_candidates(self, planned: int) -> list[int]:
        """Return a sample and those that may take its place, the first choice first."""
        own_shard_number = int(self.locate(np.array([planned]))[0][0])
        num_shards = len(self.shard_sizes)
        shard_numbers = [
            (own_shard_number + step) % num_shards
            for step in range(min(_NUM_NEXT_SHARDS + 1, num_shards))
        ]
        own_shard_ids, *ids_in_next_shards = (
            range(*self._first_id_of_shard[shard_number : shard_number + 2].tolist())
            for shard_number in shard_numbers
        )
        own_shard_candidates = [
            *range(planned, own_shard_ids.stop),
            *range(own_shard_ids.start, planned),
        ]
        return [
            *own_shard_candidates[: _CANDIDATES_PER_SHARD + 1],
            *chain(*(ids[:_CANDIDATES_PER_SHARD] for ids in ids_in_next_shards)),
        ]

    def _locate_in_shard_files(self, ids: Ids) -> Iterator[tuple[ShardFile, int]]:
        shards, rows = self.locate(ids)
        for number, row in zip(shards.tolist(), rows.tolist(), strict=True):
            yield self._shard_handles.get(number), row
