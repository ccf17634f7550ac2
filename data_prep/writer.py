"""One shard: a tar, its index, and a note that both are done."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.encode import Encoded
from data_prep.files import whole_file, write_whole
from data_prep.images import DEFAULT, Rules, encode_png, make
from data_prep.split import Raw
from data_prep.survey import digest, finding
from vssl_dist.data.manifest import INDEX_DTYPE, DataError, ShardEntry

NOTES = ".sharding"
"""Folder, inside the dataset's, of what an unfinished run needs to continue."""

_REPORT_EVERY = 64
_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
"""Where a tar header has these fields."""


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    folder: Path
    number: int
    first: int
    """Global id of the shard's first sample; the tar's keys are the global ids."""
    labels: NDArray[np.int64]
    images: Iterable[Raw]
    survey: NDArray[np.void]
    """``(samples,)`` of ``SURVEY_DTYPE``: what was found out about these images."""
    rules: Rules = DEFAULT


class UnreadError(DataError):
    """Samples that were surveyed cannot be read any more, and may be left out."""

    flaws: dict[int, str]
    """By their place in the order of writing: why."""


def shard_name(number: int) -> str:
    """File name of a shard.

    >>> shard_name(12)
    'shard-000012.tar'
    """
    return f"shard-{number:06d}.tar"


@lru_cache(16)
def _blank_header() -> bytes:
    blank = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
    return blank[:148] + b" " * 8 + blank[156:]


def member_header(name: str, size: int) -> bytes:
    """A tar header, byte for byte `tarfile`'s for a member of which only these are known.

    `tarfile` itself takes longer over it than over everything else that is done to a small
    image that is kept.

    Args:
        name: ASCII, at most 100 characters.
        size: Bytes, less than 8 GiB.

    >>> made = tarfile.TarInfo("000000000007.cls")
    >>> made.size = 12
    >>> member_header("000000000007.cls", 12) == made.tobuf(tarfile.USTAR_FORMAT)
    True
    """
    header = bytearray(_blank_header())
    header[_NAME] = name.encode("ascii").ljust(100, b"\0")
    header[_SIZE] = b"%011o\0" % size
    header[_CHECKSUM] = b"%06o\0 " % sum(header)
    return bytes(header)


def sample_record(sample: int, image: Encoded, label: int) -> bytes:
    """The part of a tar that one sample occupies: the image, then its label as decimal text.

    Nothing in it depends on when, where or by whom it is written.  What stands before the dot
    of a member's name is the global id of the sample; by it WebDataset groups the two files.

    >>> len(sample_record(0, Encoded(b"...", "png", 1, 1), label=7)) // tarfile.BLOCKSIZE
    4
    """
    parts: list[bytes] = []
    for suffix, data in ((image.suffix, image.data), ("cls", str(label).encode())):
        padding = bytes(-len(data) % tarfile.BLOCKSIZE)
        parts += [member_header(f"{sample:012d}.{suffix}", len(data)), data, padding]
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
        DataError: An image is another one than was surveyed, or the disk refuses.
    """
    rows = np.empty(len(task.labels), INDEX_DTYPE)
    path, sha256, size = task.folder / shard_name(task.number), hashlib.sha256(), 0
    with whole_file(path) as file:
        samples = zip(task.images, task.survey, task.labels.tolist(), strict=True)
        for row, (raw, surveyed, label) in enumerate(samples):
            if raw.asked_again:
                raise _unread(raw, samples, task.first + row)
            image = _encoded(raw, surveyed, task)
            record = sample_record(task.first + row, image, label)
            file.write(record)
            sha256.update(record)
            crc32, offset = zlib.crc32(image.data), size + tarfile.BLOCKSIZE
            rows[row] = (offset, len(image.data), image.height, image.width, label, crc32)
            size += len(record)
            if (row + 1) % _REPORT_EVERY == 0:
                yield _REPORT_EVERY
        # Two empty blocks end an archive; tar programs expect whole records besides.
        end = bytes(2 * tarfile.BLOCKSIZE)
        end += bytes(-(size + len(end)) % tarfile.RECORDSIZE)
        file.write(end)
        sha256.update(end)
    yield len(rows) % _REPORT_EVERY
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    entry = ShardEntry(
        name=path.name,
        bytes=size + len(end),
        samples=len(rows),
        sha256=sha256.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
    )
    write_whole(task.folder / entry.index_name, index.getvalue())
    # If a power cut takes the note, its shard is written again.
    note = json.dumps(asdict(entry)).encode()
    write_whole(note_path(task.folder, task.number), note, flush=False)
    return entry


def _unread(raw: Raw, following: Iterable[tuple[Raw, np.void, int]], sample: int) -> UnreadError:
    """The error of a sample that cannot be read, and of those behind it that cannot either."""
    error = UnreadError(f"{raw.name}: {raw.flaw}, and could be when it was looked at: start again")
    more = {at: each for at, (each, _, _) in enumerate(following, sample + 1) if each.asked_again}
    error.flaws = {at: each.flaw for at, each in {sample: raw, **more}.items()}
    return error


def _encoded(raw: Raw, surveyed: np.void, task: ShardTask) -> Encoded:
    if digest(raw) != surveyed["sha256"].tobytes():
        raise DataError(
            f"{raw.name or task.folder}: changed while it was being sharded: delete {task.folder} "
            "and start again"
        )
    if isinstance(raw.data, np.ndarray):
        return encode_png(raw.data)
    try:
        return make(raw.data, finding(surveyed), task.rules)
    except MemoryError:
        raise
    # Pillow raises nearly anything, and the disk is not to blame for it.
    except Exception as error:
        raise DataError(
            f"{raw.name or task.folder}: cannot be written anew ({error}): repair or remove it"
        ) from error
