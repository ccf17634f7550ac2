"""A dataset: which sample goes into which shard, what is there already, and the seal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from data_prep import pool
from data_prep.files import sweep, write_whole
from data_prep.split import Split
from data_prep.writer import NOTES, ShardTask, shard_name, write_shard
from vssl_dist.data.manifest import (
    FORMAT,
    MANIFEST,
    DataError,
    Manifest,
    ShardEntry,
    ill_sized,
    read_manifest,
    seal,
)
from vssl_dist.durable import sync

_RECIPE = "recipe.json"


@dataclass(frozen=True)
class Options:
    """How a dataset is cut up, and by how many processes (which leaves no trace)."""

    shard_size: int = 2048
    """Samples per shard."""
    limit: int | None = None
    """Keep only so many samples of each split, after mixing."""
    workers: int = 1


@dataclass(frozen=True)
class Built:
    """A sealed dataset and how much of it this call had to write."""

    folder: Path
    manifest: Manifest
    written: int


def mixed(samples: int) -> NDArray[np.int64]:
    """A fixed permutation of ``samples`` ids: the same on every machine and numpy version.

    Training shuffles within windows, so a dataset sorted by class must not reach the shards
    in that order.

    >>> sorted(mixed(5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Sorting raw Philox words, because numpy only promises the bit generator's stream.
    order = np.argsort(np.random.Philox(key=0).random_raw(samples), kind="stable")
    return order.astype(np.int64)


def build(split: Split, out: Path, options: Options, advance: Callable[[int], None]) -> Built:
    """Write ``out/<split>/``, or what is still missing of it.

    Args:
        split: What to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it up.
        advance: Called with numbers of samples as they are done.

    Raises:
        DataError: An unusable image, a full disk, or a folder that holds something else.
    """
    folder = out / split.name
    samples = np.arange(len(split.labels))
    order = (mixed(len(samples)) if split.grouped else samples)[: options.limit]
    if not len(order):
        raise DataError(f"{split.dataset}: the {split.name} split has no samples")
    recipe = _recipe(split, options)
    if _finished(folder, recipe):
        advance(len(order))
        return Built(folder, read_manifest(folder), 0)
    with _claimed(folder):
        done = _begun(folder, recipe)
        write_whole(folder / NOTES / _RECIPE, json.dumps(recipe).encode())
        tasks = [
            ShardTask(folder, number, first, split.labels[which], split.images(which))
            for number, first in enumerate(range(0, len(order), options.shard_size))
            if shard_name(number) not in done
            for which in [order[first : first + options.shard_size]]
        ]
        missing = sum(len(task.labels) for task in tasks)
        advance(len(order) - missing)
        for entry in pool.run(write_shard, tasks, workers=options.workers, advance=advance):
            done[entry.name] = entry
        sync(folder)
        write_whole(folder / MANIFEST, _sealed(split, [done[n] for n in sorted(done)], recipe))
        sync(folder)
        shutil.rmtree(folder / NOTES)
    return Built(folder, read_manifest(folder), missing)


def _recipe(split: Split, options: Options) -> dict[str, Any]:
    """Everything the bytes depend on; equal recipes give equal folders."""
    return {
        "dataset": split.dataset,
        "split": split.name,
        "order": "mixed" if split.grouped else "as given",
        "shard_size": options.shard_size,
        "limit": options.limit,
        **split.facts,
    }


def _sealed(split: Split, shards: list[ShardEntry], recipe: dict[str, Any]) -> bytes:
    return seal(
        {
            "format": FORMAT,
            "name": split.dataset,
            "split": split.name,
            "samples": sum(shard.samples for shard in shards),
            "classes": list(split.classes),
            "shards": [asdict(shard) for shard in shards],
            "source": recipe,
        }
    )


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder against a second sharding process, and leave no half-written file in it."""
    notes = folder / NOTES
    try:
        if folder.is_dir() and _foreign(folder):
            raise DataError(
                f"{folder}: holds files that are no dataset (such as {_foreign(folder)}): choose "
                "another --out"
            )
        notes.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(notes / "lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise DataError(f"{folder}: another process is sharding into it: wait for it") from None
    except OSError as error:
        raise DataError(f"{folder}: cannot be made ({error.strerror or error})") from error
    try:
        sweep(folder)
        sweep(notes)
        yield
    finally:
        sweep(folder)
        sweep(notes)
        lock.release()


def _foreign(folder: Path) -> str:
    """A file of a folder that was not made here ("" = none)."""
    if (folder / MANIFEST).exists() or (folder / NOTES).exists():
        return ""
    return min((path.name for path in folder.iterdir()), default="")


def _finished(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether there is nothing to do; refuses a finished dataset of another recipe."""
    if not (folder / MANIFEST).exists():
        return False
    manifest = read_manifest(folder)
    _refuse_another(folder, manifest.source, recipe)
    return not any(ill_sized(folder, manifest)) and not (folder / NOTES).exists()


def _begun(folder: Path, recipe: dict[str, Any]) -> dict[str, ShardEntry]:
    """The shards that are there in full length, by name."""
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        damaged = {name for name, _ in ill_sized(folder, manifest)}
        return {e.name: e for e in manifest.shards if not {e.name, e.index_name} & damaged}
    notes = folder / NOTES
    if (notes / _RECIPE).exists():
        _refuse_another(folder, _load(notes / _RECIPE), recipe)
    entries = [_entry(path) for path in notes.glob("shard-*.json")]
    return {
        e.name: e
        for e in entries
        if e and _size(folder / e.name) == e.bytes and _size(folder / e.index_name)
    }


def _entry(note: Path) -> ShardEntry | None:
    """A finished shard by its note; None if the note itself was cut short."""
    try:
        return ShardEntry(**json.loads(note.read_bytes()))
    except (ValueError, TypeError):
        return None


def _refuse_another(folder: Path, before: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    for key in sorted({*recipe, *before}):
        if recipe.get(key) != before.get(key):
            raise DataError(
                f"{folder}: was begun with another {key} ({before.get(key)!r}, now "
                f"{recipe.get(key)!r}): delete it or choose another --out"
            )


def _load(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): delete the folder above it") from error
    return loaded


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
