"""A dataset: look at every image, decide which sample goes into which shard, write, seal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.store.manifest import MANIFEST, Manifest, read_manifest
from vssl_dist.errors import DataError

from ..files import write_whole
from ..images.agreement import judge
from ..images.examine import DEFAULT, Rules
from ..sources.base import Split
from . import pool
from .decisions import Decided, Digests, Policy, decide
from .folder import (
    INPUTS,
    REJECTS,
    Recipe,
    amend,
    begin,
    claimed,
    digest_of,
    finished,
    inputs_blob,
    refuse_foreign,
    sealed_digests,
    settled,
)
from .sealing import seal_split
from .survey import IMPORTS, Survey, survey, without
from .writer import ShardTask, UnreadError, shard_name, write_shard

Advance = Callable[[int], None]
Bar = Callable[[str, int], AbstractContextManager[Advance]]
"""From a title and a total to what shows progress while it is entered."""


@dataclass(frozen=True)
class Options:
    """How a dataset is cut up, and by how many processes (which leaves no trace)."""

    shard_size: int = 2048
    """Samples per shard."""
    limit: int | None = None
    """Keep only so many samples of each split, after mixing."""
    workers: int = 1
    rules: Rules = DEFAULT
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Built:
    """A sealed split, how much of it this call had to write, and what was decided on the way."""

    folder: Path
    manifest: Manifest
    written: int
    decisions: dict[str, int]
    split: Split
    """What it was made from."""


@dataclass(frozen=True)
class _Job:
    split: Split
    folder: Path
    order: NDArray[np.int64]
    """Sample numbers in the order in which they are written."""
    recipe: Recipe


def mixed(samples: int) -> NDArray[np.int64]:
    """A fixed permutation of ``samples`` ids: the same on every machine and numpy version.

    Training shuffles within windows, so a dataset sorted by class must not reach the shards
    in that order.

    >>> sorted(mixed(5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Sorting raw Philox words, because numpy only promises the bit generator's stream.
    order = np.argsort(np.random.Philox(key=0).random_raw(samples), kind="stable")
    return order.astype(np.int64)


def build(split: Split, out: Path, options: Options, advance: Advance) -> Built:
    """Write ``out/<split>/`` alone, or what is still missing of it; see `build_all`.

    Args:
        split: What to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it up.
        advance: Called with numbers of samples as they are looked at, and as they are written.
    """
    return build_all([split], out, options, lambda title, total: nullcontext(advance))[0]


def build_all(splits: Sequence[Split], out: Path, options: Options, bar: Bar) -> list[Built]:
    """Write the splits of a dataset, or what is still missing of them.

    All of them are claimed and looked at before the first is written: a run that is stopped
    leaves none that merely seems not to be wanted, and an image that is in two splits is found
    while there is still a choice.

    Args:
        splits: What to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it up.
        bar: Shows progress.

    Raises:
        DataError: An unusable or leaked image, a full disk, or a folder of something else.
    """
    jobs = [_job(split, out, options) for split in splits]
    for job in jobs:
        refuse_foreign(job.folder)
    built = {
        job.folder: Built(job.folder, read_manifest(job.folder), 0, {}, job.split)
        for job in jobs
        if finished(job.folder, job.recipe)
    }
    todo = [job for job in jobs if job.folder not in built]
    with ExitStack() as claims:
        notes = [claims.enter_context(claimed(job.folder)) for job in todo]
        seen = [_look(job, note, options, bar) for job, note in zip(todo, notes, strict=True)]
        sealed = sealed_digests(out, {job.split.name for job in todo})
        for one in _write_all(todo, seen, sealed, options, bar):
            built[one.folder] = one
    return [built[job.folder] for job in jobs]


def _job(split: Split, out: Path, options: Options) -> _Job:
    samples = len(split.labels)
    order = (mixed(samples) if split.grouped else np.arange(samples))[: options.limit]
    if not len(order):
        raise DataError(f"{split.dataset}: the {split.name} split has no samples")
    recipe = {
        "dataset": split.dataset,
        "split": split.name,
        "order": "mixed" if split.grouped else "as given",
        "shard_size": options.shard_size,
        "limit": options.limit,
        "labelling": split.labelling,
        **{k: v for k, v in asdict(options.rules).items() if k != "salvage"},
        **asdict(options.policy),
        **split.facts,
    }
    return _Job(split, out / split.name, order, recipe)


def _look(job: _Job, notes: Path, options: Options, bar: Bar) -> Survey:
    numbers = np.sort(job.order)
    with bar(f"look at {job.split.dataset} {job.split.name}", len(numbers)) as advance:
        return survey(
            job.split, numbers, notes, options.rules, workers=options.workers, advance=advance
        )


def _write_all(
    jobs: Sequence[_Job],
    seen: list[Survey],
    sealed: Mapping[str, Digests],
    options: Options,
    bar: Bar,
) -> Iterator[Built]:
    """Write each split, without the samples that turn out not to be readable any more."""
    decisions = _decided(jobs, seen, sealed, options)
    for at, job in enumerate(jobs):
        built = None
        while built is None:
            try:
                built = _write(job, seen[at], decisions[at], options, bar)
            except UnreadError as error:
                if (job.folder / MANIFEST).exists():  # it was sealed with this sample
                    raise
                before = _planned(job, seen[at], decisions[at])[0]
                flaws = {int(before[place]): flaw for place, flaw in error.flaws.items()}
                seen[at] = without(seen[at], flaws)
                decisions = _decided(jobs, seen, sealed, options)
                after, recipe, _ = _planned(job, seen[at], decisions[at])
                both = min(len(before), len(after))
                same = int(np.argmax(np.append(before[:both] != after[:both], True)))
                amend(job.folder, recipe, decisions[at], same // options.shard_size)
        yield built


def _decided(
    jobs: Sequence[_Job], seen: Sequence[Survey], sealed: Mapping[str, Digests], options: Options
) -> list[Decided]:
    """What becomes of all samples; stops at what must not be passed over, with all of it listed."""
    pairs = [(job.split, found) for job, found in zip(jobs, seen, strict=True)]
    decisions = decide(pairs, sealed, options.policy)
    errors = [error for decided in decisions for error in decided.errors]
    if not errors:
        return decisions
    for job, decided in zip(jobs, decisions, strict=True):
        if decided.lines():
            write_whole(job.folder / REJECTS, decided.lines())
    raise DataError(errors[0])


def _write(job: _Job, found: Survey, decided: Decided, options: Options, bar: Bar) -> Built:
    """Write the shards that are missing, and seal."""
    split, folder = job.split, job.folder
    order, recipe, contents = _planned(job, found, decided)
    rows = found.rows[np.searchsorted(found.numbers, order)]
    done = begin(folder, recipe, decided)
    pieces = [
        (number, first, slice(first, first + options.shard_size))
        for number, first in enumerate(range(0, len(order), options.shard_size))
        if shard_name(number) not in done
    ]
    tasks = [
        ShardTask(
            folder, number, first, split.labels[order[piece]], split.images(order[piece]),
            rows[piece], options.rules,
        )
        for number, first, piece in pieces
    ]  # fmt: skip
    missing = sum(len(task.labels) for task in tasks)
    with bar(f"write {split.dataset} {split.name}", len(order)) as advance:
        advance(len(order) - missing)
        for entry in pool.run(
            write_shard, tasks, workers=options.workers, advance=advance, imports=IMPORTS
        ):
            done[entry.name] = entry
    seal_split(split, folder, [done[name] for name in sorted(done)], recipe, contents)
    return Built(folder, read_manifest(folder), missing, decided.counts(), split)


def _planned(
    job: _Job, found: Survey, decided: Decided
) -> tuple[NDArray[np.int64], Recipe, Mapping[str, bytes]]:
    """The samples in the order of writing, the whole recipe, and the files beside the shards."""
    order = job.order[np.isin(job.order, decided.used)]
    if not len(order):
        write_whole(job.folder / REJECTS, decided.lines())
        raise DataError(f"{job.folder}: not one image of it can be used ({REJECTS} tells why)")
    rows = found.rows[np.searchsorted(found.numbers, order)]
    contents = {INPUTS: inputs_blob(rows["sha256"]), REJECTS: settled(job.folder, decided)}
    recipe = job.recipe | {
        "content": hashlib.sha256(contents[INPUTS]).hexdigest(),
        "rejects": digest_of(contents[REJECTS]),
        **judge(bool(rows["alone"].any())),
    }
    return order, recipe, contents
