"""Folder of a split while it is written: whose it is, its recipe, and what is there already."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vssl_dist.data.store.manifest import MANIFEST, ShardEntry, iter_size_problems, read_manifest
from vssl_dist.durable import file_sha256
from vssl_dist.errors import DataError

from ..files import (
    hold_lock,
    remove_partial_files,
    write_whole,
)
from ..images.agreement import JUDGED_BY_KEY
from .decisions import InputDigests, SplitDecisions, keep_sample_lines
from .writer import NOTES_FOLDER_NAME, shard_name

INPUT_DIGESTS_NAME = "inputs.npy"
"""``(samples, 32)`` uint8: the SHA-256 of what each sample was made from."""
REJECTS_NAME = "rejects.jsonl"
"""A line for every image that is not in the dataset exactly as it was found."""
KEYS_AFTER_SURVEY = ("content", "rejects")
"""Keys of a manifest's ``source`` that are known only after the survey."""

_RECIPE_FILE_NAME = "recipe.json"

ShardingRecipe = dict[str, object]
"""Options and inputs that the bytes of a split depend on; becomes its manifest's ``source``."""


def refuse_foreign_folder(folder: Path) -> None:
    """Refuse a folder that holds files and no dataset.

    Raises:
        DataError: There are files in it that are no dataset.
    """
    if not folder.is_dir() or (folder / MANIFEST).exists() or (folder / NOTES_FOLDER_NAME).exists():
        return
    if foreign_name := min((path.name for path in folder.iterdir()), default=""):
        raise DataError(
            f"{folder}: holds files that are no dataset (such as {foreign_name}): "
            "choose another --out"
        )


@contextmanager
def claim_split_folder(folder: Path) -> Iterator[Path]:
    """Hold the folder against a second sharding process, and leave no half-written file in it.

    Yields:
        The folder for notes.

    Raises:
        DataError: Another process holds it, or it cannot be made.
    """
    notes_folder = folder / NOTES_FOLDER_NAME
    with hold_lock(notes_folder / "lock", folder, "process is sharding into it"):
        try:
            remove_partial_files(folder)
            remove_partial_files(notes_folder)
            yield notes_folder
        finally:
            remove_partial_files(folder)
            remove_partial_files(notes_folder)


