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
from ..images.agreement import make_judged_by_entry
from ..images.examine import DEFAULT_RULES, ImageRules
from ..sources.base import Split
from . import pool
from .decisions import ImagePolicy, InputDigests, SplitDecisions, decide_on_samples
from .sealing import seal_split
from .split_folder import (
    INPUT_DIGESTS_NAME,
    REJECTS_NAME,
    ShardingRecipe,
    begin_split,
    change_recipe,
    claim_split_folder,
    digest_rejects,
    encode_input_digests,
    is_split_finished,
    read_sealed_digests,
    refuse_foreign_folder,
    rejects_to_write,
)
from .survey import WORKER_MODULES, SplitSurvey, mark_unreadable, survey_split
from .writer import ShardWriteTask, UnreadableSampleError, shard_name, write_shard

AdvanceProgress = Callable[[int], None]
MakeProgressBar = Callable[[str, int], AbstractContextManager[AdvanceProgress]]
"""Makes, from a title and a total, a context manager that shows progress."""


@dataclass(frozen=True)
class BuildOptions:
    """How a dataset is cut into shards, and by how many processes (which changes no byte)."""

    shard_size: int = 2048
    """Samples per shard."""
    limit: int | None = None
    """Keep only so many samples of each split, after mixing."""
    workers: int = 1
    rules: ImageRules = DEFAULT_RULES
    policy: ImagePolicy = field(default_factory=ImagePolicy)


@dataclass(frozen=True)
class BuiltSplit:
    """A sealed split, how much of it this call had to write, and what was decided on the way."""

    folder: Path
    manifest: Manifest
    num_samples_written: int
    count_by_decision: dict[str, int]
    split: Split
    """The split of the source that it was made from."""


@dataclass(frozen=True)
class _SplitJob:
    """A split to write, with the order and the recipe that options alone decide."""

    split: Split
    folder: Path
    write_order: NDArray[np.int64]
    """Sample numbers in the order in which they are written."""
    recipe: ShardingRecipe


def fixed_permutation(samples: int) -> NDArray[np.int64]:
    """Make a fixed permutation of ``samples`` ids: the same on every machine and numpy version.

    Training shuffles within windows, so a dataset sorted by class must not reach the shards
    in that order.

    >>> sorted(fixed_permutation(5).tolist())
    [0, 1, 2, 3, 4]
    """
    # Sorting raw Philox words, because numpy only promises the bit generator's stream.
    permutation = np.argsort(np.random.Philox(key=0).random_raw(samples), kind="stable")
    return permutation.astype(np.int64)


def build_split(
    split: Split, out: Path, options: BuildOptions, advance: AdvanceProgress
) -> BuiltSplit:
    """Write the folder of one split, or what is still missing of it; see `build_dataset`.

    Args:
        split: The split to write.
        out: Folder of the dataset; made if absent.
        options: How to cut it into shards.
        advance: Called with numbers of samples as they are surveyed, and as they are written.
    """
    return build_dataset([split], out, options, lambda title, total: nullcontext(advance))[0]


def build_dataset(
    splits: Sequence[Split], out: Path, options: BuildOptions, make_progress_bar: MakeProgressBar
) -> list[BuiltSplit]:
    """Write the splits of a dataset, or what is still missing of them.

    All of them are claimed and surveyed before the first is written: a run that is stopped
    leaves none that merely seems not to be wanted, and an image that is in two splits is found
    while there is still a choice.

    Args:
        splits: The splits to write.
        out: Folder of the dataset; made if absent.
        options: How to cut them into shards.
        make_progress_bar: Makes the progress bars.

    Raises:
        DataError: An unusable or leaked image, a full disk, or a folder of something else.
    """
    split_jobs = [_make_job(split, out, options) for split in splits]
    for split_job in split_jobs:
        refuse_foreign_folder(split_job.folder)
    built_by_folder = {
        split_job.folder: BuiltSplit(
            split_job.folder, read_manifest(split_job.folder), 0, {}, split_job.split
        )
        for split_job in split_jobs
        if is_split_finished(split_job.folder, split_job.recipe)
    }
    pending_jobs = [
        split_job for split_job in split_jobs if split_job.folder not in built_by_folder
    ]
    with ExitStack() as claim_stack:
        notes_folders = [
            claim_stack.enter_context(claim_split_folder(split_job.folder))
            for split_job in pending_jobs
        ]
        surveys = [
            _survey_split_job(split_job, notes_folder, options, make_progress_bar)
            for split_job, notes_folder in zip(pending_jobs, notes_folders, strict=True)
        ]
        sealed_digests = read_sealed_digests(
            out, {split_job.split.name for split_job in pending_jobs}
        )
        for built_split in _write_split_jobs(
            pending_jobs, surveys, sealed_digests, options, make_progress_bar
        ):
            built_by_folder[built_split.folder] = built_split
    return [built_by_folder[split_job.folder] for split_job in split_jobs]


