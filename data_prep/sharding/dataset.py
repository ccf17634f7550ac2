"""Building a dataset: survey every image, decide which samples are used, write shards, seal."""

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
"""Makes, from a title and a total, a context manager that shows progress."""


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is cut into shards, and by how many processes (which changes no byte)."""

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
    samples_written: int
    decision_counts: dict[str, int]
    split: Split
    """The split of the source that it was made from."""


@dataclass(frozen=True)
class _SplitJob:
    """A split to write, with the order and the recipe that options alone decide."""

    split: Split
    folder: Path
    order: NDArray[np.int64]
    """Sample numbers in the order in which they are written."""
    recipe: Recipe


def shuffled_order(samples: int) -> NDArray[np.int64]:
    """Make a fixed permutation of ``samples`` ids: the same on every machine and numpy version.

    Training shuffles within windows, so a dataset sorted by class must not reach the shards
    in that order.

    >>> sorted(shuffled_order(5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Sorting raw Philox words, because numpy only promises the bit generator's stream.
    order = np.argsort(np.random.Philox(key=0).random_raw(samples), kind="stable")
    return order.astype(np.int64)


def build_split(split: Split, out: Path, options: BuildOptions, advance: Advance) -> BuiltSplit:
    """Write the folder of one split, or what is still missing of it; see `build_dataset`.

    Args:
        split: The split to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it into shards.
        advance: Called with numbers of samples as they are surveyed, and as they are written.
    """
    return build_dataset([split], out, options, lambda title, total: nullcontext(advance))[0]


def build_dataset(
    splits: Sequence[Split], out: Path, options: BuildOptions, bar: ProgressBar
) -> list[BuiltSplit]:
    """Write the splits of a dataset, or what is still missing of them.

    All of them are claimed and surveyed before the first is written: a run that is stopped
    leaves none that merely seems not to be wanted, and an image that is in two splits is found
    while there is still a choice.

    Args:
        splits: The splits to write.
        out: Folder of the dataset; made if absent.
        options: How to cut them into shards.
        bar: Makes the progress bars.

    Raises:
        DataError: An unusable or leaked image, a full disk, or a folder of something else.
    """
    jobs = [_make_job(split, out, options) for split in splits]
    for job in jobs:
        refuse_foreign_folder(job.folder)
    built = {
        job.folder: BuiltSplit(job.folder, read_manifest(job.folder), 0, {}, job.split)
        for job in jobs
        if is_finished(job.folder, job.recipe)
    }
    pending_jobs = [job for job in jobs if job.folder not in built]
    with ExitStack() as claims:
        notes_folders = [claims.enter_context(claim_folder(job.folder)) for job in pending_jobs]
        surveys = [
            _survey_job(job, notes_folder, options, bar)
            for job, notes_folder in zip(pending_jobs, notes_folders, strict=True)
        ]
        sealed_digests = read_sealed_digests(out, {job.split.name for job in pending_jobs})
        for split_built in _write_all(pending_jobs, surveys, sealed_digests, options, bar):
            built[split_built.folder] = split_built
    return [built[job.folder] for job in jobs]


def _make_job(split: Split, out: Path, options: BuildOptions) -> _SplitJob:
    samples = len(split.labels)
    order = (shuffled_order(samples) if split.is_grouped else np.arange(samples))[: options.limit]
    if not len(order):
        raise DataError(f"{split.dataset}: the {split.name} split has no samples")
    recipe = {
        "dataset": split.dataset,
        "split": split.name,
        "order": "mixed" if split.is_grouped else "as given",
        "shard_size": options.shard_size,
        "limit": options.limit,
        "labelling": split.labels_digest,
        **{key: value for key, value in asdict(options.rules).items() if key != "salvage"},
        **asdict(options.policy),
        **split.facts,
    }
    return _SplitJob(split, out / split.name, order, recipe)


def _survey_job(job: _SplitJob, notes: Path, options: BuildOptions, bar: ProgressBar) -> Survey:
    numbers = np.sort(job.order)
    with bar(f"look at {job.split.dataset} {job.split.name}", len(numbers)) as advance:
        return survey_split(
            job.split, numbers, notes, options.rules, workers=options.workers, advance=advance
        )


def _write_all(
    jobs: Sequence[_SplitJob],
    surveys: list[Survey],
    sealed_digests: Mapping[str, Digests],
    options: BuildOptions,
    bar: ProgressBar,
) -> Iterator[BuiltSplit]:
    """Write each split, without the samples that turn out not to be readable any more."""
    decisions = _decide_or_raise(jobs, surveys, sealed_digests, options)
    for index, job in enumerate(jobs):
        built = None
        while built is None:
            try:
                built = _write_split(job, surveys[index], decisions[index], options, bar)
            except UnreadableError as error:
                # A sealed split may not lose a sample that its manifest states.
                if (job.folder / MANIFEST).exists():
                    raise
                planned_order = _final_plan(job, surveys[index], decisions[index])[0]
                flaws = {
                    int(planned_order[position]): flaw for position, flaw in error.flaws.items()
                }
                # Without these samples, others may be first of their copies: decide anew.
                surveys[index] = mark_unreadable(surveys[index], flaws)
                decisions = _decide_or_raise(jobs, surveys, sealed_digests, options)
                new_order, recipe, _ = _final_plan(job, surveys[index], decisions[index])
                unchanged_shards = _common_length(planned_order, new_order) // options.shard_size
                change_recipe(job.folder, recipe, decisions[index], unchanged_shards)
        yield built


def _common_length(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Count the leading entries that two orders have in common."""
    shorter = min(len(first), len(second))
    # The True at the end is found where one order only goes on longer than the other.
    return int(np.argmax(np.append(first[:shorter] != second[:shorter], True)))


def _decide_or_raise(
    jobs: Sequence[_SplitJob],
    surveys: Sequence[Survey],
    sealed_digests: Mapping[str, Digests],
    options: BuildOptions,
) -> list[SplitDecisions]:
    """Decide on all samples; raises at what must not be passed over, once it is all listed."""
    pairs = [(job.split, survey) for job, survey in zip(jobs, surveys, strict=True)]
    decisions = decide(pairs, sealed_digests, options.policy)
    errors = [error for split_decisions in decisions for error in split_decisions.errors]
    if not errors:
        return decisions
    for job, split_decisions in zip(jobs, decisions, strict=True):
        if split_decisions.rejects_lines():
            write_whole(job.folder / REJECTS, split_decisions.rejects_lines())
    raise DataError(errors[0])


def _write_split(
    job: _SplitJob,
    survey: Survey,
    decisions: SplitDecisions,
    options: BuildOptions,
    bar: ProgressBar,
) -> BuiltSplit:
    """Write the missing shards of a split, and seal it."""
    split, folder = job.split, job.folder
    order, recipe, contents = _final_plan(job, survey, decisions)
    rows = survey.rows[np.searchsorted(survey.numbers, order)]
    finished_shards = begin_split(folder, recipe, decisions)
    missing_shards = [
        (number, first_id, slice(first_id, first_id + options.shard_size))
        for number, first_id in enumerate(range(0, len(order), options.shard_size))
        if shard_name(number) not in finished_shards
    ]
    tasks = [
        ShardTask(
            folder, number, first_id, split.labels[order[samples]], split.images_of(order[samples]),
            rows[samples], options.rules,
        )
        for number, first_id, samples in missing_shards
    ]  # fmt: skip
    missing_samples = sum(len(task.labels) for task in tasks)
    with bar(f"write {split.dataset} {split.name}", len(order)) as advance:
        advance(len(order) - missing_samples)
        for entry in pool.run_tasks(
            write_shard, tasks, workers=options.workers, advance=advance, imports=IMPORTS
        ):
            finished_shards[entry.name] = entry
    seal_split(
        split, folder, [finished_shards[name] for name in sorted(finished_shards)], recipe, contents
    )
    return BuiltSplit(folder, read_manifest(folder), missing_samples, decisions.counts(), split)


def _final_plan(
    job: _SplitJob, survey: Survey, decisions: SplitDecisions
) -> tuple[NDArray[np.int64], Recipe, Mapping[str, bytes]]:
    """Make the order of writing, the whole recipe, and the files beside the shards."""
    order = job.order[np.isin(job.order, decisions.used_samples)]
    if not len(order):
        write_whole(job.folder / REJECTS, decisions.rejects_lines())
        raise DataError(f"{job.folder}: not one image of it can be used ({REJECTS} tells why)")
    rows = survey.rows[np.searchsorted(survey.numbers, order)]
    contents = {
        INPUTS: encode_inputs(rows["sha256"]),
        REJECTS: rejects_to_write(job.folder, decisions),
    }
    recipe = job.recipe | {
        "content": hashlib.sha256(contents[INPUTS]).hexdigest(),
        "rejects": rejects_digest(contents[REJECTS]),
        **judge_entry(bool(rows["pillow_only"].any())),
    }
    return order, recipe, contents
