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
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.store.manifest import INDEX_DTYPE, ShardEntry
from vssl_dist.errors import DataError

from ..files import whole_file, write_whole
from ..images.encode import Encoded
from ..images.examine import (
    DEFAULT_RULES,
    Rules,
    encode_png,
    encode_to_store,
)
from ..images.raw_image import RawImage
from .survey import finding_from_row, input_digest

NOTES = ".sharding"
"""Folder, inside the dataset's, of what an unfinished run needs to continue."""

_REPORT_EVERY = 64


@dataclass(frozen=True)
class ShardTask:
    """All that a worker needs to write one shard."""

    folder: Path
    number: int
    first_id: int
    """Global id of the shard's first sample; the tar's keys are the global ids."""
    labels: NDArray[np.int64]
    images: Iterable[RawImage]
    survey_rows: NDArray[np.void]
    """``(samples,)`` of ``SURVEY_DTYPE``: what the survey found out about these images."""
    rules: Rules = DEFAULT_RULES


class UnreadableError(DataError):
    """Samples that were surveyed cannot be read any more, and may be left out."""

    flaws: dict[int, str]
    """Why each cannot be read, by its position in the order of writing."""


def shard_name(number: int) -> str:
    """Make the file name of a shard.

    >>> shard_name(12)
    'shard-000012.tar'
    """
    return f"shard-{number:06d}.tar"


class _HashingFile:
    """An append-only file that hashes and counts what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        """Append to the file; returns how many bytes."""
        # After an error tarfile ends the archive when it is collected: nobody wants it any more.
        if self._file.closed:
            return len(data)
        self._file.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)


def sample_key(sample: int) -> str:
    """Make the part of a member's name by which WebDataset groups a sample's files.

    >>> sample_key(7)
    '000000000007'
    """
    return f"{sample:012d}"


def shard_note_path(folder: Path, number: int) -> Path:
    """Return the path at which a finished shard's manifest entry waits for the others."""
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
    from webdataset import TarWriter  # which imports torch

    rows = np.empty(len(task.labels), INDEX_DTYPE)
    path = task.folder / shard_name(task.number)
    with whole_file(path) as file:
        sink = _HashingFile(file)
        # Nothing in a shard depends on when, where or by whom it is written.
        writer = TarWriter(sink, user="", group="", mode=0o644, mtime=0, encoder=False)
        samples = zip(task.images, task.survey_rows, task.labels.tolist(), strict=True)
        for row, (raw, survey_row, label) in enumerate(samples):
            if raw.may_recover:
                raise _unreadable_error(raw, samples, task.first_id + row)
            image = _encode_checked(raw, survey_row, task)
            offset = writer.tarstream.offset + tarfile.BLOCKSIZE
            crc32 = zlib.crc32(image.data)
            rows[row] = (offset, len(image.data), image.height, image.width, label, crc32)
            # Two writes, as one would sort the label before the image.
            key = sample_key(task.first_id + row)
            writer.write({"__key__": key, image.suffix: image.data})
            writer.write({"__key__": key, "cls": str(label).encode()})
            if (row + 1) % _REPORT_EVERY == 0:
                yield _REPORT_EVERY
        writer.close()
    yield len(rows) % _REPORT_EVERY
    index = io.BytesIO()
    np.save(index, rows, allow_pickle=False)
    entry = ShardEntry(
        name=path.name,
        bytes=sink.size,
        samples=len(rows),
        sha256=sink.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
    )
    write_whole(task.folder / entry.index_name, index.getvalue())
    # If a power cut takes the note, its shard is written again.
    note = json.dumps(asdict(entry)).encode()
    write_whole(shard_note_path(task.folder, task.number), note, flush=False)
    return entry


def _unreadable_error(
    raw: RawImage, following: Iterable[tuple[RawImage, np.void, int]], first_unreadable: int
) -> UnreadableError:
    """Make the error of a sample that cannot be read, and of those behind it that cannot either."""
    error = UnreadableError(
        f"{raw.name}: {raw.flaw}, and could be when it was looked at: start again"
    )
    later_raws = {
        sample_id: later_raw
        for sample_id, (later_raw, _, _) in enumerate(following, first_unreadable + 1)
        if later_raw.may_recover
    }
    error.flaws = {
        sample_id: later_raw.flaw
        for sample_id, later_raw in {first_unreadable: raw, **later_raws}.items()
    }
    return error


def _encode_checked(raw: RawImage, survey_row: np.void, task: ShardTask) -> Encoded:
    if input_digest(raw) != survey_row["sha256"].tobytes():
        raise DataError(
            f"{raw.name or task.folder}: changed while it was being sharded: delete {task.folder} "
            "and start again"
        )
    if isinstance(raw.data, np.ndarray):
        return encode_png(raw.data)
    try:
        return encode_to_store(raw.data, finding_from_row(survey_row), task.rules)
    except MemoryError:
        raise
    # Pillow raises nearly anything, and the disk is not to blame for it.
    except Exception as error:
        raise DataError(
            f"{raw.name or task.folder}: cannot be written anew ({error}): repair or remove it"
        ) from error
