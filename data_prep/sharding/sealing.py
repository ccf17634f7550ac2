"""The end of a split: its manifest is written last, when all else is on disk."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from vssl_dist.data.store.manifest import FORMAT, MANIFEST, ShardEntry, seal
from vssl_dist.durable import sync_to_disk
from vssl_dist.errors import DataError

from ..files import write_whole
from ..sources.base import Split
from .decisions import find_leaked_digests
from .split_folder import INPUT_DIGESTS_NAME, REJECTS_NAME, ShardingRecipe, read_sealed_digests
from .writer import NOTES_FOLDER_NAME


def seal_split(
    split: Split,
    folder: Path,
    shards: Sequence[ShardEntry],
    recipe: ShardingRecipe,
    contents: Mapping[str, bytes],
) -> None:
    """Seal a folder of written shards as a dataset.

    Args:
        split: What was written.
        folder: The folder of the split.
        shards: Manifest entries of all shards, in order.
        recipe: The source that the manifest states.
        contents: The files beside the shards, by name.

    Raises:
        DataError: A split that was finished meanwhile shares images with it.
    """
    # Another process may have finished the other split since this one was surveyed.
    sealed_digests = read_sealed_digests(folder.parent, {split.name})
    split_digests = np.load(io.BytesIO(contents[INPUT_DIGESTS_NAME]), allow_pickle=False)
    if find_leaked_digests(split.name, {**sealed_digests, split.name: split_digests}):
        raise DataError(
            f"{folder}: shares images with a split that was finished meanwhile: run again"
        )
    write_whole(folder / INPUT_DIGESTS_NAME, contents[INPUT_DIGESTS_NAME])
    if contents[REJECTS_NAME]:
        write_whole(folder / REJECTS_NAME, contents[REJECTS_NAME])
    else:
        (folder / REJECTS_NAME).unlink(missing_ok=True)
    manifest = {
        "format": FORMAT,
        "name": split.dataset,
        "split": split.name,
        "samples": sum(shard.samples for shard in shards),
        "classes": list(split.classes),
        "shards": [asdict(shard) for shard in shards],
        "source": recipe,
    }
    sync_to_disk(folder)
    write_whole(folder / MANIFEST, seal(manifest))
    sync_to_disk(folder)
    shutil.rmtree(folder / NOTES_FOLDER_NAME)
