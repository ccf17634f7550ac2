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
from vssl_dist.exports.results import shown
from vssl_dist.jobs import machine
from vssl_dist.jobs.evaluation_job import (
    PendingEvaluation,
    evaluate_one,
    send_unasked,
)
from vssl_dist.jobs.evaluation_queue import lock_path
from vssl_dist.jobs.resources import Device
from vssl_dist.jsonfile import first_complaint
from vssl_dist.locks import held
from vssl_dist.run_folder import RunFolder, card_of, is_export
from vssl_dist.text import printable
from vssl_dist.tracker import default_tracking_uri


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the user typed; what is wrong with it ends the program with 2."""
    return typed("evaluate", argv)


def tasks_of(
    card: Card, names: str, density: str | None = None, where: str = "the card"
) -> list[TaskConfig]:
    """The run's own settings of the named tasks, or the tasks' defaults.

    Args:
        card: Of the export.
        names: With commas between.
        density: Of the likelihoods in task ood, instead of the run's own.
        where: The card lies, for the message.

    Raises:
        ConfigError: A name is none of a task, or stands twice; no likelihood has a density; or the
            run's settings are none.
    """
    own = {task.task: task.as_json() for task in card.config.evaluations}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in TASKS or wanted.count(name) > 1:
            problem = "stands twice" if name in TASKS else f"is not one of {', '.join(TASKS)}"
            raise ConfigError(f"--task {names}: {name!r} {problem}")
    likelihoods = has_embedding_density(card)
    if density and not (likelihoods and "ood" in wanted):
        raise ConfigError(
            f"--density {density}: is for task ood of an export of vje with its posterior: "
            "leave it out"
        )
    settings = {name: own.get(name, {"task": name}) for name in wanted}
    if density:
        settings["ood"] = settings["ood"] | {"density": density}
    try:
        tasks = [read_task(raw) for raw in settings.values()]
    except ValidationError as error:
        raise ConfigError(f"{where}: config.evaluations: {first_complaint(error)}") from error
    return [task.asked_of(embedding_density=likelihoods) for task in tasks]


Line = tuple[str, dict[str, Any]]


def lines(
    tasks: Sequence[TaskConfig], place: EvalSettings, found: Sequence[Path], with_baselines: bool
) -> dict[str, list[Line]]:
    """Name and results of each line of each task's table.

    One export after the other, because only the last few networks' features are kept.
    """
    made: dict[str, list[Line]] = {task.task: [] for task in tasks}
    for task in tasks if with_baselines else ():
        for name, results in baselines(found[-1], task, place)["results"].items():
            made[task.task].append((name.replace("_", " "), results))
    for export in found:
        step = read_card(export).step
        for task in tasks:
            results = shown(_evaluated(PendingEvaluation(export, step, task), place))
            made[task.task].append((f"step {step}", results))
    return made


def _evaluated(one: PendingEvaluation, place: EvalSettings) -> dict[str, Any]:
    run = RunFolder.of_export(one.export)
    own = place.train is None and place.val is None and not place.ood
    kept = os.access(run.path, os.W_OK | os.X_OK)
    if kept and run.config.exists() and own and not one.final():
        device: Device = "cpu" if place.device == "cpu" else "cuda"
        # Onto the run's curve, too.
        return evaluate_one(run.path, one, device, place.threads, place.ranks)
    return evaluate(one.export, one.task, place)


def place_of(args: argparse.Namespace) -> EvalSettings:
    """Where to run and which folders to read.

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
            ood |= _foreign(name, _folder(data, folder))
        elif train and comma and val and pair == (None, None):
            pair = _folder(data, train), _folder(data, val)
        else:
            raise ConfigError(f"--data {data}: two folders, as TRAIN,VAL, or NAME=FOLDER")
    return EvalSettings(_device(args.device), args.threads, *pair, ood, args.ranks)


def _foreign(name: str, folder: Path) -> dict[str, Path]:
    try:
        return OodConfig(ood={name: folder}).ood
    except ValidationError as error:
        raise ConfigError(first_complaint(error)) from error


def _folder(data: str, text: str) -> Path:
    try:
        return Path(expanded(text)).absolute()
    except ValueError as error:
        raise ConfigError(f"--data {data}: {error}") from None


def _device(wanted: Device | None) -> Device:
    import torch

    # Not whether one is available: a GPU that cannot be used is no reason to take the CPU.
    device = wanted or ("cuda" if torch.cuda.device_count() else "cpu")
    machine.check(device)
    return device


def cells(task: str, results: Sequence[Line]) -> tuple[str, list[tables.Line]]:
    """What a task's table is called, and its figures as text.

    Raises:
        ConfigError: They are not those of such a task: somebody else wrote the file.
    """
    kind = MEASURES[task]
    try:
        rows = [(name, kind.columns(found)) for name, found in results]
        return kind.title, [
            (printable(name), {printable(key): printable(cell) for key, cell in row.items()})
            for name, row in rows
        ]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the results of task {task} are not such as it writes ({error!r}): remove "
            f"{task}-*.json beside the exports, and evaluate again"
        ) from error


def main(argv: Sequence[str]) -> int:
    """Exit code 0, 2 with one line that says what is missing, or 130 after Ctrl-C."""
    args = arguments(argv)
    keep_others_from_writing()
    with one_line(interrupted="stopped: the same command does what is missing") as ending:
        found = exports(args.target)
        card, where = read_card(found[-1]), str(card_of(found[-1]))
        tasks, place = tasks_of(card, args.task, args.density, where), place_of(args)
        if place.ood and not any(isinstance(task, OodConfig) for task in tasks):
            raise ConfigError("--data NAME=FOLDER is for task ood: add it to --task")
        for task in tasks:  # all that is missing is said before the first of them runs
            for export in found:
                need_posterior(read_card(export), task)
            Images.open(card, task, place)
        address = default_tracking_uri()
        with _alone(args.target):
            made = lines(tasks, place, found, args.baselines)
        for name, results in made.items():
            tables.show(*cells(name, results))
        # Also what an evaluation left when MLflow was out of reach.
        send_unasked(RunFolder.of_export(found[-1]).path, address, whole=not is_export(args.target))
    return ending.code


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let the evaluations in the background finish: their results are then there already.

    In another user's run nothing is locked: he could not open the lock.  Nor is it where nothing
    can be written, as on an archive that is mounted for reading.
    """
    export = RunFolder(target).exports.path
    is_mine = not is_export(target) and export.stat().st_uid == os.geteuid()
    if not is_mine or not os.access(export, os.W_OK | os.X_OK):
        yield
        return
    with held(lock_path(target)):
        yield
