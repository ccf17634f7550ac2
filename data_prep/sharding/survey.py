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
    Finding,
    Rules,
    Verdict,
    examine,
)
from ..images.raw_image import RawImage
from ..images.signatures import undecodable_format
from ..sources.base import Split
from . import pool

SURVEY_DTYPE = np.dtype(
    [
        ("sha256", "u1", 32),
        ("verdict", "u1"),
        ("png", "u1"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("pillow_only", "u1"),
    ]
)
IMPORTS = (f"{__package__}.writer", "webdataset")
"""Modules that workers need for surveys, and for writing shards afterwards."""
_EXAMINE_VERSION = 2
"""Version of what `examine` decides: notes of another version are not believed."""
_CHUNK_SAMPLES = 256
_REPORT_EVERY = 64


@dataclass(frozen=True)
class Survey:
    """What was found out about some samples of a split."""

    numbers: NDArray[np.int64]
    """``(M,)`` ascending: the samples' numbers."""
    rows: NDArray[np.void]
    """``(M,)`` of ``SURVEY_DTYPE``."""
    reasons: dict[int, str]
    """Why an image is not kept as it is, by sample number."""


@dataclass(frozen=True)
class _Chunk:
    """Samples that one worker examines, and the note that it leaves of them."""

    note: Path
    key: str
    numbers: NDArray[np.int64]
    images: Iterable[RawImage]
    rules: Rules


def survey_split(
    split: Split,
    numbers: NDArray[np.int64],
    notes: Path,
    rules: Rules,
    *,
    workers: int,
    advance: Callable[[int], None],
) -> Survey:
    """Examine samples of a split, except those that a note of an earlier run tells about.

    Args:
        split: The split.
        numbers: ``(M,)`` ascending sample numbers.
        notes: Folder to leave notes in.
        rules: What an image may be.
        workers: Processes.
        advance: Called with numbers of samples as they are done.

    Raises:
        DataError: A file cannot be read, or a note not be written.
    """
    chunks: list[_Chunk] = []
    for start in range(0, len(numbers), _CHUNK_SAMPLES):
        chunk_numbers = numbers[start : start + _CHUNK_SAMPLES]
        note = notes / f"survey-{start // _CHUNK_SAMPLES:06d}"
        chunks.append(
            _Chunk(
                note,
                _note_key(split, chunk_numbers, rules),
                chunk_numbers,
                split.images_of(chunk_numbers),
                rules,
            )
        )
    surveys = {chunk.note: survey for chunk in chunks if (survey := _read_note(chunk))}
    advance(sum(len(survey.numbers) for survey in surveys.values()))
    missing_chunks = [chunk for chunk in chunks if chunk.note not in surveys]
    surveys |= dict(
        pool.run_tasks(
            _survey_chunk, missing_chunks, workers=workers, advance=advance, imports=IMPORTS
        )
    )
    reasons: dict[int, str] = {}
    for chunk in chunks:
        reasons |= surveys[chunk.note].reasons
    rows = [np.zeros(0, SURVEY_DTYPE), *(surveys[chunk.note].rows for chunk in chunks)]
    return Survey(numbers, np.concatenate(rows), reasons)


def input_digest(raw: RawImage) -> bytes:
    """Compute the SHA-256 of a file's bytes, or of the shape and values of pixels."""
    if isinstance(raw.data, np.ndarray):
        return hashlib.sha256(b"%r" % (raw.data.shape,) + raw.data.tobytes()).digest()
    return hashlib.sha256(raw.data).digest()


def mark_unreadable(survey: Survey, flaws: dict[int, str]) -> Survey:
    """Copy a survey with some samples, by number, marked as unreadable."""
    rows = survey.rows.copy()
    positions = np.searchsorted(survey.numbers, sorted(flaws))
    rows["sha256"][positions] = np.frombuffer(input_digest(RawImage(b"")), np.uint8)
    rows["verdict"][positions] = Verdict.REJECT
    return Survey(survey.numbers, rows, survey.reasons | flaws)


def finding_from_row(row: np.void) -> Finding:
    """Rebuild what `examine` found out about an image from its row, but for the reason."""
    suffix = "png" if row["png"] else "jpg"
    return Finding(Verdict(row["verdict"]), "", suffix, int(row["height"]), int(row["width"]))


def _survey_chunk(chunk: _Chunk) -> Generator[int, None, tuple[Path, Survey]]:
    rows = np.zeros(len(chunk.numbers), SURVEY_DTYPE)
    reasons: dict[int, str] = {}
    may_recover = False
    for row, (raw, number) in enumerate(zip(chunk.images, chunk.numbers.tolist(), strict=True)):
        finding = _examine_raw(raw, chunk.rules)
        may_recover |= raw.may_recover
        sha256 = np.frombuffer(input_digest(raw), np.uint8)
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
        if (row + 1) % _REPORT_EVERY == 0:
            yield _REPORT_EVERY
    yield len(rows) % _REPORT_EVERY
    # Storage that failed may do better the next time.
    if not may_recover:
        # Unflushed: images of a note that a power cut takes are examined again.
        header = json.dumps({"key": chunk.key, "reasons": reasons}).encode()
        write_whole(chunk.note, header + b"\n" + rows.tobytes(), flush=False)
    return chunk.note, Survey(chunk.numbers, rows, reasons)


def _examine_raw(raw: RawImage, rules: Rules) -> Finding:
    if raw.flaw:
        return Finding(Verdict.REJECT, raw.flaw)
    if isinstance(raw.data, np.ndarray):
        return Finding(Verdict.REMAKE)
    if format_name := undecodable_format(raw.data):
        return Finding(
            Verdict.REJECT, f"not a readable image ({format_name}, which is not decoded here)"
        )
    return examine(raw.data, rules)


def _note_key(split: Split, numbers: NDArray[np.int64], rules: Rules) -> str:
    """Make the key that a note must carry to be believed."""
    judges = [_EXAMINE_VERSION, has_dali()]
    facts = [asdict(rules), split.stamp_of(numbers), dict(split.facts), judges]
    key_text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(key_text.encode() + numbers.tobytes()).hexdigest()


def _read_note(chunk: _Chunk) -> Survey | None:
    try:
        header_line, _, row_bytes = chunk.note.read_bytes().partition(b"\n")
        header = json.loads(header_line)
        if header["key"] != chunk.key:
            return None
        rows = np.frombuffer(row_bytes, SURVEY_DTYPE)
        reasons = {int(number): str(reason) for number, reason in header["reasons"].items()}
    # No note, or one of another program.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Survey(chunk.numbers, rows, reasons) if len(rows) == len(chunk.numbers) else None