def _make_job(split: Split, out: Path, options: BuildOptions) -> _SplitJob:
    samples = len(split.labels)
    write_order = (fixed_permutation(samples) if split.is_grouped_by_class else np.arange(samples))[
        : options.limit
    ]
    if not len(write_order):
        raise DataError(f"{split.dataset}: the {split.name} split has no samples")
    recipe = {
        "dataset": split.dataset,
        "split": split.name,
        "order": "mixed" if split.is_grouped_by_class else "as given",
        "shard_size": options.shard_size,
        "limit": options.limit,
        "labelling": split.labels_digest,
        **{key: value for key, value in asdict(options.rules).items() if key != "salvage"},
        **asdict(options.policy),
        **split.facts,
    }
    return _SplitJob(split, out / split.name, write_order, recipe)


def _survey_split_job(
    split_job: _SplitJob, notes: Path, options: BuildOptions, make_progress_bar: MakeProgressBar
) -> SplitSurvey:
    numbers = np.sort(split_job.write_order)
    with make_progress_bar(
        f"look at {split_job.split.dataset} {split_job.split.name}", len(numbers)
    ) as advance:
        return survey_split(
            split_job.split, numbers, notes, options.rules, workers=options.workers, advance=advance
        )


def _write_split_jobs(
    split_jobs: Sequence[_SplitJob],
    surveys: list[SplitSurvey],
    sealed_digests: Mapping[str, InputDigests],
    options: BuildOptions,
    make_progress_bar: MakeProgressBar,
) -> Iterator[BuiltSplit]:
    """Write each split, without the samples that turn out not to be readable any more."""
    decisions = _decide_or_raise(split_jobs, surveys, sealed_digests, options)
    for index, split_job in enumerate(split_jobs):
        built = None
        while built is None:
            try:
                built = _write_split(
                    split_job, surveys[index], decisions[index], options, make_progress_bar
                )
            except UnreadableSampleError as error:
                # A sealed split may not lose a sample that its manifest states.
                if (split_job.folder / MANIFEST).exists():
                    raise
                planned_order = _plan_writing(split_job, surveys[index], decisions[index])[0]
                flaws = {
                    int(planned_order[position]): flaw for position, flaw in error.flaws.items()
                }
                # Without these samples, others may be first of their copies: decide anew.
                surveys[index] = mark_unreadable(surveys[index], flaws)
                decisions = _decide_or_raise(split_jobs, surveys, sealed_digests, options)
                new_order, recipe, _ = _plan_writing(split_job, surveys[index], decisions[index])
                unchanged_shards = (
                    _count_common_start(planned_order, new_order) // options.shard_size
                )
                change_recipe(split_job.folder, recipe, decisions[index], unchanged_shards)
        yield built


def _count_common_start(first_order: NDArray[np.int64], second_order: NDArray[np.int64]) -> int:
    """Count the leading entries that two orders have in common."""
    shorter_length = min(len(first_order), len(second_order))
    # The True at the end is found where one order only goes on longer than the other.
    return int(
        np.argmax(np.append(first_order[:shorter_length] != second_order[:shorter_length], True))
    )


