"""Features on disk, so that several tasks share one pass over the images.

An entry is a folder that is written under another name and then renamed: it is whole or it is
not there.  Its seal states what the features rest on and the checksum of every file; an entry
whose seal does not hold is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock, Timeout

from vssl_dist.durable import sha256, sync
from vssl_dist.evaluation.features import Rows, precision
from vssl_dist.evaluation.knn import Features

KEPT_NETWORKS = 3
_STALE_S = 86_400.0
_FILES = ("features.npy", "labels.npy")
_SEAL, _PARTS = "seal.json", "parts"
_FORMAT = 2

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
        facts: dict[str, Any] = {
            "format": _FORMAT,
            "network": dict(network),
            "images": dict(images),
        }
        entry = self.folder / f"{_digest(facts['network'])}-{_digest(facts['images'])}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(entry):
            found = _read(entry, facts)
            if found is None:
                found = self._write(entry, facts, source, sound)
        if found is None:
            raise OSError(f"{entry}: features that were just written do not read back")
        self._prune()
        return found

    @contextmanager
    def _alone(self, entry: Path) -> Iterator[None]:
        # A slot, not a file per entry: locks outlive entries.
        slot = hashlib.sha256(entry.name.encode()).hexdigest()[:2]
        lock = FileLock(self.folder / f".lock-{slot}")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{self.folder}: waiting for features that are being computed", flush=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _write(
        self, entry: Path, facts: dict[str, Any], source: Source, sound: Callable[[], bool]
    ) -> Features | None:
        for left in self.folder.glob(f".tmp-{entry.name}-*"):
            shutil.rmtree(left, ignore_errors=True)
        partial = self.folder / f".tmp-{entry.name}-{uuid4().hex[:12]}"
        partial.mkdir()
        try:
            store(partial, facts["images"]["samples"], source(partial / _PARTS))
            if not sound():
                return _mapped(partial)  # a mapping outlives the name of its file
            seal = facts | {"sha256": {name: sha256(partial / name) for name in _FILES}}
            (partial / _SEAL).write_text(json.dumps(seal, indent=1))
            for name in (*_FILES, _SEAL):
                sync(partial / name)
            sync(partial)
            shutil.rmtree(entry, ignore_errors=True)  # damaged, or of another format
            partial.rename(entry)
            sync(self.folder)
            return _read(entry, facts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _prune(self) -> None:
        used: dict[str, float] = {}
        for path in self.folder.iterdir():
            if path.name.startswith(".tmp-") and _age(path) > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
            elif not path.name.startswith("."):
                network = path.name.partition("-")[0]
                used[network] = max(used.get(network, 0.0), time.time() - _age(path / _SEAL))
        for network in sorted(used, key=lambda name: -used[name])[KEPT_NETWORKS:]:
            for path in self.folder.glob(f"{network}-*"):
                shutil.rmtree(path, ignore_errors=True)


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
    np.save(folder / "labels.npy", labels)


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
        seal = json.loads((entry / _SEAL).read_text())
        sums = seal.pop("sha256")
        if seal != facts or any(sha256(entry / name) != sums[name] for name in _FILES):
            return None
        found = _mapped(entry)
        os.utime(entry / _SEAL)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found


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
    """`FeatureCache.get`, or None with a warning where nothing can be stored."""
    try:
        return cache.get(network, images, source, sound)
    except OSError as error:
        reason = error.strerror or error
        warnings.warn(f"{cache.folder}: features are not kept: {reason}", stacklevel=2)
        return None
