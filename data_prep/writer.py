"""One shard: a tar, its index, and a note that both are done."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.files import whole_file, write_whole
from data_prep.images import Encoded
from vssl_dist.data.manifest import INDEX_DTYPE, ShardEntry

NOTES = ".sharding"
"""Folder, inside the dataset's, of what an unfinished run needs to continue."""

_REPORT_EVERY = 64


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    folder: Path
    number: int
    first: int
    """Global id of the shard's first sample; the tar's keys are the global ids."""
    labels: NDArray[np.int64]
    images: Iterable[Encoded]


def shard_name(number: int) -> str:
    """File name of a shard.

    >>> shard_name(12)
    'shard-000012.tar'
    """
    return f"shard-{number:06d}.tar"


def sample_record(sample: int, image: Encoded, label: int) -> bytes:
    """The part of a tar that one sample occupies: the image, then its label as decimal text.

    Nothing in it depends on when, where or by whom it is written.  What stands before the dot
    of a member's name is the global id of the sample; by it WebDataset groups the two files.

    >>> len(sample_record(0, Encoded(b"...", "png", 1, 1), label=7)) // tarfile.BLOCKSIZE
    4
    """
    parts: list[bytes] = []
    for suffix, data in ((image.suffix, image.data), ("cls", str(label).encode())):
        member = tarfile.TarInfo(f"{sample:012d}.{suffix}")
        member.size = len(data)
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        parts += [member.tobuf(tarfile.USTAR_FORMAT), data, padding]
    return b"".join(parts)


def note_path(folder: Path, number: int) -> Path:
    """Where a finished shard's manifest entry waits for the others."""
    return folder / NOTES / f"{shard_name(number)}.json"


def write_shard(task: ShardTask) -> Generator[int, None, ShardEntry]:
    """Write tar and index, each whole or not at all, and then the note.

    Yields:
        How many samples it has written since the last time.

    Returns:
        The shard's entry of the manifest.

    Raises:
        DataError: An image is unusable or the disk refuses.
    """
    rows = np.empty(len(task.labels), INDEX_DTYPE)
    path, digest, size = task.folder / shard_name(task.number), hashlib.sha256(), 0
    with whole_file(path) as file:
        samples = zip(task.images, task.labels.tolist(), strict=True)
        for row, (image, label) in enumerate(samples):
            record = sample_record(task.first + row, image, label)
            file.write(record)
            digest.update(record)
            crc32, offset = zlib.crc32(image.data), size + tarfile.BLOCKSIZE
            rows[row] = (offset, len(image.data), image.height, image.width, label, crc32)
            size += len(record)
            if (row + 1) % _REPORT_EVERY == 0:
                yield _REPORT_EVERY
        # Two empty blocks end an archive; tar programs expect whole records besides.
        end = bytes(2 * tarfile.BLOCKSIZE)
        end += bytes(-(size + len(end)) % tarfile.RECORDSIZE)
        file.write(end)
        digest.update(end)
    yield len(rows) % _REPORT_EVERY
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    entry = ShardEntry(
        name=path.name,
        bytes=size + len(end),
        samples=len(rows),
        sha256=digest.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
    )
    write_whole(task.folder / entry.index_name, index.getvalue())
    # Not flushed to disk: if a power cut takes the note, its shard is written again.
    note_path(task.folder, task.number).write_text(json.dumps(asdict(entry)))
    return entry
