"""A dataset: look at every image, decide which sample goes into which shard, write, seal."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep import pool
from data_prep.agreement import judge
from data_prep.decisions import Decided, Policy, decide, leaks
from data_prep.files import write_whole
from data_prep.folder import (
    INPUTS,
    REJECTS,
    Recipe,
    begin,
    claimed,
    finished,
    inputs_blob,
    refuse_foreign,
    sealed_digests,
)
from data_prep.images import DEFAULT, Rules
from data_prep.split import Split
from data_prep.survey import Survey, survey
from data_prep.writer import NOTES, ShardTask, shard_name, write_shard
from vssl_dist.data.manifest import (
    FORMAT,
    MANIFEST,
    DataError,
    Manifest,
    ShardEntry,
    read_manifest,
    seal,
)
from vssl_dist.durable import sync

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
        advance: Called with numbers of samples as they are looked at, and again as they are
            written.
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
        DataError: An unusable or leaked image, a full disk, or a folder that holds something
            else.
    """
    jobs = [_job(split, out, options) for split in splits]
    for job in jobs:
        refuse_foreign(job.folder)
    built = {
        job.folder: Built(job.folder, read_manifest(job.folder), 0, {})
        for job in jobs
        if finished(job.folder, job.recipe)
    }
    todo = [job for job in jobs if job.folder not in built]
    with ExitStack() as claims:
        notes = [claims.enter_context(claimed(job.folder)) for job in todo]
        seen = [_look(job, note, options, bar) for job, note in zip(todo, notes, strict=True)]
        names = {job.split.name for job in todo}
        pairs = [(job.split, found) for job, found in zip(todo, seen, strict=True)]
        decisions = decide(pairs, sealed_digests(out, names), options.policy)
        _refuse(todo, decisions)
        for job, found, decided in zip(todo, seen, decisions, strict=True):
            built[job.folder] = _write(job, found, decided, options, bar)
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


def _refuse(jobs: Sequence[_Job], decisions: Sequence[Decided]) -> None:
    """Stop at what must not be passed over, with the whole list of it on disk."""
    errors = [error for decided in decisions for error in decided.errors]
    if not errors:
        return
    for job, decided in zip(jobs, decisions, strict=True):
        if decided.records:
            write_whole(job.folder / REJECTS, decided.lines())
    raise DataError(errors[0])


def _write(job: _Job, found: Survey, decided: Decided, options: Options, bar: Bar) -> Built:
    """Write the shards that are missing, and seal."""
    split, folder = job.split, job.folder
    order = job.order[np.isin(job.order, decided.used)]
    if not len(order):
        write_whole(folder / REJECTS, decided.lines())
        raise DataError(f"{folder}: not one image of it can be used ({REJECTS} tells why)")
    rows = found.rows[np.searchsorted(found.numbers, order)]
    inputs, rejects = inputs_blob(rows["sha256"]), decided.lines()
    recipe = job.recipe | {
        "content": hashlib.sha256(inputs).hexdigest(),
        "rejects": hashlib.sha256(rejects).hexdigest() if rejects else None,
        **judge(bool(rows["alone"].any())),
    }
    done = begin(folder, recipe)
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
        for entry in pool.run(write_shard, tasks, workers=options.workers, advance=advance):
            done[entry.name] = entry
    _seal(job, [done[name] for name in sorted(done)], recipe, inputs, rejects)
    return Built(folder, read_manifest(folder), missing, decided.counts())


def _seal(
    job: _Job, shards: list[ShardEntry], recipe: Recipe, inputs: bytes, rejects: bytes
) -> None:
    folder, split = job.folder, job.split
    # Another process may have finished the other split since this one was looked at.
    known = sealed_digests(folder.parent, {split.name})
    mine = np.load(io.BytesIO(inputs), allow_pickle=False)
    if leaks(split.name, {**known, split.name: mine}):
        raise DataError(
            f"{folder}: shares images with a split that was finished meanwhile: run again"
        )
    write_whole(folder / INPUTS, inputs)
    if rejects:
        write_whole(folder / REJECTS, rejects)
    else:
        (folder / REJECTS).unlink(missing_ok=True)
    contents = {
        "format": FORMAT,
        "name": split.dataset,
        "split": split.name,
        "samples": sum(shard.samples for shard in shards),
        "classes": list(split.classes),
        "shards": [asdict(shard) for shard in shards],
        "source": recipe,
    }
    sync(folder)
    write_whole(folder / MANIFEST, seal(contents))
    sync(folder)
    shutil.rmtree(folder / NOTES)
