"""Which samples of a dataset are used, and the list of all that was decided.

A pure function of what the surveys of all splits found.  Training splits give way to ``val``,
whose images others compare themselves on; of equal images of one split the first is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_prep.images import Verdict
from data_prep.split import Split
from data_prep.survey import Survey

VALIDATION = "val"

Digests = NDArray[np.uint8]
"""``(N, 32)``: the SHA-256 of each sample's input."""


@dataclass(frozen=True)
class Decided:
    """What becomes of one split."""

    used: NDArray[np.int64]
    """Ascending numbers of the samples to write."""
    records: dict[int, list[dict[str, str]]]
    """By sample number: the lines about it in ``rejects.jsonl``."""
    errors: list[str] = field(default_factory=list)
    """One line for each kind of thing that must not be passed over."""

    def lines(self) -> bytes:
        """The contents of ``rejects.jsonl``: in order of the samples, the same on any machine."""
        ordered = (record for number in sorted(self.records) for record in self.records[number])
        return "".join(f"{json.dumps(record)}\n" for record in ordered).encode()

    def counts(self) -> dict[str, int]:
        """How many samples met with each decision; one may meet with several."""
        met = [record["decision"] for records in self.records.values() for record in records]
        return {decision: met.count(decision) for decision in sorted(set(met))}


@dataclass(frozen=True)
class Policy:
    """What the user wants done."""

    on_bad: str = "fail"
    """``fail``, ``skip``, or ``reencode`` what can be decoded of it and skip the rest."""
    dedup: bool = False
    """Drop exact copies instead of keeping them, and leaked images instead of refusing them."""


def decide(
    splits: Sequence[tuple[Split, Survey]], sealed: Mapping[str, Digests], policy: Policy
) -> list[Decided]:
    """Decide on every surveyed sample.

    Args:
        splits: The splits to be written.
        sealed: Digests of the splits of this dataset that are finished already, by name.
        policy: What the user wants.

    Returns:
        One decision for each of ``splits``.
    """
    made = [_within(split, survey, policy) for split, survey in splits]
    known = dict(sealed)
    for (split, survey), decided in zip(splits, made, strict=True):
        known[split.name] = _digests(survey, decided.used)
    return [
        _across((split, survey), decided, known, sealed, policy.dedup)
        for (split, survey), decided in zip(splits, made, strict=True)
    ]


def leaks(name: str, known: Mapping[str, Digests]) -> set[bytes]:
    """Digests that a split shares with another one that it must not share any with.

    Args:
        name: The split.
        known: Digests of all splits.
    """
    others = [n for n in known if n != name and VALIDATION in (n, name)]
    mine = {row.tobytes() for row in known[name]} if others else set()
    return {row.tobytes() for other in others for row in known[other]} & mine


def _within(split: Split, survey: Survey, policy: Policy) -> Decided:
    verdicts = survey.rows["verdict"]
    usable = verdicts != Verdict.REJECT
    records: dict[int, list[dict[str, str]]] = {}
    worded = {
        Verdict.REMAKE: "normalised",
        Verdict.SALVAGE: "reencoded",
        Verdict.REJECT: "rejected",
    }
    for at, number in zip(*_positions(survey), strict=True):
        records[number] = [_record(split, number, worded[Verdict(verdicts[at])], survey, at)]
    first: dict[bytes, int] = {}
    for at in np.flatnonzero(usable).tolist():
        number = int(survey.numbers[at])
        kept = first.setdefault(survey.rows["sha256"][at].tobytes(), number)
        if kept != number:
            usable[at] = not policy.dedup
            twin = f"the same bytes as {split.names(kept)}"
            if split.labels[kept] != split.labels[number]:
                twin += ", which is of another class"
            word = "dropped" if policy.dedup else "duplicate"
            told = _record(split, number, word, survey, at) | {"reason": twin}
            records[number] = [told] if policy.dedup else [*records.get(number, []), told]
    bad = [number for number, told in records.items() if told[0]["decision"] == "rejected"]
    errors: list[str] = []
    if bad and policy.on_bad == "fail":
        more = f" (and {len(bad) - 1} more, see rejects.jsonl)" if len(bad) > 1 else ""
        worst = min(bad)
        errors = [
            f"{split.called(worst)}: {records[worst][0]['reason']}{more}: repair or remove it, or "
            "give --on-bad skip"
        ]
    return Decided(survey.numbers[usable], records, errors)


def _across(
    surveyed: tuple[Split, Survey],
    decided: Decided,
    known: Mapping[str, Digests],
    sealed: Mapping[str, Digests],
    dedup: bool,
) -> Decided:
    """Deal with the images that a training split shares with ``val``."""
    split, survey = surveyed
    validates = split.name == VALIDATION
    if validates:
        # Of training splits that are still to be written it is told there.
        known = {**sealed, split.name: known[split.name]}
    shared = leaks(split.name, known)
    used = np.isin(survey.numbers, decided.used)
    digests = survey.rows["sha256"]
    leaked = [at for at in np.flatnonzero(used).tolist() if digests[at].tobytes() in shared]
    if not leaked:
        return decided
    drops = dedup and not validates
    other = "a training split" if validates else VALIDATION
    for at in leaked:
        number, word = int(survey.numbers[at]), "dropped" if drops else "leak"
        reason = {"reason": f"the same bytes as an image of {other}"}
        told = _record(split, number, word, survey, at) | reason
        decided.records[number] = [told] if drops else [*decided.records.get(number, []), told]
    if drops:
        used[leaked] = False
        return Decided(survey.numbers[used], decided.records, decided.errors)
    # Training splits that are still to be written are told so there, and not here.
    remedy = (
        "delete the finished training split and shard both with --dedup, which drops them from it"
        if validates
        else "--dedup drops them from training"
    )
    first = split.called(int(survey.numbers[leaked[0]]))
    error = f"{first}: is in {split.name} and in {other} ({len(leaked)} such images): {remedy}"
    return Decided(decided.used, decided.records, [*decided.errors, error])


def _positions(survey: Survey) -> tuple[list[int], list[int]]:
    """Places in the survey, and numbers, of the samples that there is a reason for."""
    numbers = sorted(survey.reasons)
    return np.searchsorted(survey.numbers, numbers).tolist(), numbers


def _record(split: Split, number: int, decision: str, survey: Survey, at: int) -> dict[str, str]:
    return {
        "file": split.names(number),
        "decision": decision,
        "reason": survey.reasons.get(number, ""),
        "sha256": survey.rows["sha256"][at].tobytes().hex(),
    }


def _digests(survey: Survey, used: NDArray[np.int64]) -> Digests:
    return np.ascontiguousarray(survey.rows["sha256"][np.isin(survey.numbers, used)])
