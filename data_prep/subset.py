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
from typing import Any
from uuid import uuid4

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()
    from vssl_dist.cli.program import script

    sys.exit(script("subset", sys.argv[1:], "subset.py"))

import numpy as np

from vssl_dist.cli.program import arguments as typed
from vssl_dist.config.paths import expanded
from vssl_dist.console.endings import one_line
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    ShardEntry,
    read_manifest,
    seal,
    size_problems,
)
from vssl_dist.durable import is_partial, sync
from vssl_dist.errors import DataError
from vssl_dist.text import say

from .build.folder import refuse_foreign
from .build.writer import NOTES
from .files import held, write_whole
from .images.agreement import JUDGE
from .sources.base import LABELS
from .sources.classlist import chosen

_OURS = re.compile(
    rf"{re.escape(MANIFEST)}|shard-\d+\.(tar|idx\.npy)|\.(shard-\d+|manifest)[\w.]*\.tmp-\d+",
    re.ASCII,
)
"""Files of a split, also of earlier versions' half-written ones."""


class Occupied(DataError):
    """Where a split is to be made lies another dataset."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the user typed; what is wrong with it ends the program with 2."""
    return typed("subset", sys.argv[1:] if words is None else words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (a clear error) or 130 (Ctrl-C)."""
    args = arguments(words)
    with one_line(args.out) as ending:
        made = subset(args.folder, named(args.classes, Dataset.open(args.folder).classes), args.out)
        say(
            f"{args.out}: {made.samples} samples, {len(made.classes)} classes, in links to "
            f"{len(made.shards)} shards of {args.folder}"
        )
    return ending.code


def named(text: str, known: Sequence[str]) -> tuple[str, ...]:
    """Classes as a command line names them, in the order in which they are known.

    Args:
        text: Names with commas between, or the path of a file as `classlist.chosen` reads it.
        known: The classes there are.

    Raises:
        DataError: A name is none of them.

    >>> named("dog, cat", ("cat", "cow", "dog"))
    ('cat', 'dog')
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not set(names) <= set(known) and (file := _file(text)).is_file():
        names = list(chosen(file, known))
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        odd = unknown[0] if unknown else "nothing"
        raise DataError(f"--classes {text}: {odd} is none of {shown}")
    return tuple(name for name in known if name in names)


def _file(text: str) -> Path:
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise DataError(f"--classes {error}") from None


def subset(folder: Path, classes: Sequence[str], out: Path) -> Manifest:
    """Write ``out``: the samples of ``folder`` that are of some classes, in their order.

    What is there already of the same classes of the same data is left alone; a call that was
    killed is made good by the same call.

    Args:
        folder: A split.
        classes: Those to keep.
        out: Folder to make.

    Returns:
        The manifest of ``out``.

    Raises:
        Occupied: ``out`` holds another dataset.
        DataError: The split is damaged, has no image of these classes, or ``out`` is no folder for
            one.
    """
    whole = Dataset.open(folder)
    kept = [label for label, name in enumerate(whole.classes) if name in set(classes)]
    before = whole.manifest.source
    original = before.get(LABELS, range(len(whole.classes)))
    source = {"subset_of": whole.fingerprint, LABELS: [original[label] for label in kept]}
    source |= {key: before[key] for key in ("max_pixels", JUDGE) if key in before}
    if made := _finished(out, source):
        return made
    with _claimed(out) as partial:
        # Another call may have made it since.
        if made := _finished(out, source):
            return made
        _write(whole, kept, partial, source)
        _discard(out)
        partial.rename(out)
        sync(partial.parent)
    return read_manifest(out)


def _finished(out: Path, source: dict[str, Any]) -> Manifest | None:
    """The manifest of what is there already; None if it is to be made."""
    refuse_foreign(out)
    if (out / NOTES).exists():
        raise DataError(f"{out}: data_prep/shard.py is at work there: choose another --out")
    if (out / MANIFEST).exists():
        made = read_manifest(out)
        if made.source != source:
            raise Occupied(f"{out}: holds another dataset: delete it or choose another --out")
        if not any(size_problems(out, made)):
            return made
        if more := _foreign(out):
            raise DataError(
                f"{out}: is damaged, and holds {more}, too: move that, or delete the rest"
            )
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out}: is a link or a file and no folder: choose another --out")
    return None


def _foreign(folder: Path) -> str | None:
    """Something in a split that is none of its files; None if there is nothing."""
    names = (
        path.name
        for path in folder.iterdir()
        if not (_OURS.fullmatch(path.name) or is_partial(path.name)) or _is_folder(path)
    )
    return min(names, default=None)


def _discard(folder: Path) -> None:
    """Delete a split that is to be made anew, or begun; one with anything else in it stays."""
    if _is_folder(folder) and _foreign(folder) is None:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """Hold ``out`` against a second call.

    Yields:
        A folder beside it to make it in and to move there: whatever is there is whole.

    Raises:
        DataError: Another call holds it, or the file system refuses something.
    """
    lock = out.parent / f".{out.name}.lock"
    with held(lock, out, "call is making it"):
        try:
            place = out.parent.resolve()
            for left in place.glob(".*"):
                if _unfinished(left, out.name):
                    _discard(left)
            partial = place / f".{out.name}.tmp-{uuid4().hex[:12]}"
            partial.mkdir()
            try:
                yield partial
            finally:
                _discard(partial)
                lock.unlink(missing_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be made ({error.strerror or error})") from error


def _unfinished(path: Path, name: str) -> bool:
    """Whether a folder is what a call that was killed left of a split, also of earlier versions."""
    pattern = rf"\.{re.escape(name)}\.tmp-(\d+|[0-9a-f]{{12}})"
    return re.fullmatch(pattern, path.name, re.ASCII) is not None


def _write(whole: Dataset, kept: list[int], folder: Path, source: dict[str, Any]) -> None:
    """Link the shards that hold a wanted sample, each with an index of those alone; seal."""
    parts: list[ShardEntry] = []
    first = 0
    for entry in whole.manifest.shards:
        rows = whole.rows(np.arange(first, first + entry.samples))
        first += entry.samples
        mine = rows[np.isin(rows["label"], kept)]
        if not len(mine):
            continue
        mine["label"] = np.searchsorted(kept, mine["label"])
        index = io.BytesIO()
        np.save(index, mine, allow_pickle=False)
        digest = hashlib.sha256(index.getvalue()).hexdigest()
        parts.append(replace(entry, samples=len(mine), index_sha256=digest))
        write_whole(folder / entry.index_name, index.getvalue())
        target = (whole.folder / entry.name).resolve()
        (folder / entry.name).symlink_to(os.path.relpath(target, folder))
    if not parts:
        names = ", ".join(whole.classes[label] for label in kept)
        raise DataError(f"{whole.folder}: has no image of {names}")
    contents = {
        "format": FORMAT,
        "name": whole.manifest.name,
        "split": whole.manifest.split,
        "samples": sum(part.samples for part in parts),
        "classes": [whole.classes[label] for label in kept],
        "shards": [asdict(part) for part in parts],
        "source": source,
    }
    write_whole(folder / MANIFEST, seal(contents))
    sync(folder)
