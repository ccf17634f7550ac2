"""Folder of a split while it is written: whose it is, its recipe, and what is there already."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vssl_dist.data.store.manifest import MANIFEST, ShardEntry, read_manifest, size_problems
from vssl_dist.durable import file_sha256
from vssl_dist.errors import DataError

from ..files import (
    hold_lock,
    remove_partial_files,
    write_whole,
)
from ..images.agreement import JUDGE_KEY
from .decisions import Digests, SplitDecisions, without_left_out
from .writer import NOTES, shard_name

INPUTS = "inputs.npy"
"""``(samples, 32)`` uint8: the SHA-256 of what each sample was made from."""
REJECTS = "rejects.jsonl"
"""A line for every image that is not in the dataset exactly as it was found."""
SURVEYED_KEYS = ("content", "rejects")
"""Keys of a manifest's ``source`` that are known only after the survey."""

_RECIPE = "recipe.json"

Recipe = dict[str, object]
"""Options and inputs that the bytes of a split depend on; becomes its manifest's ``source``."""


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder that holds files and no dataset.

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
def claim_folder(folder: Path) -> Iterator[Path]:
    """Hold the folder against a second sharding process, and leave no half-written file in it.

    Yields:
        The folder for notes.

    Raises:
        DataError: Another process holds it, or it cannot be made.
    """
    notes = folder / NOTES
    with hold_lock(notes / "lock", folder, "process is sharding into it"):
        try:
            remove_partial_files(folder)
            remove_partial_files(notes)
            yield notes
        finally:
            remove_partial_files(folder)
            remove_partial_files(notes)


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Tell whether a split is complete; refuses a folder that was begun with another recipe.

    Args:
        folder: The folder of the split.
        recipe: The recipe without `SURVEYED_KEYS`.

    Raises:
        DataError: The folder was begun with another recipe, or its manifest is damaged.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_other_recipe(folder, manifest.source, recipe)
        is_whole = not any(size_problems(folder, manifest)) and has_intact_inputs(
            folder, manifest.source
        )
        return is_whole and not (folder / NOTES).exists()
    if (folder / NOTES / _RECIPE).exists():
        _refuse_other_recipe(folder, _load_recipe(folder / NOTES / _RECIPE), recipe)
    return False


