"""Survey of all images of a split: what each is, and whether it can be used.

Only after it is known which images are bad, or are there twice, is it known which sample goes
into which shard.  Findings are kept in notes, so that an interrupted run does not examine an
image twice, unless it may have been replaced since.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.installed import has_dali

from ..files import write_whole
from ..images.examine import (
    ImageFinding,
    ImageRules,
    ImageVerdict,
    examine_image,
)
from ..images.raw_image import RawImage
from ..images.signatures import name_undecodable_format
from ..sources.base import Split
from . import pool

SURVEY_ROW_DTYPE = np.dtype(
    [
        ("sha256", "u1", 32),
        ("verdict", "u1"),
        ("png", "u1"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("pillow_only", "u1"),
    ]
)
WORKER_MODULES = (f"{__package__}.writer", "webdataset")
"""Modules that workers need for surveys, and for writing shards afterwards."""
_EXAMINATION_VERSION = 2
"""Version of what `examine_image` decides: notes of another version are not believed."""
_SAMPLES_PER_CHUNK = 256
_SAMPLES_PER_REPORT = 64


@dataclass(frozen=True)
class SplitSurvey:
    """What was found out about some samples of a split."""

    numbers: NDArray[np.int64]
    """``(M,)`` ascending: the samples' numbers."""
    rows: NDArray[np.void]
    """``(M,)`` of ``SURVEY_ROW_DTYPE``."""
    reasons: dict[int, str]
    """Why an image is not kept as it is, by sample number."""


@dataclass(frozen=True)
class _SurveyChunk:
    """Samples that one worker examines, and the note that it leaves of them."""

    note_path: Path
    key: str
    numbers: NDArray[np.int64]
    images: Iterable[RawImage]
    rules: ImageRules


def survey_split(
    split: Split,
    numbers: NDArray[np.int64],
    notes_folder: Path,
    rules: ImageRules,
    *,
    workers: int,
    advance: Callable[[int], None],
) -> SplitSurvey:
    """Examine samples of a split, except those that a note of an earlier run tells about.

    Args:
        split: The split.
        numbers: ``(M,)`` ascending sample numbers.
        notes_folder: Folder to leave notes in.
        rules: What an image may be.
        workers: Processes.
        advance: Called with numbers of samples as they are done.

    Raises:
        DataError: A file cannot be read, or a note not be written.
    """
    survey_chunks: list[_SurveyChunk] = []
    for start in range(0, len(numbers), _SAMPLES_PER_CHUNK):
        chunk_numbers = numbers[start : start + _SAMPLES_PER_CHUNK]
        note_path = notes_folder / f"survey-{start // _SAMPLES_PER_CHUNK:06d}"
        survey_chunks.append(
            _SurveyChunk(
                note_path,
                _note_key(split, chunk_numbers, rules),
                chunk_numbers,
                split.make_images(chunk_numbers),
                rules,
            )
        )
    surveys = {chunk.note_path: survey for chunk in survey_chunks if (survey := _read_note(chunk))}
    advance(sum(len(survey.numbers) for survey in surveys.values()))
    missing_chunks = [chunk for chunk in survey_chunks if chunk.note_path not in surveys]
    surveys |= dict(
        pool.run_tasks(
            _survey_chunk,
            missing_chunks,
            workers=workers,
            advance=advance,
            preloaded_modules=WORKER_MODULES,
        )
    )
    reasons: dict[int, str] = {}
    for chunk in survey_chunks:
        reasons |= surveys[chunk.note_path].reasons
    rows = [
        np.zeros(0, SURVEY_ROW_DTYPE),
        *(surveys[chunk.note_path].rows for chunk in survey_chunks),
    ]
    return SplitSurvey(numbers, np.concatenate(rows), reasons)


def input_digest(raw_image: RawImage) -> bytes:
    """Compute the SHA-256 of a file's bytes, or of the shape and values of pixels."""
    if isinstance(raw_image.data, np.ndarray):
        return hashlib.sha256(b"%r" % (raw_image.data.shape,) + raw_image.data.tobytes()).digest()
    return hashlib.sha256(raw_image.data).digest()


