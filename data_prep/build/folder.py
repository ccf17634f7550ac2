"""The folder of one split while it is being made: whose it is, and what is there already."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vssl_dist.data.store.manifest import MANIFEST, ShardEntry, read_manifest, size_problems
from vssl_dist.durable import sha256
from vssl_dist.errors import DataError

from ..files import (
    held,
    sweep,
    write_whole,
)
from ..images.agreement import JUDGE
from .decisions import Decided, Digests, judged_alone
from .writer import NOTES, shard_name

INPUTS = "inputs.npy"
"""``(samples, 32)`` uint8: the SHA-256 of what each sample was made from."""
REJECTS = "rejects.jsonl"
"""A line for every image that is not in the dataset exactly as it was found."""
FOUND = ("content", "rejects")
"""What a manifest's ``source`` states besides the options: known only after the survey."""

_RECIPE = "recipe.json"

Recipe = dict[str, Any]


def refuse_foreign(folder: Path) -> None:
    """Leave a folder alone that was not made here.

    Raises:
        DataError: There are files in it that are no dataset.
    """
    if not folder.is_dir() or (folder / MANIFEST).exists() or (folder / NOTES).exists():
        return
    if foreign := min((path.name for path in folder.iterdir()), default=""):
        raise DataError(
            f"{folder}: holds files that are no dataset (such as {foreign}): choose another --out"
        )


@contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """Hold the folder against a second sharding process, and leave no half-written file in it.

    Yields:
        The folder for notes.

    Raises:
        DataError: Another process holds it, or it cannot be made.
    """
    notes = folder / NOTES
    with held(notes / "lock", folder, "process is sharding into it"):
        try:
            sweep(folder)
            sweep(notes)
            yield notes
        finally:
            sweep(folder)
            sweep(notes)


def finished(folder: Path, recipe: Recipe) -> bool:
    """Whether there is nothing to do; refuses a folder that was begun with another recipe.

    Args:
        folder: Of the split.
        recipe: Without what only a survey tells.

    Raises:
        DataError: The folder was begun with another recipe, or its manifest is damaged.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_another(folder, manifest.source, recipe)
        whole = not any(size_problems(folder, manifest)) and intact_inputs(folder, manifest.source)
        return whole and not (folder / NOTES).exists()
    if (folder / NOTES / _RECIPE).exists():
        _refuse_another(folder, _load(folder / NOTES / _RECIPE), recipe)
    return False


def begin(folder: Path, recipe: Recipe, decided: Decided) -> dict[str, ShardEntry]:
    """Note what is being made here.

    Args:
        folder: Of the split, claimed.
        recipe: With what the survey told.
        decided: The same in full.

    Returns:
        The shards that are there already in full length, by name.

    Raises:
        DataError: The folder was begun with another recipe, as when an image was replaced.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_another(folder, manifest.source, recipe)
        damaged = {name for name, _ in size_problems(folder, manifest)}
        return {e.name: e for e in manifest.shards if not {e.name, e.index_name} & damaged}
    note = folder / NOTES / _RECIPE
    noted = _noted(recipe, decided)
    if note.exists():
        _refuse_another(folder, _load(note), noted)
    write_whole(note, json.dumps(noted).encode())
    entries = [_entry(path) for path in note.parent.glob("shard-*.json")]
    return {
        e.name: e
        for e in entries
        if e and _size(folder / e.name) == e.bytes and _size(folder / e.index_name)
    }


def amend(folder: Path, recipe: Recipe, decided: Decided, keep: int) -> None:
    """Let another recipe go on from what was begun here.

    Args:
        folder: Of the split, claimed and not sealed.
        recipe: The new one.
        decided: What it was made from.
        keep: So many of the first shards are the same by both.
    """
    # Notes first: a shard without one is none.
    for path in (*(folder / NOTES).glob("shard-*.json"), *folder.glob("shard-*")):
        if path.name.partition(".")[0] >= Path(shard_name(keep)).stem:
            path.unlink()
    write_whole(folder / NOTES / _RECIPE, json.dumps(_noted(recipe, decided)).encode())


def _noted(recipe: Recipe, decided: Decided) -> Recipe:
    """The recipe without what lies beside the images: that may come and go."""
    return recipe | {"rejects": digest_of(decided.judged())}


def settled(folder: Path, decided: Decided) -> bytes:
    """What ``rejects.jsonl`` is to hold: what was sealed, if that says the same of all samples."""
    if not (folder / MANIFEST).exists():
        return decided.lines()
    sealed = read_manifest(folder).source.get(FOUND[1])
    there = folder / REJECTS
    if there.is_file() and digest_of(lines := there.read_bytes()) == sealed:
        same = judged_alone(lines) == decided.judged()
        return lines if same else decided.lines()
    return decided.judged() if digest_of(decided.judged()) == sealed else decided.lines()


def digest_of(lines: bytes) -> str | None:
    """How a manifest states the contents of ``rejects.jsonl``, which is not there if empty."""
    return hashlib.sha256(lines).hexdigest() if lines else None


def sealed_digests(out: Path, names: set[str]) -> dict[str, Digests]:
    """Digests of the finished splits of a dataset, by name.

    Args:
        out: Folder of the dataset.
        names: Splits to leave out.

    Raises:
        DataError: They are damaged.
    """
    found: dict[str, Digests] = {}
    for path in sorted(out.glob(f"*/{INPUTS}")):
        folder = path.parent
        if folder.name in names or not (folder / MANIFEST).exists():
            continue
        if not intact_inputs(folder, read_manifest(folder).source):
            raise DataError(f"{path}: damaged: delete {folder} and shard it again")
        found[folder.name] = np.load(path, allow_pickle=False)
    return found


def inputs_blob(digests: Digests) -> bytes:
    """The bytes of ``inputs.npy``."""
    stream = io.BytesIO()
    np.save(stream, digests, allow_pickle=False)
    return stream.getvalue()


def intact_inputs(folder: Path, source: Mapping[str, Any]) -> bool:
    """Whether ``inputs.npy`` and ``rejects.jsonl`` are what the manifest states."""
    return not any(
        _digest(folder / name) != source.get(key)
        for key, name in zip(FOUND, (INPUTS, REJECTS), strict=True)
    )


def _digest(path: Path) -> str | None:
    """SHA-256 of a small file, None if it is not there."""
    return sha256(path) if path.exists() else None


def _entry(note: Path) -> ShardEntry | None:
    """A finished shard by its note; None if the note itself was cut short."""
    try:
        return ShardEntry(**json.loads(note.read_bytes()))
    except (ValueError, TypeError):
        return None


def _refuse_another(folder: Path, before: Mapping[str, Any], recipe: Recipe) -> None:
    keys = {*recipe, *before} - (set() if set(FOUND) <= set(recipe) else set(FOUND))
    for key in sorted(keys - {JUDGE}):
        if recipe.get(key) != before.get(key):
            if key in FOUND:
                raise DataError(
                    f"{folder}: an input image was replaced since this was begun, or is judged "
                    "otherwise by this version: delete it or choose another --out"
                )
            raise DataError(
                f"{folder}: was begun with another {key} ({before.get(key)!r}, now "
                f"{recipe.get(key)!r}): delete it or choose another --out"
            )


def _load(path: Path) -> Recipe:
    try:
        loaded: Recipe = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): delete the folder above it") from error
    return loaded


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