def is_split_finished(folder: Path, recipe: ShardingRecipe) -> bool:
    """Tell whether a split is complete; refuses a folder that was begun with another recipe.

    Args:
        folder: The folder of the split.
        recipe: The recipe without `KEYS_AFTER_SURVEY`.

    Raises:
        DataError: The folder was begun with another recipe, or its manifest is damaged.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_other_recipe(folder, manifest.source, recipe)
        has_whole_files = not any(iter_size_problems(folder, manifest)) and has_intact_side_files(
            folder, manifest.source
        )
        return has_whole_files and not (folder / NOTES_FOLDER_NAME).exists()
    if (folder / NOTES_FOLDER_NAME / _RECIPE_FILE_NAME).exists():
        _refuse_other_recipe(
            folder, _load_recipe(folder / NOTES_FOLDER_NAME / _RECIPE_FILE_NAME), recipe
        )
    return False


def begin_split(
    folder: Path, recipe: ShardingRecipe, decisions: SplitDecisions
) -> dict[str, ShardEntry]:
    """Note the recipe of a split that is to be written, and list its finished shards.

    Args:
        folder: The folder of the split, claimed.
        recipe: The whole recipe, with `KEYS_AFTER_SURVEY`.
        decisions: What was decided on the samples.

    Returns:
        The shards that are there already in full length, by name.

    Raises:
        DataError: The folder was begun with another recipe, as when an image was replaced.
    """
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        _refuse_other_recipe(folder, manifest.source, recipe)
        damaged_names = {name for name, _ in iter_size_problems(folder, manifest)}
        return {
            entry.name: entry
            for entry in manifest.shards
            if not {entry.name, entry.index_name} & damaged_names
        }
    recipe_note_path = folder / NOTES_FOLDER_NAME / _RECIPE_FILE_NAME
    noted_recipe = _make_noted_recipe(recipe, decisions)
    if recipe_note_path.exists():
        _refuse_other_recipe(folder, _load_recipe(recipe_note_path), noted_recipe)
    write_whole(recipe_note_path, json.dumps(noted_recipe).encode())
    entries = [_read_shard_note(path) for path in recipe_note_path.parent.glob("shard-*.json")]
    return {
        entry.name: entry
        for entry in entries
        if entry
        and _file_size(folder / entry.name) == entry.bytes
        and _file_size(folder / entry.index_name)
    }


def change_recipe(
    folder: Path, recipe: ShardingRecipe, decisions: SplitDecisions, unchanged_shards: int
) -> None:
    """Replace the recipe of a begun split, keeping the shards that both recipes share.

    Args:
        folder: The folder of the split, claimed and not sealed.
        recipe: The new recipe.
        decisions: The decisions that the new recipe was made from.
        unchanged_shards: How many of the first shards are the same by both recipes.
    """
    # Notes first: a shard without one is none.
    for path in (*(folder / NOTES_FOLDER_NAME).glob("shard-*.json"), *folder.glob("shard-*")):
        if path.name.partition(".")[0] >= Path(shard_name(unchanged_shards)).stem:
            path.unlink()
    write_whole(
        folder / NOTES_FOLDER_NAME / _RECIPE_FILE_NAME,
        json.dumps(_make_noted_recipe(recipe, decisions)).encode(),
    )


def _make_noted_recipe(recipe: ShardingRecipe, decisions: SplitDecisions) -> ShardingRecipe:
    """Make the recipe to note, which ignores what lies beside the images: that may come and go."""
    return recipe | {"rejects": digest_rejects(decisions.encode_sample_lines())}


def rejects_to_write(folder: Path, decisions: SplitDecisions) -> bytes:
    """Choose what ``rejects.jsonl`` is to hold: what was sealed, if it agrees on all samples."""
    if not (folder / MANIFEST).exists():
        return decisions.encode_rejects_lines()
    sealed_digest = read_manifest(folder).source.get(KEYS_AFTER_SURVEY[1])
    rejects_path = folder / REJECTS_NAME
    if (
        rejects_path.is_file()
        and digest_rejects(lines := rejects_path.read_bytes()) == sealed_digest
    ):
        has_same_sample_lines = keep_sample_lines(lines) == decisions.encode_sample_lines()
        return lines if has_same_sample_lines else decisions.encode_rejects_lines()
    return (
        decisions.encode_sample_lines()
        if digest_rejects(decisions.encode_sample_lines()) == sealed_digest
        else decisions.encode_rejects_lines()
    )


def digest_rejects(lines: bytes) -> str | None:
    """Digest ``rejects.jsonl`` as a manifest states it; None if it is empty and so not written."""
    return hashlib.sha256(lines).hexdigest() if lines else None


def read_sealed_digests(out: Path, excluded_splits: set[str]) -> dict[str, InputDigests]:
    """Read the digests of the finished splits of a dataset, by split name.

    Args:
        out: Folder of the dataset.
        excluded_splits: Names of splits to leave out.

    Raises:
        DataError: The digests of a finished split are damaged.
    """
    digests: dict[str, InputDigests] = {}
    for path in sorted(out.glob(f"*/{INPUT_DIGESTS_NAME}")):
        folder = path.parent
        if folder.name in excluded_splits or not (folder / MANIFEST).exists():
            continue
        if not has_intact_side_files(folder, read_manifest(folder).source):
            raise DataError(f"{path}: damaged: delete {folder} and shard it again")
        digests[folder.name] = np.load(path, allow_pickle=False)
    return digests


def encode_input_digests(digests: InputDigests) -> bytes:
    """Encode digests as the bytes of ``inputs.npy``."""
    stream = io.BytesIO()
    np.save(stream, digests, allow_pickle=False)
    return stream.getvalue()


def has_intact_side_files(folder: Path, source: Mapping[str, object]) -> bool:
    """Tell whether ``inputs.npy`` and ``rejects.jsonl`` are what the manifest states."""
    return not any(
        _file_digest(folder / name) != source.get(key)
        for key, name in zip(KEYS_AFTER_SURVEY, (INPUT_DIGESTS_NAME, REJECTS_NAME), strict=True)
    )


def _file_digest(path: Path) -> str | None:
    """Compute the SHA-256 of a small file; None if it is not there."""
    return file_sha256(path) if path.exists() else None


def _read_shard_note(note_path: Path) -> ShardEntry | None:
    """Read a finished shard's manifest entry from its note; None if the note was cut short."""
    try:
        return ShardEntry(**json.loads(note_path.read_bytes()))
    except (ValueError, TypeError):
        return None


def _refuse_other_recipe(
    folder: Path, earlier_recipe: Mapping[str, object], recipe: ShardingRecipe
) -> None:
    compared_keys = {*recipe, *earlier_recipe} - (
        set() if set(KEYS_AFTER_SURVEY) <= set(recipe) else set(KEYS_AFTER_SURVEY)
    )
    for key in sorted(compared_keys - {JUDGED_BY_KEY}):
        if recipe.get(key) != earlier_recipe.get(key):
            if key in KEYS_AFTER_SURVEY:
                raise DataError(
                    f"{folder}: an input image was replaced since this was begun, or is judged "
                    "otherwise by this version: delete it or choose another --out"
                )
            raise DataError(
                f"{folder}: was begun with another {key} ({earlier_recipe.get(key)!r}, now "
                f"{recipe.get(key)!r}): delete it or choose another --out"
            )


def _load_recipe(path: Path) -> ShardingRecipe:
    try:
        loaded_recipe: ShardingRecipe = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}): delete the folder above it") from error
    return loaded_recipe


def _file_size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
