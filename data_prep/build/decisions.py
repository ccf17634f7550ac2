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

from ..images.examine import Verdict
from ..sources.base import LeftOut, Split
from .survey import Survey

HELD_OUT = ("val", "test")
"""Splits that must not share an image with any that is trained on."""
LEFT_OUT = "left out"
"""The decision on what is no image."""

Digests = NDArray[np.uint8]
"""``(N, 32)``: the SHA-256 of each sample's input."""


@dataclass(frozen=True)
class SplitDecisions:
    """What becomes of one split."""

    used: NDArray[np.int64]
    """Ascending numbers of the samples to write."""
    records: dict[int, list[dict[str, str]]]
    """By sample number: the lines about it in ``rejects.jsonl``."""
    errors: list[str] = field(default_factory=list)
    """One line for each kind of thing that must not be passed over."""
    left_out: Sequence[LeftOut] = ()
    """What is no sample."""

    def judged(self) -> bytes:
        """The lines about samples: in their order, the same on any machine."""
        return _jsonl(record for number in sorted(self.records) for record in self.records[number])

    def lines(self) -> bytes:
        """The contents of ``rejects.jsonl``: those about samples, then what is none."""
        return self.judged() + _jsonl(
            {"file": one.name, "decision": LEFT_OUT, "reason": one.reason, "sha256": ""}
            for one in self.left_out
        )

    def counts(self) -> dict[str, int]:
        """How many samples met with each decision; one may meet with several."""
        met = [record["decision"] for records in self.records.values() for record in records]
        return {decision: met.count(decision) for decision in sorted(set(met))}


def without_left_out(lines: bytes) -> bytes:
    """The lines of a ``rejects.jsonl`` that are about samples.

    Raises:
        ValueError: It holds something else.
    """
    kept = lines.splitlines(keepends=True)
    return b"".join(line for line in kept if json.loads(line).get("decision") != LEFT_OUT)


def _jsonl(records: Iterable[dict[str, str]]) -> bytes:
    return "".join(f"{json.dumps(record)}\n" for record in records).encode()


@dataclass(frozen=True)
class Policy:
    """What the user wants done."""

    on_bad: str = "fail"
    """``fail``, ``skip``, or ``reencode`` what can be decoded of it and skip the rest."""
    dedup: bool = False
    """Drop exact copies instead of keeping them, and leaked images instead of refusing them."""


def decide(
    splits: Sequence[tuple[Split, Survey]], sealed: Mapping[str, Digests], policy: Policy
) -> list[SplitDecisions]:
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


def leaked_digests(name: str, known: Mapping[str, Digests]) -> set[bytes]:
    """Digests that a split shares with another one that it must not share any with.

    Args:
        name: The split.
        known: Digests of all splits.
    """
    others = [n for n in known if (n in HELD_OUT) != (name in HELD_OUT)]
    mine = {row.tobytes() for row in known[name]} if others else set()
    return {row.tobytes() for other in others for row in known[other]} & mine


def _within(split: Split, survey: Survey, policy: Policy) -> SplitDecisions:
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
    return SplitDecisions(survey.numbers[usable], records, errors, split.left_out)


def _across(
    surveyed: tuple[Split, Survey],
    decided: SplitDecisions,
    known: Mapping[str, Digests],
    sealed: Mapping[str, Digests],
    dedup: bool,
) -> SplitDecisions:
    """Deal with the images that a training split shares with one that is held out."""
    split, survey = surveyed
    validates = split.name in HELD_OUT
    if validates:
        # Of training splits that are still to be written it is told there.
        known = {**sealed, split.name: known[split.name]}
    shared = leaked_digests(split.name, known)
    used = np.isin(survey.numbers, decided.used)
    digests = survey.rows["sha256"]
    leaked = [at for at in np.flatnonzero(used).tolist() if digests[at].tobytes() in shared]
    if not leaked:
        return decided
    drops = dedup and not validates
    others = [
        n
        for n in HELD_OUT
        if n in known and leaked_digests(split.name, _pair(known, split.name, n))
    ]
    other = "a training split" if validates else " and ".join(others)
    for at in leaked:
        number, word = int(survey.numbers[at]), "dropped" if drops else "leak"
        reason = {"reason": f"the same bytes as an image of {other}"}
        told = _record(split, number, word, survey, at) | reason
        decided.records[number] = [told] if drops else [*decided.records.get(number, []), told]
    if drops:
        used[leaked] = False
        return replace(decided, used=survey.numbers[used])
    # Training splits that are still to be written are told so there, and not here.
    remedy = (
        "delete the finished training split and shard both with --dedup, which drops them from it"
        if validates
        else "--dedup drops them from training"
    )
    first = split.called(int(survey.numbers[leaked[0]]))
    error = f"{first}: is in {split.name} and in {other} ({len(leaked)} such images): {remedy}"
    return replace(decided, errors=[*decided.errors, error])


def _pair(known: Mapping[str, Digests], *names: str) -> dict[str, Digests]:
    return {name: known[name] for name in names}


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
