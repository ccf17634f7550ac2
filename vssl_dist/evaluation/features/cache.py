"""Features on disk, so that several tasks share one pass over the images.

An entry is a folder that is written under another name and then renamed: it is whole or it is
not there.  Its seal states what the features rest on and the checksum of every file; an entry
whose seal does not hold is computed again.

The folder may be anybody's other folder, too, by a link.  So only files are ever deleted that are
called as ours, in folders that are called as ours and hold nothing else.
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
from typing import Any
from uuid import uuid4

import numpy as np
import torch

from vssl_dist.durable import followed, sha256, sync
from vssl_dist.evaluation.features.extract import Rows, precision
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.jsonfile import read_json
from vssl_dist.locks import hold_lock
from vssl_dist.text import printable

KEPT_NETWORKS = 3
_STALE_S = 86_400.0
_FILES = ("features.npy", "labels.npy")
_SEAL, _PARTS = "seal.json", "parts"
_FORMAT = 2
_FORMATS = (1, _FORMAT)
_ENTRY = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})")
_PARTIAL = re.compile(r"\.tmp-[0-9a-f]{16}-[0-9a-f]{16}-[0-9a-f]{12}")
_RANK = re.compile(r"[0-9]+(\.partial)?")

Source = Callable[[Path], Rows]
"""Computes features; in a folder of the given name, which is gone at the end, it may put parts."""


class FeatureCache:
    """The features of a run's exports; any number of processes may use one folder at once.

    Those of the ``KEPT_NETWORKS`` networks used last are kept, the others are deleted.

    Args:
        folder: Made when something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(
        self,
        network: Mapping[str, Any],
        images: Mapping[str, Any],
        source: Source,
        sound: Callable[[], bool] = lambda: True,
    ) -> Features:
        """The stored features, or those of ``source``, which are then stored.

        Whoever asks for what another process is computing waits for it.

        Args:
            network: What identifies the network, as JSON values.
            images: What identifies the images, as JSON values, and their number ``samples``.
            source: Computes features and labels, ``samples`` rows in all.
            sound: Asked afterwards whether they are of these very images, and to be stored.

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
            kept = _read(entry, facts)
            if kept is None:
                kept = self._write(entry, facts, source, sound)
        if kept is None:
            raise OSError(f"{entry}: features that were just written do not read back")
        self._prune()
        return kept

    def peek(self, network: Mapping[str, Any], images: Mapping[str, Any]) -> Features | None:
        """The stored features, if there are any; nothing is written."""
        facts = _facts(network, images)
        return _read(self._entry(facts), facts)

    @property
    def writable(self) -> bool:
        """Whether this user may store anything here."""
        place = self.folder if self.folder.exists() else self.folder.parent
        return os.access(place, os.W_OK | os.X_OK)

    def _entry(self, facts: Mapping[str, Any]) -> Path:
        return self.folder / f"{_digest(facts['network'])}-{_digest(facts['images'])}"

    def _lock(self, entry: Path) -> Path:
        # A slot, not a file per entry: locks outlive entries.
        slot = hashlib.sha256(entry.name.encode()).hexdigest()[:2]
        # Nobody can open another user's locks: a guest has his own.
        guest = self.folder.stat().st_uid != os.geteuid()
        return self.folder / (f".lock-{slot}-{os.geteuid()}" if guest else f".lock-{slot}")

    def _write(
        self, entry: Path, facts: dict[str, Any], source: Source, sound: Callable[[], bool]
    ) -> Features | None:
        for left in self._partials():
            if left.name.startswith(f".tmp-{entry.name}-"):
                _discard(left)
        partial = self.folder / f".tmp-{entry.name}-{uuid4().hex[:12]}"
        partial.mkdir()
        try:
            store(partial, facts["images"]["samples"], source(partial / _PARTS))
            if not sound():
                return _mapped(partial)  # a mapping outlives the name of its file
            seal = facts | {"sha256": {name: sha256(partial / name) for name in _FILES}}
            with (partial / _SEAL).open("x") as file:
                json.dump(seal, file, indent=1)
            for name in (*_FILES, _SEAL):
                sync(partial / name)
            sync(partial)
            if os.path.lexists(entry) and not _discard(entry):  # damaged, or of another format
                reason = "is no features of ours: move it away"
                raise OSError(errno.EEXIST, reason, str(entry))
            partial.rename(entry)
            sync(self.folder)
            return _read(entry, facts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # made here, under a name of chance

    def _partials(self) -> list[Path]:
        """What writers of this user left unfinished, or are at."""
        named = (path for path in self.folder.iterdir() if _PARTIAL.fullmatch(path.name))
        return [path for path in named if path.lstat().st_uid == os.geteuid()]

    def _prune(self) -> None:
        for path in self._partials():
            if _age(path) > _STALE_S:
                _discard(path)
        networks: dict[str, list[Path]] = {}
        for path in self.folder.iterdir():
            if _sealed(path):
                networks.setdefault(path.name.partition("-")[0], []).append(path)
        ages = {name: min(_age(path / _SEAL) for path in each) for name, each in networks.items()}
        for network in sorted(ages, key=lambda name: ages[name])[KEPT_NETWORKS:]:
            for path in networks[network]:
                _discard(path)


def _facts(network: Mapping[str, Any], images: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": _FORMAT, "network": dict(network), "images": dict(images)}


def _sealed(path: Path) -> bool:
    """Whether this is an entry, also of an earlier format: its seal says what its name says."""
    name = _ENTRY.fullmatch(path.name)
    if name is None or path.is_symlink():
        return False
    try:
        seal = read_json(path / _SEAL)
        digests = _digest(seal["network"]), _digest(seal["images"])
        return seal["format"] in _FORMATS and digests == name.groups()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _discard(folder: Path) -> bool:
    """Delete an entry, whole or not; whether it is gone.  One with anything else in it stays."""
    ours = {*_FILES, _SEAL}
    if folder.is_symlink() or not folder.is_dir():
        return False
    try:
        parts = [path for path in folder.iterdir() if path.name == _PARTS]
        ranks = [path for part in parts for path in _listed(part)]
        files = [path for path in folder.iterdir() if path.name != _PARTS]
        files += [file for rank in ranks for file in _listed(rank)]
        if not all(_RANK.fullmatch(rank.name) for rank in ranks) or not all(
            file.name in ours and stat.S_ISREG(file.lstat().st_mode) for file in files
        ):
            return False
        for file in sorted(files, key=lambda path: path.name):  # the seal last: it says what it is
            file.unlink()
        for empty in (*ranks, *parts, folder):
            empty.rmdir()
    except OSError:
        return False
    return True


def _listed(folder: Path) -> list[Path]:
    """What a folder holds.

    Raises:
        OSError: It is none, or a link.
    """
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    return list(folder.iterdir())


def store(folder: Path, samples: int, rows: Rows) -> None:
    """Write features and labels as they come.

    Args:
        folder: Is there, and empty.
        samples: How many rows there are to be.
        rows: The features.

    Raises:
        OSError: They do not fit the disk.
        RuntimeError: They are not so many.
    """
    labels = np.empty(samples, np.int64)
    done, dtype = 0, torch.float32
    with (folder / "features.npy").open("xb") as file, closing(rows):
        for features, classes in rows:
            if not done:
                dtype = precision(samples, features.shape[1])
                _header(file, (samples, features.shape[1]), dtype)
            file.write(features.to(dtype).contiguous().numpy().tobytes())
            labels[done : done + len(features)] = classes.numpy()
            done += len(features)
    if done != samples:
        raise RuntimeError(f"{done} of {samples} features were computed")
    with (folder / "labels.npy").open("xb") as file:
        np.save(file, labels)


def read_rows(folder: Path, size: int) -> Rows:
    """What `store` wrote, ``size`` rows at a time."""
    parts = (torch.split(part, size) for part in _mapped(folder))
    yield from zip(*parts, strict=True)


def _mapped(folder: Path) -> Features:
    # Copy on write: torch wants to be able to write, and the file must not change.
    return Features(*(torch.from_numpy(np.load(folder / n, mmap_mode="c")) for n in _FILES))


def _header(file: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    kind = np.dtype(np.float16 if dtype == torch.float16 else np.float32)
    facts = {"descr": kind.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, facts)


def _read(entry: Path, facts: Mapping[str, Any]) -> Features | None:
    """The entry if all of it is what its seal says, else None."""
    try:
        if not all(stat.S_ISREG((entry / name).lstat().st_mode) for name in _FILES):
            return None
        seal = read_json(entry / _SEAL)
        sums = seal.pop("sha256")
        if seal != facts or any(sha256(entry / name) != sums[name] for name in _FILES):
            return None
        kept = _mapped(entry)
        samples, kinds = facts["images"]["samples"], (torch.float32, torch.float16)
        shapes = (kept.features.dim(), len(kept.features), tuple(kept.labels.shape))
        if shapes != (2, samples, (samples,)) or kept.features.dtype not in kinds:
            return None
        if kept.labels.dtype != torch.int64:
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    with suppress(OSError):  # somebody else's
        os.utime(entry / _SEAL)
    return kept


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return time.time()


def features_of(
    cache: FeatureCache,
    network: Mapping[str, Any],
    images: Mapping[str, Any],
    source: Source,
    sound: Callable[[], bool] = lambda: True,
) -> Features | None:
    """`FeatureCache.get`, or None with a warning where nothing can be stored.

    Where this user may not write at all there is no warning: that goes for all that is found.
    """
    if not cache.writable and not os.access(cache.folder.parent, os.W_OK):
        return cache.peek(network, images)
    try:
        return cache.get(network, images, source, sound)
    except OSError as error:
        reason = printable(str(error.strerror or error))
        place = printable(str(error.filename or cache.folder))
        warnings.warn(f"{place}: {reason}: features are not kept", stacklevel=2)
        return None
