"""The first look at all images of a split: what each is, and whether it can be used.

Only after it is known which images are bad, or are there twice, is it known which sample goes
into which shard.  What was found is kept in notes, so that an interrupted run does not look
twice, unless an image may have been replaced since.
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
"""What workers look with, and write shards with afterwards."""
_RULES = 2
"""Counts the changes of what `examine` decides."""
_CHUNK = 256
_REPORT_EVERY = 64


@dataclass(frozen=True)
class Survey:
    """What was found out about some samples of a split."""

    numbers: NDArray[np.int64]
    """``(M,)`` ascending: which samples."""
    rows: NDArray[np.void]
    """``(M,)`` of ``SURVEY_DTYPE``."""
    reasons: dict[int, str]
    """By sample number: why an image is not kept as it is."""


@dataclass(frozen=True)
class _Chunk:
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
    """Look at samples of a split, or only at those that no note tells about.

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
    for start in range(0, len(numbers), _CHUNK):
        which = numbers[start : start + _CHUNK]
        note = notes / f"survey-{start // _CHUNK:06d}"
        chunks.append(_Chunk(note, _key(split, which, rules), which, split.images(which), rules))
    found = {chunk.note: known for chunk in chunks if (known := _recall(chunk))}
    advance(sum(len(known.numbers) for known in found.values()))
    missing = [chunk for chunk in chunks if chunk.note not in found]
    found |= dict(pool.run_tasks(_look, missing, workers=workers, advance=advance, imports=IMPORTS))
    reasons: dict[int, str] = {}
    for chunk in chunks:
        reasons |= found[chunk.note].reasons
    rows = [np.zeros(0, SURVEY_DTYPE), *(found[chunk.note].rows for chunk in chunks)]
    return Survey(numbers, np.concatenate(rows), reasons)


def input_digest(raw: RawImage) -> bytes:
    """SHA-256 of a file's bytes, or of the shape and values of pixels."""
    if isinstance(raw.data, np.ndarray):
        return hashlib.sha256(b"%r" % (raw.data.shape,) + raw.data.tobytes()).digest()
    return hashlib.sha256(raw.data).digest()


def mark_unreadable(survey: Survey, flaws: dict[int, str]) -> Survey:
    """The same but for samples that turned out not to be readable, by number."""
    rows = survey.rows.copy()
    at = np.searchsorted(survey.numbers, sorted(flaws))
    rows["sha256"][at] = np.frombuffer(input_digest(RawImage(b"")), np.uint8)
    rows["verdict"][at] = Verdict.REJECT
    return Survey(survey.numbers, rows, survey.reasons | flaws)


def finding_from_row(row: np.void) -> Finding:
    """What `examine` said of an image, from its row (but for the reason)."""
    suffix = "png" if row["png"] else "jpg"
    return Finding(Verdict(row["verdict"]), "", suffix, int(row["height"]), int(row["width"]))


def _look(chunk: _Chunk) -> Generator[int, None, tuple[Path, Survey]]:
    rows = np.zeros(len(chunk.numbers), SURVEY_DTYPE)
    reasons: dict[int, str] = {}
    asked_again = False
    for row, (raw, number) in enumerate(zip(chunk.images, chunk.numbers.tolist(), strict=True)):
        seen = _judge(raw, chunk.rules)
        asked_again |= raw.asked_again
        sha256 = np.frombuffer(input_digest(raw), np.uint8)
        kind = seen.suffix == "png"
        rows[row] = (sha256, seen.verdict, kind, seen.height, seen.width, seen.pillow_only)
        if seen.reason:
            reasons[number] = seen.reason
        if (row + 1) % _REPORT_EVERY == 0:
            yield _REPORT_EVERY
    yield len(rows) % _REPORT_EVERY
    # Storage that failed may do better the next time.
    if not asked_again:
        head = json.dumps({"key": chunk.key, "reasons": reasons}).encode()
        write_whole(chunk.note, head + b"\n" + rows.tobytes(), flush=False)
    return chunk.note, Survey(chunk.numbers, rows, reasons)


def _judge(raw: RawImage, rules: Rules) -> Finding:
    if raw.flaw:
        return Finding(Verdict.REJECT, raw.flaw)
    if isinstance(raw.data, np.ndarray):
        return Finding(Verdict.REMAKE)
    if kind := undecodable_format(raw.data):
        return Finding(Verdict.REJECT, f"not a readable image ({kind}, which is not decoded here)")
    return examine(raw.data, rules)


def _key(split: Split, which: NDArray[np.int64], rules: Rules) -> str:
    """What a note must have been written for to be believed."""
    judge = [_RULES, has_dali()]
    facts = [asdict(rules), split.stamp(which), dict(split.facts), judge]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode() + which.tobytes()).hexdigest()


def _recall(chunk: _Chunk) -> Survey | None:
    try:
        head, _, body = chunk.note.read_bytes().partition(b"\n")
        told = json.loads(head)
        if told["key"] != chunk.key:
            return None
        rows = np.frombuffer(body, SURVEY_DTYPE)
        reasons = {int(number): str(reason) for number, reason in told["reasons"].items()}
    # No note, or one of another program.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Survey(chunk.numbers, rows, reasons) if len(rows) == len(chunk.numbers) else None
