"""Evaluate the exports of a run, or one export, by hand: the same code as beside the training.

    python launch/evaluate.py runs/quickstart --baselines
    python launch/evaluate.py runs/quickstart --task knn,linear,collapse
    python launch/evaluate.py runs/cifar10_vje --task ood --data svhn=data/svhn/val
    python launch/evaluate.py runs/cifar10_vje --task ood --density cartesian
    python launch/evaluate.py runs/quickstart/export/backbone-00000600.safetensors

Results lie beside the exports and are not computed twice.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vssl_dist.cli.program import arguments as typed
from vssl_dist.config import TASKS, OodConfig, TaskConfig, read_task
from vssl_dist.config.paths import expanded
from vssl_dist.console import tables
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.durable import forbid_writing_by_others
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.run import (
    EvalSettings,
    evaluate,
    evaluate_baselines,
    list_exports,
)
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.splits import require_posterior
from vssl_dist.evaluation.subject import TaskImages
from vssl_dist.evaluation.tasks import TASKS as MEASURES
from vssl_dist.exports.card import Card
from vssl_dist.exports.read import read_card
from vssl_dist.exports.results import results_named_by_density
from vssl_dist.jobs import machine
from vssl_dist.jobs.evaluation_job import (
    PendingEvaluation,
    evaluate_export,
    flush_own_run,
)
from vssl_dist.jobs.resources import Device
from vssl_dist.jsonfile import describe_first_error
from vssl_dist.locks import hold_lock
from vssl_dist.run_folder import RunFolder, card_path_of, is_export_path
from vssl_dist.text import printable
from vssl_dist.tracker import default_tracking_uri


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("evaluate", argv)


def selected_tasks(
    card: Card, names_text: str, density: str | None = None, card_path: str = "the card"
) -> list[TaskConfig]:
    """Return the named tasks with the run's own settings, or with defaults where it has none.

    Args:
        card: The card of the export.
        names_text: Names of tasks with commas between.
        density: Density of the likelihoods in task ood, instead of the run's own.
        card_path: Where the card lies, for messages.

    Raises:
        ConfigError: A task is unknown or stands twice, no likelihood has a density, or the card
            holds no settings of tasks.
    """
    run_settings = {task.task: task.as_json() for task in card.config.evaluations}
    task_names = [name.strip() for name in names_text.split(",")]
    for name in task_names:
        if name not in TASKS or task_names.count(name) > 1:
            problem = "stands twice" if name in TASKS else f"is not one of {', '.join(TASKS)}"
            raise ConfigError(f"--task {names_text}: {name!r} {problem}")
    has_density = has_embedding_density(card)
    if density and not (has_density and "ood" in task_names):
        raise ConfigError(
            f"--density {density}: is for task ood of an export of vje with its posterior: "
            "leave it out"
        )
    task_settings = {name: run_settings.get(name, {"task": name}) for name in task_names}
    if density:
        task_settings["ood"] = task_settings["ood"] | {"density": density}
    try:
        tasks = [read_task(raw_settings) for raw_settings in task_settings.values()]
    except ValidationError as error:
        raise ConfigError(
            f"{card_path}: config.evaluations: {describe_first_error(error)}"
        ) from error
    return [task.asked_of(embedding_density=has_density) for task in tasks]


NamedResults = tuple[str, dict[str, Any]]
"""What a network is called in a table, and its results."""


def evaluate_all(
    tasks: Sequence[TaskConfig],
    settings: EvalSettings,
    export_paths: Sequence[Path],
    with_baselines: bool,
) -> dict[str, list[NamedResults]]:
    """Evaluate every export in every task; returns the results by task, in the tables' order."""
    results: dict[str, list[NamedResults]] = {task.task: [] for task in tasks}
    for task in tasks if with_baselines else ():
        for name, values in evaluate_baselines(export_paths[-1], task, settings)["results"].items():
            results[task.task].append((name.replace("_", " "), values))
    # All tasks of an export before the next: only the last few networks' features are cached.
    for export_path in export_paths:
        step = read_card(export_path).step
        for task in tasks:
            values = results_named_by_density(
                _evaluate(PendingEvaluation(export_path, step, task), settings)
            )
            results[task.task].append((f"step {step}", values))
    return results


def _evaluate(pending: PendingEvaluation, settings: EvalSettings) -> dict[str, Any]:
    """Evaluate one export, with its metrics on the run's curves where the data is the run's own."""
    run = RunFolder.of_export(pending.export)
    is_writable = os.access(run.path, os.W_OK | os.X_OK)
    has_own_curves = is_writable and run.config_path.exists()
    is_own_data = settings.train is None and settings.val is None and not settings.ood
    if has_own_curves and is_own_data and not pending.is_final():
        device: Device = "cpu" if settings.device == "cpu" else "cuda"
        return evaluate_export(run.path, pending, device, settings.threads, settings.ranks)
    return evaluate(pending.export, pending.task, settings)


