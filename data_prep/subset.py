"""Some classes of a sharded split as a split of their own, without a copy of its images:

    python data_prep/subset.py data/cifar10/train --classes cat,dog --out data/cats_dogs/train

The new folder has a manifest and indices, and links to the tars of the old one, which therefore
has to stay where it is.  Training and evaluation read by index, so they see these classes only,
numbered anew in their old order; programs that read whole tars see all images.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()
    from vssl_dist.cli.program import script

    sys.exit(script("subset", sys.argv[1:], "subset.py"))

import numpy as np

from vssl_dist.cli.program import arguments as parse_arguments
from vssl_dist.config.paths import expanded
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    ShardEntry,
    iter_size_problems,
    read_manifest,
    seal,
)
from vssl_dist.durable import is_partial_file_name, sync_to_disk
from vssl_dist.errors import DataError
from vssl_dist.text import say

from .files import hold_lock, write_whole
from .images.agreement import JUDGED_BY_KEY
from .sharding.split_folder import refuse_foreign_folder
from .sharding.writer import NOTES_FOLDER_NAME
from .sources.base import LABELS_KEY
from .sources.classlist import read_class_list

_SPLIT_FILE_PATTERN = re.compile(
    rf"{re.escape(MANIFEST)}|shard-\d+\.(tar|idx\.npy)|\.(shard-\d+|manifest)[\w.]*\.tmp-\d+",
    re.ASCII,
)
"""File names that belong to a split, also those that earlier versions left half-written."""


class OccupiedFolderError(DataError):
    """The folder of a new split holds another dataset."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake in it ends the program with exit code 2."""
    return parse_arguments("subset", sys.argv[1:] if words is None else words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (a clear error) or 130 (Ctrl-C)."""
    args = arguments(words)
    with end_in_one_line(args.out) as ending:
        manifest = write_subset(
            args.folder,
            parse_class_names(args.classes, Dataset.open(args.folder).classes),
            args.out,
        )
        say(
            f"{args.out}: {manifest.samples} samples, {len(manifest.classes)} classes, in links to "
            f"{len(manifest.shards)} shards of {args.folder}"
        )
    return ending.exit_code


def parse_class_names(text: str, known_classes: Sequence[str]) -> tuple[str, ...]:
    """Parse the classes that a command line names, in the order in which they are known.

    Args:
        text: Names with commas between, or the path of a file for `classlist.read_class_list`.
        known_classes: The classes there are.

    Raises:
        DataError: A name is none of the classes.

    >>> parse_class_names("dog, cat", ("cat", "cow", "dog"))
    ('cat', 'dog')
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not set(names) <= set(known_classes) and (file := _file(text)).is_file():
        names = list(read_class_list(file, known_classes))
    unknown = [name for name in names if name not in known_classes]
    if unknown or not names:
        known_classes_text = ", ".join(known_classes[:12]) + (
            ", ..." if len(known_classes) > 12 else ""
        )
        unknown_name = unknown[0] if unknown else "nothing"
        raise DataError(f"--classes {text}: {unknown_name} is none of {known_classes_text}")
    return tuple(name for name in known_classes if name in names)


def _file(text: str) -> Path:
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise DataError(f"--classes {error}") from None


def write_subset(folder: Path, classes: Sequence[str], out: Path) -> Manifest:
    """Write the samples of some classes of a split as a split of their own, in their order.

    What is there already of the same classes of the same data is left alone; a call that was
    killed is made good by the same call.

    Args:
        folder: Folder of the split to take samples from.
        classes: Classes to keep.
        out: Folder to make.

    Returns:
        The manifest of ``out``.

    Raises:
        OccupiedFolderError: ``out`` holds another dataset.
        DataError: The split is damaged, has no image of these classes, or ``out`` is no folder for
            one.
    """
    dataset = Dataset.open(folder)
    kept_labels = [label for label, name in enumerate(dataset.classes) if name in set(classes)]
    original_source = dataset.manifest.source
    original_labels = original_source.get(LABELS_KEY, range(len(dataset.classes)))
    source: dict[str, object] = {
        "subset_of": dataset.fingerprint,
        LABELS_KEY: [original_labels[label] for label in kept_labels],
    }
    source |= {
        key: original_source[key] for key in ("max_pixels", JUDGED_BY_KEY) if key in original_source
    }
    if manifest := _finished_manifest(out, source):
        return manifest
    with _claim_out_folder(out) as partial_folder:
        # Another call may have made it since.
        if manifest := _finished_manifest(out, source):
            return manifest
        _write_split(dataset, kept_labels, partial_folder, source)
        _discard_split_folder(out)
        # One rename: a killed call leaves either no subset or a whole one.
        partial_folder.rename(out)
        sync_to_disk(partial_folder.parent)
    return read_manifest(out)


def _finished_manifest(out: Path, source: dict[str, object]) -> Manifest | None:
    """Return the manifest of a finished subset; None if it is still to be made."""
    refuse_foreign_folder(out)
    if (out / NOTES_FOLDER_NAME).exists():
        raise DataError(f"{out}: data_prep/shard.py is at work there: choose another --out")
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest.source != source:
            raise OccupiedFolderError(
                f"{out}: holds another dataset: delete it or choose another --out"
            )
        if not any(iter_size_problems(out, manifest)):
            return manifest
        if foreign_name := _foreign_name(out):
            raise DataError(
                f"{out}: is damaged, and holds {foreign_name}, too: move that, or delete the rest"
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out}: is a link or a file and no folder: choose another --out")
    return None


def _foreign_name(folder: Path) -> str | None:
    """Name something in a split's folder that is none of its files; None if there is nothing."""
    names = (
        path.name
        for path in folder.iterdir()
        if not (_SPLIT_FILE_PATTERN.fullmatch(path.name) or is_partial_file_name(path.name))
        or _is_folder(path)
    )
    return min(names, default=None)


def _discard_split_folder(folder: Path) -> None:
    """Delete a damaged or unfinished split, unless something else lies in its folder."""
    if _is_folder(folder) and _foreign_name(folder) is None:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def _claim_out_folder(out: Path) -> Iterator[Path]:
    """Hold ``out`` against a second call.

    Yields:
        A folder beside it to make it in and to move there: whatever is there is whole.

    Raises:
        DataError: Another call holds it, or the file system refuses something.
    """
    lock_path = out.parent / f".{out.name}.lock"
    with hold_lock(lock_path, out, "call is making it"):
        try:
            parent_folder = out.parent.resolve()
            for leftover_path in parent_folder.glob(".*"):
                if _is_unfinished_folder_name(leftover_path, out.name):
                    _discard_split_folder(leftover_path)
            partial_folder = parent_folder / f".{out.name}.tmp-{uuid4().hex[:12]}"
            partial_folder.mkdir()
            try:
                yield partial_folder
            finally:
                _discard_split_folder(partial_folder)
                lock_path.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be made ({error.strerror or error})") from error


def _is_unfinished_folder_name(path: Path, name: str) -> bool:
    """Tell by its name whether a folder was left by a killed call, also of earlier versions."""
    pattern = rf"\.{re.escape(name)}\.tmp-(\d+|[0-9a-f]{{12}})"
    return re.fullmatch(pattern, path.name, re.ASCII) is not None


def _write_split(
    dataset: Dataset, labels: list[int], folder: Path, source: dict[str, object]
) -> None:
    """Link the shards that hold a wanted sample, each with an index of those alone; seal."""
    entries: list[ShardEntry] = []
    first_id = 0
    for entry in dataset.manifest.shards:
        rows = dataset.rows(np.arange(first_id, first_id + entry.samples))
        first_id += entry.samples
        selected_rows = rows[np.isin(rows["label"], labels)]
        if not len(selected_rows):
            continue
        selected_rows["label"] = np.searchsorted(labels, selected_rows["label"])
        index = io.BytesIO()
        np.save(index, selected_rows, allow_pickle=False)
        index_digest = hashlib.sha256(index.getvalue()).hexdigest()
        entries.append(replace(entry, samples=len(selected_rows), index_sha256=index_digest))
        write_whole(folder / entry.index_name, index.getvalue())
        target = (dataset.folder / entry.name).resolve()
        (folder / entry.name).symlink_to(os.path.relpath(target, folder))
    if not entries:
        names = ", ".join(dataset.classes[label] for label in labels)
        raise DataError(f"{dataset.folder}: has no image of {names}")
    contents = {
        "format": FORMAT,
        "name": dataset.manifest.name,
        "split": dataset.manifest.split,
        "samples": sum(entry.samples for entry in entries),
        "classes": [dataset.classes[label] for label in labels],
        "shards": [asdict(entry) for entry in entries],
        "source": source,
    }
    write_whole(folder / MANIFEST, seal(contents))
    sync_to_disk(folder)
