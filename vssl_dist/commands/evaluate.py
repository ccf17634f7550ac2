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
from vssl_dist.console.endings import one_line
from vssl_dist.durable import keep_others_from_writing
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.run import (
    EvalSettings,
    baselines,
    evaluate,
    exports,
)
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.splits import need_posterior
from vssl_dist.evaluation.subject import Images
from vssl_dist.evaluation.tasks import TASKS as MEASURES
from vssl_dist.exports.card import Card
from vssl_dist.exports.read import read_card
from vssl_dist.exports.results import table_results
from vssl_dist.jobs import machine
from vssl_dist.jobs.evaluation_job import (
    PendingEvaluation,
    evaluate_export,
    flush_own_run,
)
from vssl_dist.jobs.resources import Device
from vssl_dist.jsonfile import first_complaint
from vssl_dist.locks import hold_lock
from vssl_dist.run_folder import RunFolder, card_of, is_export
from vssl_dist.text import printable
from vssl_dist.tracker import default_tracking_uri


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("evaluate", argv)


def tasks_of(
    card: Card, names: str, density: str | None = None, card_path: str = "the card"
) -> list[TaskConfig]:
    """Return the named tasks with the run's own settings, or with defaults where it has none.

    Args:
        card: The card of the export.
        names: Names of tasks with commas between.
        density: Density of the likelihoods in task ood, instead of the run's own.
        card_path: Where the card lies, for messages.

    Raises:
        ConfigError: A task is unknown or stands twice, no likelihood has a density, or the card
            holds no settings of tasks.
    """
    run_settings = {task.task: task.as_json() for task in card.config.evaluations}
    task_names = [name.strip() for name in names.split(",")]
    for name in task_names:
        if name not in TASKS or task_names.count(name) > 1:
            problem = "stands twice" if name in TASKS else f"is not one of {', '.join(TASKS)}"
            raise ConfigError(f"--task {names}: {name!r} {problem}")
    has_density = has_embedding_density(card)
    if density and not (has_density and "ood" in task_names):
        raise ConfigError(
            f"--density {density}: is for task ood of an export of vje with its posterior: "
            "leave it out"
        )
    settings = {name: run_settings.get(name, {"task": name}) for name in task_names}
    if density:
        settings["ood"] = settings["ood"] | {"density": density}
    try:
        tasks = [read_task(raw) for raw in settings.values()]
    except ValidationError as error:
        raise ConfigError(f"{card_path}: config.evaluations: {first_complaint(error)}") from error
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
        for name, values in baselines(export_paths[-1], task, settings)["results"].items():
            results[task.task].append((name.replace("_", " "), values))
    # All tasks of an export before the next: only the last few networks' features are cached.
    for export in export_paths:
        step = read_card(export).step
        for task in tasks:
            values = table_results(_evaluate(PendingEvaluation(export, step, task), settings))
            results[task.task].append((f"step {step}", values))
    return results


def _evaluate(pending: PendingEvaluation, settings: EvalSettings) -> dict[str, Any]:
    """Evaluate one export, with its metrics on the run's curves where the data is the run's own."""
    run = RunFolder.of_export(pending.export)
    is_writable = os.access(run.path, os.W_OK | os.X_OK)
    is_run = is_writable and run.config.exists()
    is_own_data = settings.train is None and settings.val is None and not settings.ood
    if is_run and is_own_data and not pending.is_final():
        device: Device = "cpu" if settings.device == "cpu" else "cuda"
        return evaluate_export(run.path, pending, device, settings.threads, settings.ranks)
    return evaluate(pending.export, pending.task, settings)


def settings_of(args: argparse.Namespace) -> EvalSettings:
    """Collect where to run and which folders to read.

    Raises:
        ConfigError: A ``--data`` is neither a pair nor a name with a folder, a variable in it is
            not set, or torch cannot use the GPUs.
    """
    pair: tuple[Path | None, Path | None] = (None, None)
    ood: dict[str, Path] = {}
    for data in args.data:
        name, equals, folder = data.partition("=")
        train, comma, val = data.partition(",")
        if equals and folder and "/" not in name and "," not in name:
            ood |= _ood_folder(name, _folder(data, folder))
        elif train and comma and val and pair == (None, None):
            pair = _folder(data, train), _folder(data, val)
        else:
            raise ConfigError(f"--data {data}: two folders, as TRAIN,VAL, or NAME=FOLDER")
    return EvalSettings(_device(args.device), args.threads, *pair, ood, args.ranks)


def _ood_folder(name: str, folder: Path) -> dict[str, Path]:
    try:
        return OodConfig(ood={name: folder}).ood
    except ValidationError as error:
        raise ConfigError(first_complaint(error)) from error


def _folder(data: str, text: str) -> Path:
    try:
        return Path(expanded(text)).absolute()
    except ValueError as error:
        raise ConfigError(f"--data {data}: {error}") from None


def _device(requested: Device | None) -> Device:
    import torch

    # Not whether one is available: a GPU that cannot be used is no reason to take the CPU.
    device = requested or ("cuda" if torch.cuda.device_count() else "cpu")
    machine.check(device)
    return device


def table_cells(task: str, results: Sequence[NamedResults]) -> tuple[str, list[tables.Line]]:
    """Return the title of a task's table, and its figures as text.

    Raises:
        ConfigError: They are not those of such a task: somebody else wrote the file.
    """
    measure = MEASURES[task]
    try:
        rows = [(name, measure.columns(values)) for name, values in results]
        return measure.title, [
            (printable(name), {printable(key): printable(cell) for key, cell in row.items()})
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
    keep_others_from_writing()
    with one_line(interrupted="stopped: the same command does what is missing") as ending:
        export_paths = exports(args.target)
        card = read_card(export_paths[-1])
        tasks = tasks_of(card, args.task, args.density, str(card_of(export_paths[-1])))
        settings = settings_of(args)
        if settings.ood and not any(isinstance(task, OodConfig) for task in tasks):
            raise ConfigError("--data NAME=FOLDER is for task ood: add it to --task")
        for task in tasks:  # all that is missing is said before the first of them runs
            for export in export_paths:
                need_posterior(read_card(export), task)
            Images.open(card, task, settings)
        tracking_uri = default_tracking_uri()
        with _alone(args.target):
            results = evaluate_all(tasks, settings, export_paths, args.baselines)
        for task_name, named_results in results.items():
            tables.show(*table_cells(task_name, named_results))
        # Also what an evaluation left when MLflow was out of reach.
        run_dir = RunFolder.of_export(export_paths[-1]).path
        flush_own_run(run_dir, tracking_uri, whole=not is_export(args.target))
    return ending.code


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until evaluations in the background have finished: their results are then there.

    In another user's run nothing is locked: he could not open the lock.  Nor is it where nothing
    can be written, as on an archive that is mounted for reading.
    """
    export = RunFolder(target).exports.path
    is_mine = not is_export(target) and export.stat().st_uid == os.geteuid()
    if not is_mine or not os.access(export, os.W_OK | os.X_OK):
        yield
        return
    with hold_lock(RunFolder(target).exports.evaluating_lock):
        yield