def evaluation_settings(args: argparse.Namespace) -> EvalSettings:
    """Collect where to run and which folders to read.

    Raises:
        ConfigError: A ``--data`` is neither a pair nor a name with a folder, a variable in it is
            not set, or torch cannot use the GPUs.
    """
    train_and_val: tuple[Path | None, Path | None] = (None, None)
    ood_folders: dict[str, Path] = {}
    for data_option in args.data:
        name, equals, folder = data_option.partition("=")
        train, comma, val = data_option.partition(",")
        if equals and folder and "/" not in name and "," not in name:
            ood_folders |= _checked_ood_folder(name, _expanded_folder(data_option, folder))
        elif train and comma and val and train_and_val == (None, None):
            train_and_val = _expanded_folder(data_option, train), _expanded_folder(data_option, val)
        else:
            raise ConfigError(f"--data {data_option}: two folders, as TRAIN,VAL, or NAME=FOLDER")
    return EvalSettings(
        _chosen_device(args.device), args.threads, *train_and_val, ood_folders, args.ranks
    )


def _checked_ood_folder(name: str, folder: Path) -> dict[str, Path]:
    try:
        return OodConfig(ood={name: folder}).ood
    except ValidationError as error:
        raise ConfigError(describe_first_error(error)) from error


def _expanded_folder(data_option: str, folder_text: str) -> Path:
    try:
        return Path(expanded(folder_text)).absolute()
    except ValueError as error:
        raise ConfigError(f"--data {data_option}: {error}") from None


def _chosen_device(requested: Device | None) -> Device:
    import torch

    # Not whether one is available: a GPU that cannot be used is no reason to take the CPU.
    device = requested or ("cuda" if torch.cuda.device_count() else "cpu")
    machine.check_device(device)
    return device


def titled_table_rows(
    task: str, results: Sequence[NamedResults]
) -> tuple[str, list[tables.TableLine]]:
    """Return the title of a task's table, and its figures as text.

    Raises:
        ConfigError: They are not those of such a task: somebody else wrote the file.
    """
    task_measure = MEASURES[task]
    try:
        rows = [(name, task_measure.table_columns(values)) for name, values in results]
        return task_measure.table_title, [
            (
                printable(name),
                {printable(key): printable(cell) for key, cell in row.items()},
            )
            for name, row in rows
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the results of task {task} are not such as it writes ({error!r}): remove "
            f"{task}-*.json beside the exports, and evaluate again"
        ) from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, 2 after a line that says what is missing, or 130 after Ctrl-C."""
    args = arguments(argv)
    forbid_writing_by_others()
    with end_in_one_line(
        interrupted_message="stopped: the same command does what is missing"
    ) as ending:
        export_paths = list_exports(args.target)
        card = read_card(export_paths[-1])
        tasks = selected_tasks(card, args.task, args.density, str(card_path_of(export_paths[-1])))
        settings = evaluation_settings(args)
        if settings.ood and not any(isinstance(task, OodConfig) for task in tasks):
            raise ConfigError("--data NAME=FOLDER is for task ood: add it to --task")
        for task in tasks:  # all that is missing is said before the first of them runs
            for export_path in export_paths:
                require_posterior(read_card(export_path), task)
            TaskImages.open(card, task, settings)
        tracking_uri = default_tracking_uri()
        with _hold_evaluation_lock(args.target):
            results = evaluate_all(tasks, settings, export_paths, args.baselines)
        for task_name, named_results in results.items():
            tables.print_tables(*titled_table_rows(task_name, named_results))
        # Also what an evaluation left when MLflow was out of reach.
        run_dir = RunFolder.of_export(export_paths[-1]).path
        flush_own_run(run_dir, tracking_uri, names_whole_run=not is_export_path(args.target))
    return ending.exit_code


@contextmanager
def _hold_evaluation_lock(target: Path) -> Iterator[None]:
    """Wait until evaluations in the background have finished: their results are then there.

    In another user's run nothing is locked: he could not open the lock.  Nor is it where nothing
    can be written, as on an archive that is mounted for reading.
    """
    exports_folder = RunFolder(target).export_folder.path
    is_own_run = not is_export_path(target) and exports_folder.stat().st_uid == os.geteuid()
    if not is_own_run or not os.access(exports_folder, os.W_OK | os.X_OK):
        yield
        return
    with hold_lock(RunFolder(target).export_folder.evaluating_lock_path):
        yield
