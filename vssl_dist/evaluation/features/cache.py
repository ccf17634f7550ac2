"""Features on disk, so that several tasks share one pass over the images.

An entry is a folder that is written under another name and then renamed: it is whole or it is
not there.  Its seal states what the features rest on and the checksum of every file; an entry
whose seal does not hold is computed again.

The folder may be anybody's other folder, too, by a link.  So only files are ever deleted that have
the names of a cache's files, in folders that have the names of entries and hold nothing else.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO, TypedDict
from uuid import uuid4

import numpy as np
import torch

from vssl_dist.durable import file_sha256, resolve_trusted_links, sync_to_disk
from vssl_dist.evaluation.features.extract import FeatureBatches, choose_feature_dtype
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.jsonfile import read_json
from vssl_dist.locks import hold_lock
from vssl_dist.text import printable

MAX_KEPT_NETWORKS = 3
_PARTIAL_ENTRY_STALE_S = 86_400.0
_ENTRY_FILE_NAMES = ("features.npy", "labels.npy")
_SEAL_FILE_NAME = "seal.json"
_SCRATCH_FOLDER_NAME = "parts"
_ENTRY_FORMAT = 2
_READABLE_FORMATS = (1, _ENTRY_FORMAT)
_ENTRY_NAME_PATTERN = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})")
_PARTIAL_ENTRY_PATTERN = re.compile(r"\.tmp-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{12}")
_RANK_FOLDER_PATTERN = re.compile(r"[0-9]+(\.partial)?")

FeatureSource = Callable[[Path], FeatureBatches]
"""Computes features; it may put intermediate files in a folder of the path that it is passed,
which it creates and which is gone at the end."""


class EntryFacts(TypedDict):
    """What an entry's features rest on, as JSON values."""

    format: int
    """Version of the entry's layout."""
    network: dict[str, object]
    """What identifies the network."""
    images: dict[str, object]
    """What identifies the images, and the number of rows ``samples``."""


