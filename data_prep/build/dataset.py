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
from ..images.agreement import judge_entry
from ..images.examine import DEFAULT_RULES, Rules
from ..sources.base import Split
from . import pool
from .decisions import Digests, Policy, SplitDecisions, decide
from .sealing import seal_split
from .split_folder import (
    INPUTS,
    REJECTS,
    Recipe,
    begin_split,
    change_recipe,
    claim_folder,
    encode_inputs,
    is_finished,
    read_sealed_digests,
    refuse_foreign_folder,
    rejects_digest,
    rejects_to_write,
)
from .survey import IMPORTS, Survey, mark_unreadable, survey_split
from .writer import ShardTask, UnreadableError, shard_name, write_shard

Advance = Callable[[int], None]
ProgressBar = Callable[[str, int], AbstractContextManager[Advance]]
"""From a title and a total to what shows progress while it is entered."""


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is cut up, and by how many processes (which leaves no trace)."""

    shard_size: int = 2048
    """Samples per shard."""
    limit: int | None = None
    """Keep only so many samples of each split, after mixing."""
    workers: int = 1
    rules: Rules = DEFAULT_RULES
    policy: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class BuiltSplit:
    """A sealed split, how much of it this call had to write, and what was decided on the way."""

    folder: Path
    manifest: Manifest
    written: int
    decisions: dict[str, int]
    split: Split
    """What it was made from."""


@dataclass(frozen=True)
class _SplitJob:
    split: Split
    folder: Path
    order: NDArray[np.int64]
    """Sample numbers in the order in which they are written."""
    recipe: Recipe


def shuffled_order(samples: int) -> NDArray[np.int64]:
    """A fixed permutation of ``samples`` ids: the same on every machine and numpy version.

    Training shuffles within windows, so a dataset sorted by class must not reach the shards
    in that order.

    >>> sorted(shuffled_order(5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Sorting raw Philox words, because numpy only promises the bit generator's stream.
    order = np.argsort(np.random.Philox(key=0).random_raw(samples), kind="stable")
    return order.astype(np.int64)


def build_split(split: Split, out: Path, options: BuildOptions, advance: Advance) -> BuiltSplit:
    """Write ``out/<split>/`` alone, or what is still missing of it; see `build_dataset`.

    Args:
        split: What to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it up.
        advance: Called with numbers of samples as they are looked at, and as they are written.
    """
    return build_dataset([split], out, options, lambda title, total: nullcontext(advance))[0]


def build_dataset(
    splits: Sequence[Split], out: Path, options: BuildOptions, bar: ProgressBar
) -> list[BuiltSplit]:
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
        refuse_foreign_folder(job.folder)
    built = {
        job.folder: BuiltSplit(job.folder, read_manifest(job.folder), 0, {}, job.split)
        for job in jobs
        if is_finished(job.folder, job.recipe)
    }
    todo = [job for job in jobs if job.folder not in built]
    with ExitStack() as claims:
        notes = [claims.enter_context(claim_folder(job.folder)) for job in todo]
        seen = [_look(job, note, options, bar) for job, note in zip(todo, notes, strict=True)]
        sealed = read_sealed_digests(out, {job.split.name for job in todo})
        for one in _write_all(todo, seen, sealed, options, bar):
            built[one.folder] = one
    return [built[job.folder] for job in jobs]


def _job(split: Split, out: Path, options: BuildOptions) -> _SplitJob:
    samples = len(split.labels)
    order = (shuffled_order(samples) if split.grouped else np.arange(samples))[: options.limit]
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
    return _SplitJob(split, out / split.name, order, recipe)


def _look(job: _SplitJob, notes: Path, options: BuildOptions, bar: ProgressBar) -> Survey:
    numbers = np.sort(job.order)
    with bar(f"look at {job.split.dataset} {job.split.name}", len(numbers)) as advance:
        return survey_split(
            job.split, numbers, notes, options.rules, workers=options.workers, advance=advance
        )


def _write_all(
    jobs: Sequence[_SplitJob],
    seen: list[Survey],
    sealed: Mapping[str, Digests],
    options: BuildOptions,
    bar: ProgressBar,
) -> Iterator[BuiltSplit]:
    """Write each split, without the samples that turn out not to be readable any more."""
    decisions = _decided(jobs, seen, sealed, options)
    for at, job in enumerate(jobs):
        built = None
        while built is None:
            try:
                built = _write(job, seen[at], decisions[at], options, bar)
            except UnreadableError as error:
                if (job.folder / MANIFEST).exists():  # it was sealed with this sample
                    raise
                before = _planned(job, seen[at], decisions[at])[0]
                flaws = {int(before[place]): flaw for place, flaw in error.flaws.items()}
                seen[at] = mark_unreadable(seen[at], flaws)
                decisions = _decided(jobs, seen, sealed, options)
                after, recipe, _ = _planned(job, seen[at], decisions[at])
                both = min(len(before), len(after))
                same = int(np.argmax(np.append(before[:both] != after[:both], True)))
                change_recipe(job.folder, recipe, decisions[at], same // options.shard_size)
        yield built


def _decided(
    jobs: Sequence[_SplitJob],
    seen: Sequence[Survey],
    sealed: Mapping[str, Digests],
    options: BuildOptions,
) -> list[SplitDecisions]:
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


def _write(
    job: _SplitJob, found: Survey, decided: SplitDecisions, options: BuildOptions, bar: ProgressBar
) -> BuiltSplit:
    """Write the shards that are missing, and seal."""
    split, folder = job.split, job.folder
    order, recipe, contents = _planned(job, found, decided)
    rows = found.rows[np.searchsorted(found.numbers, order)]
    done = begin_split(folder, recipe, decided)
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
        for entry in pool.run_tasks(
            write_shard, tasks, workers=options.workers, advance=advance, imports=IMPORTS
        ):
            done[entry.name] = entry
    seal_split(split, folder, [done[name] for name in sorted(done)], recipe, contents)
    return BuiltSplit(folder, read_manifest(folder), missing, decided.counts(), split)


def _planned(
    job: _SplitJob, found: Survey, decided: SplitDecisions
) -> tuple[NDArray[np.int64], Recipe, Mapping[str, bytes]]:
    """The samples in the order of writing, the whole recipe, and the files beside the shards."""
    order = job.order[np.isin(job.order, decided.used)]
    if not len(order):
        write_whole(job.folder / REJECTS, decided.lines())
        raise DataError(f"{job.folder}: not one image of it can be used ({REJECTS} tells why)")
    rows = found.rows[np.searchsorted(found.numbers, order)]
    contents = {
        INPUTS: encode_inputs(rows["sha256"]),
        REJECTS: rejects_to_write(job.folder, decided),
    }
    recipe = job.recipe | {
        "content": hashlib.sha256(contents[INPUTS]).hexdigest(),
        "rejects": rejects_digest(contents[REJECTS]),
        **judge_entry(bool(rows["pillow_only"].any())),
    }
    return order, recipe, contents
