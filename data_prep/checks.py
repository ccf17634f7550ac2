"""Checks of a finished dataset against every byte of it."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.store.manifest import (
    INDEX_DTYPE,
    MANIFEST,
    MAX_INDEX_HEADER_BYTES,
    Manifest,
    ShardEntry,
    read_manifest,
)
from vssl_dist.durable import open_regular_file, read_regular_file
from vssl_dist.errors import DataError

from .images.agreement import SHOWN_DIFFERENTLY_REASON
from .images.examine import (
    DEFAULT_RULES,
    ImageRules,
    ImageVerdict,
    examine_image,
)
from .sharding import pool
from .sharding.split_folder import (
    INPUT_DIGESTS_NAME,
    KEYS_AFTER_SURVEY,
    REJECTS_NAME,
)
from .sharding.writer import NOTES_FOLDER_NAME, make_sample_key
from .sources.base import LABELS_KEY, UNLABELED

_SAMPLES_PER_REPORT = 64
_MAX_SHOWN_SAMPLES = 5
"""Damaged samples listed per shard."""


@dataclass(frozen=True)
class ShardCheckTask:
    """One shard to check."""

    folder: Path
    entry: ShardEntry
    first_id: int
    """Global id of the shard's first sample."""
    classes: int
    rules: ImageRules
    labels: list[int] | None = None
    """Labels in the tars, by class, where the tars are another split's (`subset`)."""


def find_sharded_splits(out: Path) -> list[Path]:
    """Find the folders of splits at or directly below ``out``, finished or not.

    Raises:
        DataError: There is no split.
    """
    if not out.is_dir():
        raise DataError(f"{out}: no such folder")
    if _looks_sharded(out):
        return [out]
    split_folders = sorted(path for path in out.iterdir() if path.is_dir() and _looks_sharded(path))
    if not split_folders:
        raise DataError(f"{out}: no dataset in it (give the --out of data_prep/shard.py)")
    return split_folders


def _looks_sharded(folder: Path) -> bool:
    return (
        (folder / MANIFEST).exists()
        or (folder / NOTES_FOLDER_NAME).exists()
        or any(folder.glob("shard-*"))
    )


def num_stated_samples(folder: Path) -> int:
    """Return how many samples the manifest states; 0 if it is illegible."""
    try:
        return read_manifest(folder, sealed=False).samples
    except DataError:
        return 0


def check_split(
    folder: Path, *, workers: int, advance: Callable[[int], None]
) -> tuple[Manifest | None, list[str]]:
    """Check one split.

    Args:
        folder: The folder of the split.
        workers: Processes to read and decode with.
        advance: Called with numbers of samples as they are done.

    Returns:
        The manifest, if it is legible, and a line for each thing that is wrong.
    """
    try:
        manifest = read_manifest(folder, sealed=False)
    except DataError as error:
        return None, [str(error)]
    problems: list[str] = []
    try:
        read_manifest(folder)
    except DataError as error:
        problems.append(str(error))
    expected_names = {MANIFEST, *(n for e in manifest.shards for n in (e.name, e.index_name))}
    for key, name in zip(KEYS_AFTER_SURVEY, (INPUT_DIGESTS_NAME, REJECTS_NAME), strict=True):
        if sha256 := manifest.source.get(key):
            expected_names.add(name)
            problems += _compare_file(folder / name, str(sha256))
    unknown_names = sorted({path.name for path in folder.iterdir()} - expected_names)
    problems += [f"{folder / name}: the manifest does not know it" for name in unknown_names]
    try:
        rules, labels = _read_limits(manifest)
    except ValueError as error:
        return manifest, [*problems, f"{folder / MANIFEST}: {error}: shard the data anew"]
    first_ids = np.cumsum([0, *(entry.samples for entry in manifest.shards)]).tolist()
    check_tasks = [
        ShardCheckTask(folder, entry, first_id, len(manifest.classes), rules, labels)
        for entry, first_id in zip(manifest.shards, first_ids, strict=False)
    ]
    shard_problems = dict(
        pool.run_tasks(
            check_shard, check_tasks, workers=workers, advance=advance, preloaded_modules=[__name__]
        )
    )
    return manifest, problems + [
        line for entry in manifest.shards for line in shard_problems[entry.name]
    ]


def _read_limits(manifest: Manifest) -> tuple[ImageRules, list[int] | None]:
    """Read from a manifest's source the limits of its images and the labels in shared tars.

    Raises:
        ValueError: The source states what no version ever wrote.
    """
    max_pixels = manifest.source.get("max_pixels", DEFAULT_RULES.max_pixels)
    labels = manifest.source.get(LABELS_KEY)
    if type(max_pixels) is not int or max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels!r:.40}")
    if labels is not None and (
        not isinstance(labels, list)
        or len(labels) != len(manifest.classes)
        or any(type(label) is not int for label in labels)
    ):
        raise ValueError(f"{LABELS_KEY} are {labels!r:.40} for {len(manifest.classes)} classes")
    return ImageRules(max_pixels), labels


