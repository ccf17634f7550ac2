"""The datasets of an evaluation, checked against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vssl_dist.config import OodConfig, TaskConfig
from vssl_dist.data.loader import check_labelled
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.posterior import variational_methods
from vssl_dist.exports.card import Card
from vssl_dist.exports.write import HEAD

_WHO = "evaluation"


def need_posterior(card: Card, task: TaskConfig) -> None:
    """Refuse a task that asks a posterior of an export without one.

    Raises:
        DataError: One line that says which methods have one.
    """
    if task.needs_posterior and HEAD not in card.parts:
        raise DataError(
            f"{task.task}: run {card.run} ({card.method}, step {card.step}) exported no posterior: "
            f"{' and '.join(variational_methods())} have one, in exports with a "
            "head-STEP.safetensors; leave the task out"
        )


def filled(folder: Path, task: TaskConfig, timeout_s: float) -> Dataset:
    """A dataset that holds something.

    Raises:
        DataError: It does not, cannot be opened, or storage does not answer for ``timeout_s``.
    """
    dataset = open_watched(folder, timeout_s=timeout_s, who=_WHO)
    check_filled(dataset, task)
    return dataset


def check_filled(dataset: Dataset, task: TaskConfig) -> None:
    """Refuse a dataset without a sample.

    Raises:
        DataError: One line that names the folder and the task.
    """
    if not dataset.samples:
        raise DataError(f"{dataset.folder}: holds no samples, {task.task} needs some")


def check_pair(parts: Mapping[str, Dataset], task: TaskConfig, timeout_s: float) -> None:
    """Refuse a bank and queries that do not belong together.

    Raises:
        DataError: Their classes differ, they are the same images, some have no label, or storage
            does not answer for ``timeout_s``.
    """
    if "bank" not in parts:
        return
    train, val = parts["bank"], parts["queries"]
    if train.classes != val.classes:
        raise DataError(
            f"{train.folder} has {len(train.classes)} classes, {val.folder} "
            f"{len(val.classes)}, or others: shard both splits from one source"
        )
    if train.fingerprint == val.fingerprint:
        raise DataError(
            f"{train.folder} is bank and query: every image would find itself (task {task.task})"
        )
    for split, key in ((train, "data.bank, or --data"), (val, "data.val")):
        check = partial(check_labelled, split, f"task {task.task} compares labels ({key})")
        run_with_timeout(split.watch, check, timeout_s=timeout_s, who=_WHO)


def ood_datasets(
    task: TaskConfig,
    elsewhere: Mapping[str, Path],
    parts: Mapping[str, Dataset],
    timeout_s: float,
) -> dict[str, Dataset]:
    """What is out of distribution, by name; nothing for a task other than ``ood``.

    Args:
        task: The task, which may name folders.
        elsewhere: Folders instead of the task's.
        parts: The run's own splits.
        timeout_s: Seconds that storage may take to answer.

    Raises:
        DataError: There is none, one is empty, or one is a split of the run.
    """
    if not isinstance(task, OodConfig):
        return {}
    folders = elsewhere or task.ood
    if not folders:
        raise DataError(
            "ood: no dataset to tell apart: pass --data NAME=FOLDER, or name it in the config "
            "(evaluations: [{task: ood, ood: {svhn: FOLDER}}])"
        )
    datasets = {}
    for name, folder in folders.items():
        datasets[name] = filled(folder, task, timeout_s)
        check_foreign(name, datasets[name], parts)
    return datasets


def check_foreign(name: str, dataset: Dataset, parts: Mapping[str, Dataset]) -> None:
    """Refuse an out-of-distribution dataset that is one of the run's own.

    Args:
        name: What the task calls it.
        dataset: The dataset.
        parts: The run's own splits, by the part they play.

    Raises:
        DataError: It holds the very images of one of them, or bears its name.
    """
    if name in parts:
        raise DataError(f"ood: a dataset cannot be called {name}: that is the run's own")
    for part, own in parts.items():
        if own.fingerprint == dataset.fingerprint:
            raise DataError(
                f"{dataset.folder}: ood {name} is the {part} itself, nothing to tell apart"
            )