class FeatureCache:
    """The features of a run's exports; any number of processes may use one folder at once.

    Those of the ``MAX_KEPT_NETWORKS`` networks used last are kept, the others are deleted.

    Args:
        folder: Where the entries are; created when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_or_compute(
        self,
        network: Mapping[str, object],
        images: Mapping[str, object],
        source: FeatureSource,
        may_store: Callable[[], bool] = lambda: True,
    ) -> LabelledFeatures:
        """Return the stored features, or those of ``source``, which are then stored.

        Whoever asks for what another process is computing waits for it.

        Args:
            network: What identifies the network, as JSON values.
            images: What identifies the images, as JSON values, and their number ``samples``.
            source: Computes features and labels, ``samples`` rows in all.
            may_store: Asked afterwards whether they are of these very images, and to be stored.

        Returns:
            Mapped into memory, so that they need not fit into it; float32, or float16 beyond
            2 GiB.

        Raises:
            OSError: They cannot be stored, or the storage fails.
        """
        facts = _entry_facts(network, images)
        entry_path = self._entry_path(facts)
        resolve_trusted_links(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self._lock_path(entry_path)):
            # Read under the lock: whoever held it before may have computed just these.
            features = _read_entry(entry_path, facts)
            if features is None:
                features = self._compute_entry(entry_path, facts, source, may_store)
        if features is None:
            raise OSError(f"{entry_path}: features that were just written do not read back")
        # Mappings outlive the names of their files: no reader loses what is deleted here.
        self._delete_unused_entries()
        return features

    def read_stored(
        self, network: Mapping[str, object], images: Mapping[str, object]
    ) -> LabelledFeatures | None:
        """Return the stored features, if there are any; nothing is written."""
        facts = _entry_facts(network, images)
        return _read_entry(self._entry_path(facts), facts)

    @property
    def is_writable(self) -> bool:
        """Whether this user may store anything here."""
        folder = self.folder if self.folder.exists() else self.folder.parent
        return os.access(folder, os.W_OK | os.X_OK)

    def _entry_path(self, facts: EntryFacts) -> Path:
        return self.folder / f"{_facts_digest(facts['network'])}-{_facts_digest(facts['images'])}"

    def _lock_path(self, entry_path: Path) -> Path:
        # A slot, not a file per entry: locks outlive entries.
        lock_slot = hashlib.sha256(entry_path.name.encode()).hexdigest()[:2]
        # Nobody can open another user's locks: a guest has his own.
        is_other_users_folder = self.folder.stat().st_uid != os.geteuid()
        return self.folder / (
            f".lock-{lock_slot}-{os.geteuid()}" if is_other_users_folder else f".lock-{lock_slot}"
        )

    def _compute_entry(
        self,
        entry_path: Path,
        facts: EntryFacts,
        source: FeatureSource,
        may_store: Callable[[], bool],
    ) -> LabelledFeatures | None:
        # The lock is held, so that a partial entry of this name is what a dead process left.
        for unfinished_entry in self._unfinished_entries():
            if unfinished_entry.name.startswith(f".tmp-{entry_path.name}-"):
                _delete_entry(unfinished_entry)
        partial_path = self.folder / f".tmp-{entry_path.name}-{uuid4().hex[:12]}"
        partial_path.mkdir()
        try:
            write_feature_files(
                partial_path, _row_count(facts), source(partial_path / _SCRATCH_FOLDER_NAME)
            )
            if not may_store():
                return _map_features(partial_path)  # a mapping outlives the name of its file
            seal_facts = {
                **facts,
                "sha256": {name: file_sha256(partial_path / name) for name in _ENTRY_FILE_NAMES},
            }
            with (partial_path / _SEAL_FILE_NAME).open("x") as file:
                json.dump(seal_facts, file, indent=1)
            for name in (*_ENTRY_FILE_NAMES, _SEAL_FILE_NAME):
                sync_to_disk(partial_path / name)
            # Everything is on disk before the name is: a name after a crash means a whole entry.
            sync_to_disk(partial_path)
            # Damaged, or of another format.
            if os.path.lexists(entry_path) and not _delete_entry(entry_path):
                reason = "is no features of ours: move it away"
                raise OSError(errno.EEXIST, reason, str(entry_path))
            partial_path.rename(entry_path)
            sync_to_disk(self.folder)
            return _read_entry(entry_path, facts)
        finally:
            shutil.rmtree(partial_path, ignore_errors=True)  # made here, under a name of chance

    def _unfinished_entries(self) -> list[Path]:
        """Entries that writers of this user left unfinished, or are writing."""
        partial_paths = (
            path for path in self.folder.iterdir() if _PARTIAL_ENTRY_PATTERN.fullmatch(path.name)
        )
        return [path for path in partial_paths if path.lstat().st_uid == os.geteuid()]

    def _delete_unused_entries(self) -> None:
        """Delete stale partial entries and those of networks that were not used lately."""
        for path in self._unfinished_entries():
            if _age_s(path) > _PARTIAL_ENTRY_STALE_S:
                _delete_entry(path)
        entries_by_network: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if _is_sealed_entry(path):
                entries_by_network.setdefault(path.name.partition("-")[0], []).append(path)
        # A seal is touched whenever its entry is read: its age is the time since the last use.
        idle_s_by_network = {
            network: min(_age_s(path / _SEAL_FILE_NAME) for path in entry_paths)
            for network, entry_paths in entries_by_network.items()
        }
        for network in sorted(idle_s_by_network, key=lambda name: idle_s_by_network[name])[
            MAX_KEPT_NETWORKS:
        ]:
            for path in entries_by_network[network]:
                _delete_entry(path)


def _entry_facts(network: Mapping[str, object], images: Mapping[str, object]) -> EntryFacts:
    return {"format": _ENTRY_FORMAT, "network": dict(network), "images": dict(images)}


def _row_count(facts: EntryFacts) -> int:
    samples = facts["images"]["samples"]
    assert isinstance(samples, int)
    return samples


def _is_sealed_entry(path: Path) -> bool:
    """Whether this is an entry, also of an earlier format: its seal says what its name says."""
    name_match = _ENTRY_NAME_PATTERN.fullmatch(path.name)
    if name_match is None or path.is_symlink():
        return False
    try:
        seal_facts = read_json(path / _SEAL_FILE_NAME)
        fact_digests = (_facts_digest(seal_facts["network"]), _facts_digest(seal_facts["images"]))
        return seal_facts["format"] in _READABLE_FORMATS and fact_digests == name_match.groups()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _delete_entry(folder: Path) -> bool:
    """Delete an entry, whole or partial, and return whether it is gone.

    One with anything else in it stays: the folder may be somebody's data under an unlucky name.
    """
    expected_names = {*_ENTRY_FILE_NAMES, _SEAL_FILE_NAME}
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        scratch_folders = [path for path in folder.iterdir() if path.name == _SCRATCH_FOLDER_NAME]
        rank_folders = [
            path for scratch_folder in scratch_folders for path in _list_folder(scratch_folder)
        ]
        file_paths = [path for path in folder.iterdir() if path.name != _SCRATCH_FOLDER_NAME]
        file_paths += [
            file_path for rank_folder in rank_folders for file_path in _list_folder(rank_folder)
        ]
        if not all(_RANK_FOLDER_PATTERN.fullmatch(path.name) for path in rank_folders) or not all(
            file_path.name in expected_names and stat.S_ISREG(file_path.lstat().st_mode)
            for file_path in file_paths
        ):
            return False
        # The seal last: it says what it is.
        for file_path in sorted(file_paths, key=lambda path: path.name):
            file_path.unlink()
        for emptied_folder in (*rank_folders, *scratch_folders, folder):
            emptied_folder.rmdir()
    except OSError:
        return False
    return True


def _list_folder(folder: Path) -> list[Path]:
    """List what a folder holds.

    Raises:
        OSError: It is no folder, or a link.
    """
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return list(folder.iterdir())


def write_feature_files(folder: Path, row_count: int, rows: FeatureBatches) -> None:
    """Write features and labels as they come.

    Args:
        folder: Where to write; it exists and is empty.
        row_count: How many rows there will be.
        rows: Features and labels, batch by batch.

    Raises:
        OSError: They do not fit the disk.
        RuntimeError: They are not so many.
    """
    labels = np.empty(row_count, np.int64)
    rows_done = 0
    dtype = torch.float32
    with (folder / "features.npy").open("xb") as file, closing(rows):
        for features, batch_labels in rows:
            # The header needs the width, which the first batch tells.
            if not rows_done:
                dtype = choose_feature_dtype(row_count, features.shape[1])
                _write_npy_header(file, (row_count, features.shape[1]), dtype)
            file.write(features.to(dtype).contiguous().numpy().tobytes())
            labels[rows_done : rows_done + len(features)] = batch_labels.numpy()
            rows_done += len(features)
    if rows_done != row_count:
        raise RuntimeError(f"{rows_done} of {row_count} features were computed")
    with (folder / "labels.npy").open("xb") as file:
        np.save(file, labels)


def read_feature_files(folder: Path, block_rows: int) -> FeatureBatches:
    """Yield what `write_feature_files` wrote, ``block_rows`` rows at a time."""
    blocks_by_table = (torch.split(table, block_rows) for table in _map_features(folder))
    yield from zip(*blocks_by_table, strict=True)


def _map_features(folder: Path) -> LabelledFeatures:
    # Copy on write: torch wants to be able to write, and the file must not change.
    return LabelledFeatures(
        *(torch.from_numpy(np.load(folder / name, mmap_mode="c")) for name in _ENTRY_FILE_NAMES)
    )


def _write_npy_header(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype) -> None:
    # By hand, because np.save wants the whole array in memory.
    numpy_dtype = np.dtype(np.float16 if dtype == torch.float16 else np.float32)
    npy_header = {"descr": numpy_dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, npy_header)


def _read_entry(entry_path: Path, facts: EntryFacts) -> LabelledFeatures | None:
    """Return the entry's features if all of it is what its seal says, else None."""
    try:
        if not all(stat.S_ISREG((entry_path / name).lstat().st_mode) for name in _ENTRY_FILE_NAMES):
            return None
        seal_facts = read_json(entry_path / _SEAL_FILE_NAME)
        checksum_by_name = seal_facts.pop("sha256")
        if seal_facts != facts or any(
            file_sha256(entry_path / name) != checksum_by_name[name] for name in _ENTRY_FILE_NAMES
        ):
            return None
        # Checksums tell damage, not forgery: whoever can write the files can write a seal.
        features = _map_features(entry_path)
        row_count = _row_count(facts)
        actual_shapes = (
            features.features.dim(),
            len(features.features),
            tuple(features.labels.shape),
        )
        is_float = features.features.dtype in (torch.float32, torch.float16)
        if actual_shapes != (2, row_count, (row_count,)) or not is_float:
            return None
        if features.labels.dtype != torch.int64:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with suppress(OSError):  # somebody else's
        os.utime(entry_path / _SEAL_FILE_NAME)
    return features


def _facts_digest(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return time.time()


def cached_features(
    cache: FeatureCache,
    network: Mapping[str, object],
    images: Mapping[str, object],
    source: FeatureSource,
    may_store: Callable[[], bool] = lambda: True,
) -> LabelledFeatures | None:
    """Ask `FeatureCache.get_or_compute`; return None, with a warning, where nothing can be stored.

    Where this user may not write at all there is no warning: the evaluation as a whole warns.
    """
    if not cache.is_writable and not os.access(cache.folder.parent, os.W_OK):
        return cache.read_stored(network, images)
    try:
        return cache.get_or_compute(network, images, source, may_store)
    except OSError as error:
        reason = printable(str(error.strerror or error))
        path = printable(str(error.filename or cache.folder))
        warnings.warn(f"{path}: {reason}: features are not kept", stacklevel=2)
        return None
