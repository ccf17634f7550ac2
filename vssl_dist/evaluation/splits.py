"""The datasets of an evaluation, checked against each other before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from vssl_dist.config import OodConfig, TaskConfig
from vssl_dist.data.loader import refuse_unlabelled
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.posterior import posterior_method_names
from vssl_dist.exports.card import Card
from vssl_dist.exports.write import HEAD_PART

_READER_NAME = "evaluation"


def require_posterior(card: Card, task: TaskConfig) -> None:
    """Refuse a task that asks a posterior of an export without one.

    Raises:
        DataError: One line that says which methods have one.
    """
    if task.needs_posterior and HEAD_PART not in card.parts:
        raise DataError(
            f"{task.task}: run {card.run} ({card.method}, step {card.step}) exported no posterior: "
            f"{' and '.join(posterior_method_names())} have one, in exports with a "
            "head-STEP.safetensors; leave the task out"
        )


def open_nonempty_dataset(folder: Path, task: TaskConfig, timeout_s: float) -> Dataset:
    """Open a dataset and refuse one without a sample.

    Raises:
        DataError: It is empty, cannot be opened, or storage does not answer for ``timeout_s``.
    """
    dataset = open_watched(folder, timeout_s=timeout_s, who=_READER_NAME)
    check_not_empty(dataset, task)
    return dataset


def check_not_empty(dataset: Dataset, task: TaskConfig) -> None:
    """Refuse a dataset without a sample.

    Raises:
        DataError: One line that names the folder and the task.
    """
    if not dataset.samples:
        raise DataError(f"{dataset.folder}: holds no samples, {task.task} needs some")


def check_bank_and_queries(
    dataset_by_role: Mapping[str, Dataset], task: TaskConfig, timeout_s: float
) -> None:
    """Refuse a bank and queries that do not belong together.

    Args:
        dataset_by_role: Datasets by their role, ``"bank"`` and ``"queries"``; without a bank there
            is nothing to check.
        task: The task that compares them.
        timeout_s: Seconds that storage may take to answer.

    Raises:
        DataError: Their classes differ, they are the same images, some have no label, or storage
            does not answer for ``timeout_s``.
    """
    if "bank" not in dataset_by_role:
        return
    bank = dataset_by_role["bank"]
    queries = dataset_by_role["queries"]
    if bank.classes != queries.classes:
        raise DataError(
            f"{bank.folder} has {len(bank.classes)} classes, {queries.folder} "
            f"{len(queries.classes)}, or others: shard both splits from one source"
        )
    if bank.fingerprint == queries.fingerprint:
        raise DataError(
            f"{bank.folder} is bank and query: every image would find itself (task {task.task})"
        )
    for dataset, config_key in ((bank, "data.bank, or --data"), (queries, "data.val")):
        # Labels are read from shards, so that dead storage would hang here without end.
        check_labels = partial(
            refuse_unlabelled, dataset, f"task {task.task} compares labels ({config_key})"
        )
        run_with_timeout(dataset.watch, check_labels, timeout_s=timeout_s, who=_READER_NAME)


def open_ood_datasets(
    task: TaskConfig,
    folders: Mapping[str, Path],
    splits: Mapping[str, Dataset],
    timeout_s: float,
) -> dict[str, Dataset]:
    """Open what is out of distribution, by name; nothing for a task other than ``ood``.

    Args:
        task: The task, which may name folders.
        folders: Folders instead of the task's.
        splits: The run's own splits, by their role.
        timeout_s: Seconds that storage may take to answer.

    Raises:
        DataError: There is none, one is empty, or one is a split of the run.
    """
    if not isinstance(task, OodConfig):
        return {}
    folders = folders or task.ood
    if not folders:
        raise DataError(
            "ood: no dataset to tell apart: pass --data NAME=FOLDER, or name it in the config "
            "(evaluations: [{task: ood, ood: {svhn: FOLDER}}])"
        )
    datasets = {}
    for name, folder in folders.items():
        datasets[name] = open_nonempty_dataset(folder, task, timeout_s)
        check_not_own_split(name, datasets[name], splits)
    return datasets


def check_not_own_split(name: str, dataset: Dataset, splits: Mapping[str, Dataset]) -> None:
    """Refuse an out-of-distribution dataset that is one of the run's own.

    Args:
        name: What the task calls it.
        dataset: The dataset.
        splits: The run's own splits, by their role.

    Raises:
        DataError: It holds the very images of one of them, or bears its name.
    """
    if name in splits:
        raise DataError(f"ood: a dataset cannot be called {name}: that is the run's own")
    for role, split in splits.items():
        if split.fingerprint == dataset.fingerprint:
            raise DataError(
                f"{dataset.folder}: ood {name} is the {role} itself, nothing to tell apart"
            )