def _decide_or_raise(
    split_jobs: Sequence[_SplitJob],
    surveys: Sequence[SplitSurvey],
    sealed_digests: Mapping[str, InputDigests],
    options: BuildOptions,
) -> list[SplitDecisions]:
    """Decide on all samples; raises at what must not be passed over, once it is all listed."""
    pairs = [
        (split_job.split, survey) for split_job, survey in zip(split_jobs, surveys, strict=True)
    ]
    decisions = decide_on_samples(pairs, sealed_digests, options.policy)
    errors = [error for split_decisions in decisions for error in split_decisions.errors]
    if not errors:
        return decisions
    for split_job, split_decisions in zip(split_jobs, decisions, strict=True):
        if split_decisions.encode_rejects_lines():
            write_whole(split_job.folder / REJECTS_NAME, split_decisions.encode_rejects_lines())
    raise DataError(errors[0])


def _write_split(
    split_job: _SplitJob,
    survey: SplitSurvey,
    decisions: SplitDecisions,
    options: BuildOptions,
    make_progress_bar: MakeProgressBar,
) -> BuiltSplit:
    """Write the missing shards of a split, and seal it."""
    split, folder = split_job.split, split_job.folder
    write_order, recipe, side_file_contents = _plan_writing(split_job, survey, decisions)
    survey_rows = survey.rows[np.searchsorted(survey.numbers, write_order)]
    finished_shards = begin_split(folder, recipe, decisions)
    missing_shards = [
        (number, first_id, slice(first_id, first_id + options.shard_size))
        for number, first_id in enumerate(range(0, len(write_order), options.shard_size))
        if shard_name(number) not in finished_shards
    ]
    write_tasks = [
        ShardWriteTask(
            folder, number, first_id, split.labels[write_order[samples]],
            split.make_images(write_order[samples]),
            survey_rows[samples], options.rules,
        )
        for number, first_id, samples in missing_shards
    ]  # fmt: skip
    num_missing_samples = sum(len(task.labels) for task in write_tasks)
    with make_progress_bar(f"write {split.dataset} {split.name}", len(write_order)) as advance:
        advance(len(write_order) - num_missing_samples)
        for entry in pool.run_tasks(
            write_shard,
            write_tasks,
            workers=options.workers,
            advance=advance,
            preloaded_modules=WORKER_MODULES,
        ):
            finished_shards[entry.name] = entry
    seal_split(
        split,
        folder,
        [finished_shards[name] for name in sorted(finished_shards)],
        recipe,
        side_file_contents,
    )
    return BuiltSplit(folder, read_manifest(folder), num_missing_samples, decisions.counts(), split)


def _plan_writing(
    split_job: _SplitJob, survey: SplitSurvey, decisions: SplitDecisions
) -> tuple[NDArray[np.int64], ShardingRecipe, Mapping[str, bytes]]:
    """Make the order of writing, the whole recipe, and the files beside the shards."""
    write_order = split_job.write_order[
        np.isin(split_job.write_order, decisions.used_sample_numbers)
    ]
    if not len(write_order):
        write_whole(split_job.folder / REJECTS_NAME, decisions.encode_rejects_lines())
        raise DataError(
            f"{split_job.folder}: not one image of it can be used ({REJECTS_NAME} tells why)"
        )
    survey_rows = survey.rows[np.searchsorted(survey.numbers, write_order)]
    side_file_contents = {
        INPUT_DIGESTS_NAME: encode_input_digests(survey_rows["sha256"]),
        REJECTS_NAME: rejects_to_write(split_job.folder, decisions),
    }
    recipe = split_job.recipe | {
        "content": hashlib.sha256(side_file_contents[INPUT_DIGESTS_NAME]).hexdigest(),
        "rejects": digest_rejects(side_file_contents[REJECTS_NAME]),
        **make_judged_by_entry(bool(survey_rows["pillow_only"].any())),
    }
    return write_order, recipe, side_file_contents
