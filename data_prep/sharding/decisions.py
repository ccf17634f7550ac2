"""Which samples of a dataset are used, and the list of all that was decided.

A pure function of what the surveys of all splits found.  Training splits give way to ``val`` and
``test``, whose images others compare themselves on; of equal images of one split the first is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..images.examine import ImageVerdict
from ..sources.base import LeftOutEntry, Split
from .survey import SplitSurvey

HELD_OUT_SPLITS = ("val", "test")
"""Splits that must not share an image with any that is trained on."""
LEFT_OUT_DECISION = "left out"
"""The decision on what is no image."""

InputDigests = NDArray[np.uint8]
"""``(N, 32)``: the SHA-256 of each sample's input."""


@dataclass(frozen=True)
class SplitDecisions:
    """What was decided on the samples of one split."""

    used_sample_numbers: NDArray[np.int64]
    """Ascending numbers of the samples to write."""
    records: dict[int, list[dict[str, str]]]
    """Lines about each sample in ``rejects.jsonl``, by sample number."""
    errors: list[str] = field(default_factory=list)
    """One line for each kind of thing that must not be passed over."""
    left_out: Sequence[LeftOutEntry] = ()
    """Files and folders of the source that are no samples."""

    def encode_sample_lines(self) -> bytes:
        """Make the lines of ``rejects.jsonl`` about samples: in their order, the same anywhere."""
        return _encode_jsonl(
            record for number in sorted(self.records) for record in self.records[number]
        )

    def encode_rejects_lines(self) -> bytes:
        """Make the contents of ``rejects.jsonl``: lines about samples, then about all else."""
        return self.encode_sample_lines() + _encode_jsonl(
            {
                "file": entry.name,
                "decision": LEFT_OUT_DECISION,
                "reason": entry.reason,
                "sha256": "",
            }
            for entry in self.left_out
        )

    def counts(self) -> dict[str, int]:
        """Count the samples of each decision; a sample may meet with several."""
        decisions = [record["decision"] for records in self.records.values() for record in records]
        return {decision: decisions.count(decision) for decision in sorted(set(decisions))}


def keep_sample_lines(lines: bytes) -> bytes:
    """Keep the lines of a ``rejects.jsonl`` that are about samples.

    Raises:
        ValueError: The lines are no JSON.
    """
    split_lines = lines.splitlines(keepends=True)
    return b"".join(
        line for line in split_lines if json.loads(line).get("decision") != LEFT_OUT_DECISION
    )