def check_shard(task: ShardCheckTask) -> Generator[int, None, tuple[str, list[str]]]:
    """Check the two files of a shard against the manifest, each other, and a decoder.

    Yields:
        How many samples it has dealt with since the last time.

    Returns:
        The shard's name and a line for each thing that is wrong.
    """
    entry = task.entry
    path = task.folder / entry.name
    problems = _compare_file(path, entry.sha256, entry.bytes)
    index_bytes = entry.samples * INDEX_DTYPE.itemsize
    index = path.with_name(entry.index_name)
    problems += _compare_file(index, entry.index_sha256, index_bytes, MAX_INDEX_HEADER_BYTES)
    sample_problems: list[str] = []
    try:
        rows = _read_index(index, entry.samples)
        with open_regular_file(path) as file:
            for row, index_row in enumerate(rows):
                problem = _check_sample(file, task.first_id + row, index_row, task)
                sample_problems += (
                    [f"{path}: sample {task.first_id + row}: {problem}"] if problem else []
                )
                if (row + 1) % _SAMPLES_PER_REPORT == 0:
                    yield _SAMPLES_PER_REPORT
        yield len(rows) % _SAMPLES_PER_REPORT
    except (OSError, DataError) as error:
        problems += [str(error)] if isinstance(error, DataError) else []
        yield entry.samples
    if len(sample_problems) > _MAX_SHOWN_SAMPLES:
        sample_problems[_MAX_SHOWN_SAMPLES:] = [
            f"{path}: and {len(sample_problems) - _MAX_SHOWN_SAMPLES} more samples"
        ]
    return entry.name, problems + sample_problems


def _compare_file(path: Path, sha256: str, size: int | None = None, slack: int = 0) -> list[str]:
    try:
        with open_regular_file(path) as file:
            actual_size = os.fstat(file.fileno()).st_size
            if size is not None and not size <= actual_size <= size + slack:
                return [f"{path}: has {actual_size} bytes instead of {size}"]
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror or error})"]
    return [] if digest == sha256 else [f"{path}: sha256 is not the manifest's"]


def _read_index(path: Path, samples: int) -> NDArray[np.void]:
    try:
        blob = read_regular_file(path, samples * INDEX_DTYPE.itemsize + MAX_INDEX_HEADER_BYTES)
        rows: NDArray[np.void] = np.load(io.BytesIO(blob), allow_pickle=False)
    except OSError:
        raise
    # The header is a Python literal: a damaged one fails in any way that a parser can.
    except Exception as error:
        raise DataError(f"{path}: not an index ({' '.join(str(error).split())})") from error
    if rows.dtype != INDEX_DTYPE or rows.shape != (samples,):
        raise DataError(f"{path}: has shape {rows.shape}, the manifest says {samples} samples")
    return rows


def _check_sample(file: BinaryIO, sample_id: int, index_row: np.void, task: ShardCheckTask) -> str:
    """Say what is wrong with a sample; "" if nothing is."""
    offset, size, height, width, label, crc32 = index_row.item()
    if not UNLABELED <= label < task.classes:
        return f"label {label} is not a class"
    if not tarfile.BLOCKSIZE <= offset <= offset + size <= task.entry.bytes:
        return "lies outside the tar"
    file.seek(offset)
    data = file.read(size)
    if len(data) < size:
        return "cut short"
    if zlib.crc32(data) != crc32:
        return "crc32 differs"
    finding = examine_image(data, task.rules)
    if finding.verdict is ImageVerdict.REJECT:
        return f"{finding.reason}: shard the data anew"
    # Other versions of the two decoders may have shown it alike, and both read it.
    is_plain_image = (
        finding.verdict is ImageVerdict.KEEP or finding.reason == SHOWN_DIFFERENTLY_REASON
    )
    if not is_plain_image or (finding.height, finding.width) != (height, width):
        reason_text = f" ({finding.reason})" if finding.reason else ""
        return f"not a plain image of {width}x{height} pixels{reason_text}"
    # The bytes around the image are known too: its header, and its label as a file.
    file.seek(offset - tarfile.BLOCKSIZE)
    if task.labels is not None:
        sample_id, label = _read_sample_id(file), task.labels[label]
        file.seek(offset - tarfile.BLOCKSIZE)
    expected_member_bytes = b"".join(
        _make_member_bytes(f"{make_sample_key(sample_id)}.{suffix}", content)
        for suffix, content in ((finding.suffix, data), ("cls", str(label).encode()))
    )
    return (
        ""
        if file.read(len(expected_member_bytes)) == expected_member_bytes
        else "tar and index disagree"
    )


def _make_member_bytes(name: str, content: bytes) -> bytes:
    """Make the bytes that a file takes in a shard: header, content and padding."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + padding


def _read_sample_id(file: BinaryIO) -> int:
    """Read the id that a sample's tar header states; -1 if it states none."""
    id_digits = file.read(12)
    return int(id_digits) if id_digits.isdigit() else -1
