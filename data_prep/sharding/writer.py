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
from ..images.encode import EncodedImage
from ..images.examine import (
    DEFAULT_RULES,
    ImageRules,
    encode_png,
    encode_to_store,
)
from ..images.raw_image import RawImage
from .survey import finding_from_row, input_digest

NOTES_FOLDER_NAME = ".sharding"
"""Folder, inside the dataset's, of what an unfinished run needs to continue."""

_SAMPLES_PER_REPORT = 64


@dataclass(frozen=True)
class ShardWriteTask:
    """All that a worker needs to write one shard."""

    folder: Path
    number: int
    first_id: int
    """Global id of the shard's first sample; the tar's keys are the global ids."""
    labels: NDArray[np.int64]
    images: Iterable[RawImage]
    survey_rows: NDArray[np.void]
    """``(samples,)`` of ``SURVEY_ROW_DTYPE``: what the survey found out about these images."""
    rules: ImageRules = DEFAULT_RULES


class UnreadableSampleError(DataError):
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


def make_sample_key(sample: int) -> str:
    """Make the part of a member's name by which WebDataset groups a sample's files.

    >>> make_sample_key(7)
    '000000000007'
    """
    return f"{sample:012d}"


def shard_note_path(folder: Path, number: int) -> Path:
    """Return the path at which a finished shard's manifest entry waits for the others."""
    return folder / NOTES_FOLDER_NAME / f"{shard_name(number)}.json"


def write_shard(task: ShardWriteTask) -> Generator[int, None, ShardEntry]:
    """Write tar and index, each whole or not at all, and then the note.

    Yields:
        How many samples it has written since the last time.

    Returns:
        The shard's entry of the manifest.

    Raises:
        DataError: An image is another one than was surveyed, or the disk refuses.
    """
    from webdataset import TarWriter  # which imports torch

    index_rows = np.empty(len(task.labels), INDEX_DTYPE)
    path = task.folder / shard_name(task.number)
    with whole_file(path) as file:
        hashing_file = _HashingFile(file)
        # Nothing in a shard depends on when, where or by whom it is written.
        tar_writer = TarWriter(hashing_file, user="", group="", mode=0o644, mtime=0, encoder=False)
        samples = zip(task.images, task.survey_rows, task.labels.tolist(), strict=True)
        for row, (raw_image, survey_row, label) in enumerate(samples):
            if raw_image.may_be_read_later:
                raise _make_unreadable_error(raw_image, samples, task.first_id + row)
            image = _encode_if_unchanged(raw_image, survey_row, task)
            offset = tar_writer.tarstream.offset + tarfile.BLOCKSIZE
            crc32 = zlib.crc32(image.data)
            index_rows[row] = (offset, len(image.data), image.height, image.width, label, crc32)
            # Two writes, as one would sort the label before the image.
            key = make_sample_key(task.first_id + row)
            tar_writer.write({"__key__": key, image.suffix: image.data})
            tar_writer.write({"__key__": key, "cls": str(label).encode()})
            if (row + 1) % _SAMPLES_PER_REPORT == 0:
                yield _SAMPLES_PER_REPORT
        tar_writer.close()
    yield len(index_rows) % _SAMPLES_PER_REPORT
    index = io.BytesIO()
    np.save(index, index_rows, allow_pickle=False)
    entry = ShardEntry(
        name=path.name,
        bytes=hashing_file.size,
        samples=len(index_rows),
        sha256=hashing_file.sha256.hexdigest(),
        index_sha256=hashlib.sha256(index.getvalue()).hexdigest(),
    )
    write_whole(task.folder / entry.index_name, index.getvalue())
    # If a power cut takes the note, its shard is written again.
    note = json.dumps(asdict(entry)).encode()
    write_whole(shard_note_path(task.folder, task.number), note, flush=False)
    return entry


def _make_unreadable_error(
    raw_image: RawImage,
    following_samples: Iterable[tuple[RawImage, np.void, int]],
    first_unreadable_id: int,
) -> UnreadableSampleError:
    """Make the error of a sample that cannot be read, and of those behind it that cannot either."""
    error = UnreadableSampleError(
        f"{raw_image.name}: {raw_image.flaw}, and could be when it was looked at: start again"
    )
    later_raw_image_by_id = {
        sample_id: later_raw_image
        for sample_id, (later_raw_image, _, _) in enumerate(
            following_samples, first_unreadable_id + 1
        )
        if later_raw_image.may_be_read_later
    }
    error.flaws = {
        sample_id: later_raw_image.flaw
        for sample_id, later_raw_image in {
            first_unreadable_id: raw_image,
            **later_raw_image_by_id,
        }.items()
    }
    return error


def _encode_if_unchanged(
    raw_image: RawImage, survey_row: np.void, task: ShardWriteTask
) -> EncodedImage:
    if input_digest(raw_image) != survey_row["sha256"].tobytes():
        raise DataError(
            f"{raw_image.name or task.folder}: changed while it was being sharded: delete "
            f"{task.folder} and start again"
        )
    if isinstance(raw_image.data, np.ndarray):
        return encode_png(raw_image.data)
    try:
        return encode_to_store(raw_image.data, finding_from_row(survey_row), task.rules)
    except MemoryError:
        raise
    # Pillow raises nearly anything, and the disk is not to blame for it.
    except Exception as error:
        raise DataError(
            f"{raw_image.name or task.folder}: cannot be written anew ({error}): "
            "repair or remove it"
        ) from error