def _encode_jsonl(records: Iterable[dict[str, str]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


@dataclass(frozen=True)
class ImagePolicy:
    """What the user wants done with bad images and with copies."""

    on_bad: str = "fail"
    """``fail``, ``skip``, or ``reencode`` what can be decoded of it and skip the rest."""
    dedup: bool = False
    """Drop exact copies instead of keeping them, and leaked images instead of refusing them."""


def decide_on_samples(
    splits: Sequence[tuple[Split, SplitSurvey]],
    sealed_digests: Mapping[str, InputDigests],
    policy: ImagePolicy,
) -> list[SplitDecisions]:
    """Decide on every surveyed sample.

    Args:
        splits: The splits to be written.
        sealed_digests: Digests of the splits of this dataset that are finished already, by name.
        policy: What the user wants.

    Returns:
        The decisions on each of ``splits``, in their order.
    """
    decisions = [_decide_within_split(split, survey, policy) for split, survey in splits]
    digests_by_split = dict(sealed_digests)
    for (split, survey), split_decisions in zip(splits, decisions, strict=True):
        digests_by_split[split.name] = _select_used_digests(
            survey, split_decisions.used_sample_numbers
        )
    return [
        _decide_across_splits(
            (split, survey), split_decisions, digests_by_split, sealed_digests, policy.dedup
        )
        for (split, survey), split_decisions in zip(splits, decisions, strict=True)
    ]


def find_leaked_digests(name: str, digests_by_split: Mapping[str, InputDigests]) -> set[bytes]:
    """Find the digests that a split shares with splits that it must share none with.

    Args:
        name: Name of the split.
        digests_by_split: Digests of all splits.
    """
    opposite_splits = [
        other_split
        for other_split in digests_by_split
        if (other_split in HELD_OUT_SPLITS) != (name in HELD_OUT_SPLITS)
    ]
    split_digests = {row.tobytes() for row in digests_by_split[name]} if opposite_splits else set()
    return {
        row.tobytes() for other_split in opposite_splits for row in digests_by_split[other_split]
    } & split_digests


def _decide_within_split(split: Split, survey: SplitSurvey, policy: ImagePolicy) -> SplitDecisions:
    verdicts = survey.rows["verdict"]
    is_usable = verdicts != ImageVerdict.REJECT
    records: dict[int, list[dict[str, str]]] = {}
    decision_words = {
        ImageVerdict.ENCODE_ANEW: "normalised",
        ImageVerdict.SALVAGE: "reencoded",
        ImageVerdict.REJECT: "rejected",
    }
    for row, number in zip(*_rows_with_reasons(survey), strict=True):
        records[number] = [
            _make_record(split, number, decision_words[ImageVerdict(verdicts[row])], survey, row)
        ]
    first_number_by_digest: dict[bytes, int] = {}
    for row in np.flatnonzero(is_usable).tolist():
        number = int(survey.numbers[row])
        first_copy_number = first_number_by_digest.setdefault(
            survey.rows["sha256"][row].tobytes(), number
        )
        if first_copy_number != number:
            is_usable[row] = not policy.dedup
            reason = f"the same bytes as {split.name_of(first_copy_number)}"
            if split.labels[first_copy_number] != split.labels[number]:
                reason += ", which is of another class"
            decision = "dropped" if policy.dedup else "duplicate"
            record = _make_record(split, number, decision, survey, row) | {"reason": reason}
            records[number] = [record] if policy.dedup else [*records.get(number, []), record]
    rejected_numbers = [
        number for number, record in records.items() if record[0]["decision"] == "rejected"
    ]
    errors: list[str] = []
    if rejected_numbers and policy.on_bad == "fail":
        more_text = (
            f" (and {len(rejected_numbers) - 1} more, see rejects.jsonl)"
            if len(rejected_numbers) > 1
            else ""
        )
        first_rejected = min(rejected_numbers)
        reason = records[first_rejected][0]["reason"]
        errors = [
            f"{split.full_name(first_rejected)}: {reason}{more_text}: repair or remove it, or give "
            "--on-bad skip"
        ]
    return SplitDecisions(survey.numbers[is_usable], records, errors, split.left_out)


def _decide_across_splits(
    split_and_survey: tuple[Split, SplitSurvey],
    decisions: SplitDecisions,
    digests_by_split: Mapping[str, InputDigests],
    sealed_digests: Mapping[str, InputDigests],
    dedup: bool,
) -> SplitDecisions:
    """Deal with the images that a training split shares with one that is held out."""
    split, survey = split_and_survey
    is_held_out = split.name in HELD_OUT_SPLITS
    if is_held_out:
        # A leak into a training split that is still to be written is reported by that split.
        digests_by_split = {**sealed_digests, split.name: digests_by_split[split.name]}
    shared_digests = find_leaked_digests(split.name, digests_by_split)
    is_used = np.isin(survey.numbers, decisions.used_sample_numbers)
    digests = survey.rows["sha256"]
    leaked_rows = [
        row for row in np.flatnonzero(is_used).tolist() if digests[row].tobytes() in shared_digests
    ]
    if not leaked_rows:
        return decisions
    is_dropping = dedup and not is_held_out
    leaking_held_out_splits = [
        held_out_split
        for held_out_split in HELD_OUT_SPLITS
        if held_out_split in digests_by_split
        and find_leaked_digests(
            split.name, _select_digests_of_splits(digests_by_split, split.name, held_out_split)
        )
    ]
    other_splits_text = "a training split" if is_held_out else " and ".join(leaking_held_out_splits)
    for row in leaked_rows:
        number, decision = int(survey.numbers[row]), "dropped" if is_dropping else "leak"
        reason = {"reason": f"the same bytes as an image of {other_splits_text}"}
        record = _make_record(split, number, decision, survey, row) | reason
        decisions.records[number] = (
            [record] if is_dropping else [*decisions.records.get(number, []), record]
        )
    if is_dropping:
        is_used[leaked_rows] = False
        return replace(decisions, used_sample_numbers=survey.numbers[is_used])
    remedy = (
        "delete the finished training split and shard both with --dedup, which drops them from it"
        if is_held_out
        else "--dedup drops them from training"
    )
    first_name = split.full_name(int(survey.numbers[leaked_rows[0]]))
    error = (
        f"{first_name}: is in {split.name} and in {other_splits_text} "
        f"({len(leaked_rows)} such images): {remedy}"
    )
    return replace(decisions, errors=[*decisions.errors, error])


def _select_digests_of_splits(
    digests_by_split: Mapping[str, InputDigests], *names: str
) -> dict[str, InputDigests]:
    return {name: digests_by_split[name] for name in names}


def _rows_with_reasons(survey: SplitSurvey) -> tuple[list[int], list[int]]:
    """List the survey rows, and the sample numbers, of all samples with a reason."""
    numbers = sorted(survey.reasons)
    return np.searchsorted(survey.numbers, numbers).tolist(), numbers


def _make_record(
    split: Split, number: int, decision: str, survey: SplitSurvey, row: int
) -> dict[str, str]:
    return {
        "file": split.name_of(number),
        "decision": decision,
        "reason": survey.reasons.get(number, ""),
        "sha256": survey.rows["sha256"][row].tobytes().hex(),
    }


def _select_used_digests(
    survey: SplitSurvey, used_sample_numbers: NDArray[np.int64]
) -> InputDigests:
    return np.ascontiguousarray(survey.rows["sha256"][np.isin(survey.numbers, used_sample_numbers)])