def begin_split(folder: Path, recipe: Recipe, decisions: SplitDecisions) -> dict[str, ShardEntry]:
    """Note the recipe of a split that is to be written, and list its finished shards.

    Args:
        folder: The folder of the split, claimed.
        recipe: The whole recipe, with `SURVEYED_KEYS`.
        decisions: What was decided on the samples.

    Returns:
        The shards that are there already in full length, by name.

    Raises:
        DataError: The folder was begun with another recipe, as when an image was replaced.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_other_recipe(folder, manifest.source, recipe)
        damaged = {name for name, _ in size_problems(folder, manifest)}
        return {
            entry.name: entry
            for entry in manifest.shards
            if not {entry.name, entry.index_name} & damaged
        }
    recipe_note = folder / NOTES / _RECIPE
    noted_recipe = _sharding_recipe(recipe, decisions)
    if recipe_note.exists():
        _refuse_other_recipe(folder, _load_recipe(recipe_note), noted_recipe)
    write_whole(recipe_note, json.dumps(noted_recipe).encode())
    entries = [_read_shard_note(path) for path in recipe_note.parent.glob("shard-*.json")]
    return {
        entry.name: entry
        for entry in entries
        if entry
        and _file_size(folder / entry.name) == entry.bytes
        and _file_size(folder / entry.index_name)
    }


def change_recipe(
    folder: Path, recipe: Recipe, decisions: SplitDecisions, unchanged_shards: int
) -> None:
    """Replace the recipe of a begun split, keeping the shards that both recipes share.

    Args:
        folder: The folder of the split, claimed and not sealed.
        recipe: The new recipe.
        decisions: The decisions that the new recipe was made from.
        unchanged_shards: How many of the first shards are the same by both recipes.
    """
    # Notes first: a shard without one is none.
    for path in (*(folder / NOTES).glob("shard-*.json"), *folder.glob("shard-*")):
        if path.name.partition(".")[0] >= Path(shard_name(unchanged_shards)).stem:
            path.unlink()
    write_whole(folder / NOTES / _RECIPE, json.dumps(_sharding_recipe(recipe, decisions)).encode())


def _sharding_recipe(recipe: Recipe, decisions: SplitDecisions) -> Recipe:
    """Make the recipe to note, which ignores what lies beside the images: that may come and go."""
    return recipe | {"rejects": rejects_digest(decisions.sample_lines())}


def rejects_to_write(folder: Path, decisions: SplitDecisions) -> bytes:
    """Choose what ``rejects.jsonl`` is to hold: what was sealed, if it agrees on all samples."""
    if not (folder / MANIFEST).exists():
        return decisions.rejects_lines()
    sealed_digest = read_manifest(folder).source.get(SURVEYED_KEYS[1])
    rejects_path = folder / REJECTS
    if (
        rejects_path.is_file()
        and rejects_digest(lines := rejects_path.read_bytes()) == sealed_digest
    ):
        says_the_same = without_left_out(lines) == decisions.sample_lines()
        return lines if says_the_same else decisions.rejects_lines()
    return (
        decisions.sample_lines()
        if rejects_digest(decisions.sample_lines()) == sealed_digest
        else decisions.rejects_lines()
    )


def rejects_digest(lines: bytes) -> str | None:
    """Digest ``rejects.jsonl`` as a manifest states it; None if it is empty and so not written."""
    return hashlib.sha256(lines).hexdigest() if lines else None


def read_sealed_digests(out: Path, excluded: set[str]) -> dict[str, Digests]:
    """Read the digests of the finished splits of a dataset, by split name.

    Args:
        out: Folder of the dataset.
        excluded: Names of splits to leave out.

    Raises:
        DataError: The digests of a finished split are damaged.
    """
    digests: dict[str, Digests] = {}
    for path in sorted(out.glob(f"*/{INPUTS}")):
        folder = path.parent
        if folder.name in excluded or not (folder / MANIFEST).exists():
            continue
        if not has_intact_inputs(folder, read_manifest(folder).source):
            raise DataError(f"{path}: damaged: delete {folder} and shard it again")
        digests[folder.name] = np.load(path, allow_pickle=False)
    return digests


def encode_inputs(digests: Digests) -> bytes:
    """Encode digests as the bytes of ``inputs.npy``."""
    stream = io.BytesIO()
    np.save(stream, digests, allow_pickle=False)
    return stream.getvalue()


def has_intact_inputs(folder: Path, source: Mapping[str, object]) -> bool:
    """Tell whether ``inputs.npy`` and ``rejects.jsonl`` are what the manifest states."""
    return not any(
        _file_digest(folder / name) != source.get(key)
        for key, name in zip(SURVEYED_KEYS, (INPUTS, REJECTS), strict=True)
    )


def _file_digest(path: Path) -> str | None:
    """Compute the SHA-256 of a small file; None if it is not there."""
    return file_sha256(path) if path.exists() else None


def _read_shard_note(note: Path) -> ShardEntry | None:
    """Read a finished shard's manifest entry from its note; None if the note was cut short."""
    try:
        return ShardEntry(**json.loads(note.read_bytes()))
    except (ValueError, TypeError):
        return None


def _refuse_other_recipe(
    folder: Path, earlier_recipe: Mapping[str, object], recipe: Recipe
) -> None:
    keys = {*recipe, *earlier_recipe} - (
        set() if set(SURVEYED_KEYS) <= set(recipe) else set(SURVEYED_KEYS)
    )
    for key in sorted(keys - {JUDGE_KEY}):
        if recipe.get(key) != earlier_recipe.get(key):
            if key in SURVEYED_KEYS:
                raise DataError(
                    f"{folder}: an input image was replaced since this was begun, or is judged "
                    "otherwise by this version: delete it or choose another --out"
                )
            raise DataError(
                f"{folder}: was begun with another {key} ({earlier_recipe.get(key)!r}, now "
                f"{recipe.get(key)!r}): delete it or choose another --out"
            )


def _load_recipe(path: Path) -> Recipe:
    try:
        loaded: Recipe = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): delete the folder above it") from error
    return loaded


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
