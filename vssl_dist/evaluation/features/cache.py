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

from vssl_dist.durable import followed, sha256, sync
from vssl_dist.evaluation.features.extract import Rows, feature_dtype
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.jsonfile import read_json
from vssl_dist.locks import hold_lock
from vssl_dist.text import printable

KEPT_NETWORKS = 3
_STALE_S = 86_400.0
_FILES = ("features.npy", "labels.npy")
_SEAL = "seal.json"
_SCRATCH = "parts"
_FORMAT = 2
_FORMATS = (1, _FORMAT)
_ENTRY = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})")
_PARTIAL = re.compile(r"\.tmp-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{12}")
_RANK = re.compile(r"[0-9]+(\.partial)?")

Source = Callable[[Path], Rows]
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

    Those of the ``KEPT_NETWORKS`` networks used last are kept, the others are deleted.

    Args:
        folder: Where the entries are; created when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self,
        network: Mapping[str, object],
        images: Mapping[str, object],
        source: Source,
        is_sound: Callable[[], bool] = lambda: True,
    ) -> Features:
        """Return the stored features, or those of ``source``, which are then stored.

        Whoever asks for what another process is computing waits for it.

        Args:
            network: What identifies the network, as JSON values.
            images: What identifies the images, as JSON values, and their number ``samples``.
            source: Computes features and labels, ``samples`` rows in all.
            is_sound: Asked afterwards whether they are of these very images, and to be stored.

        Returns:
            Mapped into memory, so that they need not fit into it; float32, or float16 beyond
            2 GiB.

        Raises:
            OSError: They cannot be stored, or the storage fails.
        """
        facts = _facts(network, images)
        entry = self._entry(facts)
        followed(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self._lock(entry)):
            # Read under the lock: whoever held it before may have computed just these.
            features = _read(entry, facts)
            if features is None:
                features = self._write(entry, facts, source, is_sound)
        if features is None:
            raise OSError(f"{entry}: features that were just written do not read back")
        # Mappings outlive the names of their files: no reader loses what is deleted here.
        self._prune()
        return features

    def peek(self, network: Mapping[str, object], images: Mapping[str, object]) -> Features | None:
        """Return the stored features, if there are any; nothing is written."""
        facts = _facts(network, images)
        return _read(self._entry(facts), facts)

    @property
    def writable(self) -> bool:
        """Whether this user may store anything here."""
        folder = self.folder if self.folder.exists() else self.folder.parent
        return os.access(folder, os.W_OK | os.X_OK)

    def _entry(self, facts: EntryFacts) -> Path:
        return self.folder / f"{_digest(facts['network'])}-{_digest(facts['images'])}"

    def _lock(self, entry: Path) -> Path:
        # A slot, not a file per entry: locks outlive entries.
        slot = hashlib.sha256(entry.name.encode()).hexdigest()[:2]
        # Nobody can open another user's locks: a guest has his own.
        is_guest = self.folder.stat().st_uid != os.geteuid()
        return self.folder / (f".lock-{slot}-{os.geteuid()}" if is_guest else f".lock-{slot}")

    def _write(
        self, entry: Path, facts: EntryFacts, source: Source, is_sound: Callable[[], bool]
    ) -> Features | None:
        # The lock is held, so that a partial entry of this name is what a dead process left.
        for leftover in self._unfinished_entries():
            if leftover.name.startswith(f".tmp-{entry.name}-"):
                _discard(leftover)
        partial = self.folder / f".tmp-{entry.name}-{uuid4().hex[:12]}"
        partial.mkdir()
        try:
            store(partial, _row_count(facts), source(partial / _SCRATCH))
            if not is_sound():
                return _mapped(partial)  # a mapping outlives the name of its file
            seal = {**facts, "sha256": {name: sha256(partial / name) for name in _FILES}}
            with (partial / _SEAL).open("x") as file:
                json.dump(seal, file, indent=1)
            for name in (*_FILES, _SEAL):
                sync(partial / name)
            # Everything is on disk before the name is: a name after a crash means a whole entry.
            sync(partial)
            if os.path.lexists(entry) and not _discard(entry):  # damaged, or of another format
                reason = "is no features of ours: move it away"
                raise OSError(errno.EEXIST, reason, str(entry))
            partial.rename(entry)
            sync(self.folder)
            return _read(entry, facts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # made here, under a name of chance

    def _unfinished_entries(self) -> list[Path]:
        """Entries that writers of this user left unfinished, or are writing."""
        partials = (path for path in self.folder.iterdir() if _PARTIAL.fullmatch(path.name))
        return [path for path in partials if path.lstat().st_uid == os.geteuid()]

    def _prune(self) -> None:
        """Delete stale partial entries and those of networks that were not used lately."""
        for path in self._unfinished_entries():
            if _age(path) > _STALE_S:
                _discard(path)
        networks: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if _is_sealed(path):
                networks.setdefault(path.name.partition("-")[0], []).append(path)
        # A seal is touched whenever its entry is read: its age is the time since the last use.
        ages = {
            network: min(_age(path / _SEAL) for path in entries)
            for network, entries in networks.items()
        }
        for network in sorted(ages, key=lambda name: ages[name])[KEPT_NETWORKS:]:
            for path in networks[network]:
                _discard(path)


def _facts(network: Mapping[str, object], images: Mapping[str, object]) -> EntryFacts:
    return {"format": _FORMAT, "network": dict(network), "images": dict(images)}


def _row_count(facts: EntryFacts) -> int:
    samples = facts["images"]["samples"]
    assert isinstance(samples, int)
    return samples


def _is_sealed(path: Path) -> bool:
    """Whether this is an entry, also of an earlier format: its seal says what its name says."""
    name_match = _ENTRY.fullmatch(path.name)
    if name_match is None or path.is_symlink():
        return False
    try:
        seal = read_json(path / _SEAL)
        digests = (_digest(seal["network"]), _digest(seal["images"]))
        return seal["format"] in _FORMATS and digests == name_match.groups()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _discard(folder: Path) -> bool:
    """Delete an entry, whole or partial, and return whether it is gone.

    One with anything else in it stays: the folder may be somebody's data under an unlucky name.
    """
    expected_names = {*_FILES, _SEAL}
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        scratch_folders = [path for path in folder.iterdir() if path.name == _SCRATCH]
        rank_folders = [path for scratch in scratch_folders for path in _contents(scratch)]
        files = [path for path in folder.iterdir() if path.name != _SCRATCH]
        files += [file for rank_folder in rank_folders for file in _contents(rank_folder)]
        if not all(_RANK.fullmatch(path.name) for path in rank_folders) or not all(
            file.name in expected_names and stat.S_ISREG(file.lstat().st_mode) for file in files
        ):
            return False
        for file in sorted(files, key=lambda path: path.name):  # the seal last: it says what it is
            file.unlink()
        for empty_folder in (*rank_folders, *scratch_folders, folder):
            empty_folder.rmdir()
    except OSError:
        return False
    return True


def _contents(folder: Path) -> list[Path]:
    """List what a folder holds.

    Raises:
        OSError: It is no folder, or a link.
    """
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return list(folder.iterdir())


def store(folder: Path, samples: int, rows: Rows) -> None:
    """Write features and labels as they come.

    Args:
        folder: Where to write; it exists and is empty.
        samples: How many rows there will be.
        rows: Features and labels, batch by batch.

    Raises:
        OSError: They do not fit the disk.
        RuntimeError: They are not so many.
    """
    labels = np.empty(samples, np.int64)
    done = 0
    dtype = torch.float32
    with (folder / "features.npy").open("xb") as file, closing(rows):
        for features, batch_labels in rows:
            # The header needs the width, which the first batch tells.
            if not done:
                dtype = feature_dtype(samples, features.shape[1])
                _write_header(file, (samples, features.shape[1]), dtype)
            file.write(features.to(dtype).contiguous().numpy().tobytes())
            labels[done : done + len(features)] = batch_labels.numpy()
            done += len(features)
    if done != samples:
        raise RuntimeError(f"{done} of {samples} features were computed")
    with (folder / "labels.npy").open("xb") as file:
        np.save(file, labels)


def read_rows(folder: Path, size: int) -> Rows:
    """Yield what `store` wrote, ``size`` rows at a time."""
    columns = (torch.split(column, size) for column in _mapped(folder))
    yield from zip(*columns, strict=True)


def _mapped(folder: Path) -> Features:
    # Copy on write: torch wants to be able to write, and the file must not change.
    return Features(*(torch.from_numpy(np.load(folder / n, mmap_mode="c")) for n in _FILES))


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: torch.dtype) -> None:
    # By hand, because np.save wants the whole array in memory.
    numpy_dtype = np.dtype(np.float16 if dtype == torch.float16 else np.float32)
    header = {"descr": numpy_dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _read(entry: Path, facts: EntryFacts) -> Features | None:
    """Return the entry's features if all of it is what its seal says, else None."""
    try:
        if not all(stat.S_ISREG((entry / name).lstat().st_mode) for name in _FILES):
            return None
        seal = read_json(entry / _SEAL)
        checksums = seal.pop("sha256")
        if seal != facts or any(sha256(entry / name) != checksums[name] for name in _FILES):
            return None
        # Checksums tell damage, not forgery: whoever can write the files can write a seal.
        table = _mapped(entry)
        samples = _row_count(facts)
        shapes = (table.features.dim(), len(table.features), tuple(table.labels.shape))
        is_float = table.features.dtype in (torch.float32, torch.float16)
        if shapes != (2, samples, (samples,)) or not is_float:
            return None
        if table.labels.dtype != torch.int64:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with suppress(OSError):  # somebody else's
        os.utime(entry / _SEAL)
    return table


def _digest(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return time.time()


def features_of(
    cache: FeatureCache,
    network: Mapping[str, object],
    images: Mapping[str, object],
    source: Source,
    is_sound: Callable[[], bool] = lambda: True,
) -> Features | None:
    """Ask `FeatureCache.get`; return None, with a warning, where nothing can be stored.

    Where this user may not write at all there is no warning: the evaluation as a whole warns.
    """
    if not cache.writable and not os.access(cache.folder.parent, os.W_OK):
        return cache.peek(network, images)
    try:
        return cache.get(network, images, source, is_sound)
    except OSError as error:
        reason = printable(str(error.strerror or error))
        path = printable(str(error.filename or cache.folder))
        warnings.warn(f"{path}: {reason}: features are not kept", stacklevel=2)
        return None