def mark_unreadable(survey: SplitSurvey, flaws: dict[int, str]) -> SplitSurvey:
    """Copy a survey with some samples, by number, marked as unreadable."""
    rows = survey.rows.copy()
    rows_to_mark = np.searchsorted(survey.numbers, sorted(flaws))
    rows["sha256"][rows_to_mark] = np.frombuffer(input_digest(RawImage(b"")), np.uint8)
    rows["verdict"][rows_to_mark] = ImageVerdict.REJECT
    return SplitSurvey(survey.numbers, rows, survey.reasons | flaws)


def finding_from_row(row: np.void) -> ImageFinding:
    """Rebuild what `examine_image` found out about an image from its row, but for the reason."""
    suffix = "png" if row["png"] else "jpg"
    return ImageFinding(
        ImageVerdict(row["verdict"]), "", suffix, int(row["height"]), int(row["width"])
    )


def _survey_chunk(chunk: _SurveyChunk) -> Generator[int, None, tuple[Path, SplitSurvey]]:
    rows = np.zeros(len(chunk.numbers), SURVEY_ROW_DTYPE)
    reasons: dict[int, str] = {}
    may_be_read_later = False
    for row, (raw_image, number) in enumerate(
        zip(chunk.images, chunk.numbers.tolist(), strict=True)
    ):
        finding = _examine_raw(raw_image, chunk.rules)
        may_be_read_later |= raw_image.may_be_read_later
        sha256 = np.frombuffer(input_digest(raw_image), np.uint8)
        is_png = finding.suffix == "png"
        rows[row] = (
            sha256,
            finding.verdict,
            is_png,
            finding.height,
            finding.width,
            finding.pillow_only,
        )
        if finding.reason:
            reasons[number] = finding.reason
        if (row + 1) % _SAMPLES_PER_REPORT == 0:
            yield _SAMPLES_PER_REPORT
    yield len(rows) % _SAMPLES_PER_REPORT
    # Storage that failed may do better the next time.
    if not may_be_read_later:
        # Unflushed: images of a note that a power cut takes are examined again.
        note_header = json.dumps({"key": chunk.key, "reasons": reasons}).encode()
        write_whole(chunk.note_path, note_header + b"\n" + rows.tobytes(), flush=False)
    return chunk.note_path, SplitSurvey(chunk.numbers, rows, reasons)


def _examine_raw(raw_image: RawImage, rules: ImageRules) -> ImageFinding:
    if raw_image.flaw:
        return ImageFinding(ImageVerdict.REJECT, raw_image.flaw)
    if isinstance(raw_image.data, np.ndarray):
        return ImageFinding(ImageVerdict.ENCODE_ANEW)
    if format_name := name_undecodable_format(raw_image.data):
        return ImageFinding(
            ImageVerdict.REJECT, f"not a readable image ({format_name}, which is not decoded here)"
        )
    return examine_image(raw_image.data, rules)


def _note_key(split: Split, numbers: NDArray[np.int64], rules: ImageRules) -> str:
    """Make the key that a note must carry to be believed."""
    judging_versions = [_EXAMINATION_VERSION, has_dali()]
    key_facts = [asdict(rules), split.make_stamp(numbers), dict(split.facts), judging_versions]
    key_text = json.dumps(key_facts, sort_keys=True)
    return hashlib.sha256(key_text.encode() + numbers.tobytes()).hexdigest()


def _read_note(chunk: _SurveyChunk) -> SplitSurvey | None:
    try:
        header_line, _, row_bytes = chunk.note_path.read_bytes().partition(b"\n")
        note_header = json.loads(header_line)
        if note_header["key"] != chunk.key:
            return None
        rows = np.frombuffer(row_bytes, SURVEY_ROW_DTYPE)
        reasons = {int(number): str(reason) for number, reason in note_header["reasons"].items()}
    # No note, or one of another program.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return SplitSurvey(chunk.numbers, rows, reasons) if len(rows) == len(chunk.numbers) else None
