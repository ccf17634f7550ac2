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

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()

import filelock
import numpy as np

from data_prep.agreement import JUDGE
from data_prep.console import one_line
from data_prep.files import write_whole
from data_prep.folder import refuse_foreign
from data_prep.sources.classlist import chosen
from data_prep.split import LABELS
from data_prep.writer import NOTES
from vssl_dist.config.paths import expanded, path_argument
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
from vssl_dist.data.shards import Dataset
from vssl_dist.durable import sync
from vssl_dist.text import printable

_OURS = re.compile(rf"{re.escape(MANIFEST)}|shard-[0-9]+\.(tar|idx\.npy)|\..*\.tmp-[0-9]+")
"""Names of the files of a split, also of half-written ones."""


class Occupied(DataError):
    """Where a split is to be made lies another dataset."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="subset.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "folder", type=path_argument, help="one split of a dataset, as shard.py wrote it"
    )
    top.add_argument(
        "--classes",
        required=True,
        help="their names with commas between, or a file that lists them",
    )
    top.add_argument("--out", type=path_argument, required=True, help="folder of the new split")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (a clear error) or 130 (Ctrl-C)."""
    args = parser().parse_args(arguments)
    with one_line(args.out) as ending:
        made = subset(args.folder, named(args.classes, Dataset.open(args.folder).classes), args.out)
        print(
            f"{printable(str(args.out))}: {made.samples} samples, {len(made.classes)} classes, in "
            f"links to {len(made.shards)} shards of {printable(str(args.folder))}"
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
        if not any(ill_sized(out, made)):
            return made
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(f"{out}: is a link or a file and no folder: choose another --out")
    return None


@contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """Hold ``out`` against a second call.

    Yields:
        A folder beside it to make it in and to move there: whatever is there is whole.

    Raises:
        DataError: Another call holds it, or the file system refuses something.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        place = out.parent.resolve()
        partial = place / f".{out.name}.tmp-{os.getpid()}"
        with filelock.FileLock(place / f".{out.name}.lock", timeout=0) as lock:
            killed = re.compile(rf"\.{re.escape(out.name)}\.tmp-[0-9]+")
            for left in place.iterdir():
                if killed.fullmatch(left.name):
                    _discard(left)
            partial.mkdir()
            try:
                yield partial
            finally:
                _discard(partial)
                Path(lock.lock_file).unlink(missing_ok=True)
    except filelock.Timeout:
        raise DataError(f"{out}: another call is making it: wait for it") from None
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error.strerror or error})") from error


def _discard(folder: Path) -> None:
    """Delete a split that is to be made anew; one with anything else in it stays."""
    if folder.is_symlink() or not folder.is_dir():
        return
    files = list(folder.iterdir())
    if all(_OURS.fullmatch(file.name) and not file.is_dir() for file in files):
        for file in files:
            file.unlink()
        folder.rmdir()


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


if __name__ == "__main__":
    sys.exit(main())
