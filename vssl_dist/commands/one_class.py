"""One-class anomaly detection: a training on each class alone, and one table of them all.

    python launch/one_class.py configs/one_class_cifar10_vje.yaml
    python launch/one_class.py configs/one_class_cifar10_vje.yaml --baselines \\
        name=one_class_simsiam 'method={name: simsiam, backbone: resnet10_c16}'

CONFIG is that of any run on labelled images.  Each class is normal in turn: a run of its own on
its training images, on this machine, after which the scores of task ood tell its images of
data.val from all others there.  The runs are `launch/submit.py --local` and
`launch/evaluate.py`, one after the other: the same command goes on with what is missing.
OUT/NAME/one_class.md, .json and .png grow by a class at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from vssl_dist import config
from vssl_dist.cli.places import module_name
from vssl_dist.cli.program import arguments as typed
from vssl_dist.commands.subcommand import run_command
from vssl_dist.config import OodConfig, RunConfig
from vssl_dist.config.paths import literal
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.durable import write_inside_folder
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation import one_class_table
from vssl_dist.evaluation.figures.plots import render_png
from vssl_dist.evaluation.one_class_table import OTHER_CLASSES_SPLIT, ClassResult
from vssl_dist.exports.results import read_result
from vssl_dist.installed import command_line
from vssl_dist.jsonfile import read_json
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say

if TYPE_CHECKING:
    from data_prep.subset import OccupiedFolderError, parse_class_names, write_subset
else:  # in a checkout beside this folder, in a wheel within the package
    _subset_module = import_module(module_name("data_prep.subset"))
    OccupiedFolderError = _subset_module.OccupiedFolderError
    parse_class_names = _subset_module.parse_class_names
    write_subset = _subset_module.write_subset

DEFAULT_OOD_TASK = OodConfig(pairs=1, bootstrap=0)
"""Task ood of a config that has none: with the task's defaults it would outlast the training."""


@dataclass(frozen=True)
class ClassTrial:
    """The training on one class alone."""

    name: str
    """Name of the class."""
    run_dir: Path
    """Run folder of the training."""
    data: Path
    """Folder of its splits, which are links into those of the config."""

    @property
    def seconds_file(self) -> Path:
        """The file that holds the seconds spent so far."""
        return self.data / "seconds.json"

    def seconds(self) -> float:
        """Read the seconds that the trial has taken, in all calls that were not killed."""
        if not self.seconds_file.exists():
            return 0.0
        try:
            return float(read_json(self.seconds_file))
        except (ValueError, TypeError, OverflowError) as error:
            raise ConfigError(
                f"{self.seconds_file}: holds no seconds ({error}): remove it"
            ) from error


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("one-class", argv)


def plan_trials(cfg: RunConfig, class_names: str | None) -> list[ClassTrial]:
    """Plan a trial for each class, after checks that all are possible; nothing is written.

    Args:
        cfg: The config of all classes.
        class_names: Names with commas between; None: every class of the dataset.

    Raises:
        ConfigError: There is no data.val.
        DataError: The splits do not fit, or a class is unknown.
    """
    if cfg.data.val is None:
        raise ConfigError("data.val: one-class detection needs a labelled split to test on")
    train, val = Dataset.open(cfg.data.train), Dataset.open(cfg.data.val)
    if train.classes != val.classes or len(val.classes) < 2:
        raise DataError(
            f"{cfg.data.train} and {cfg.data.val}: have {len(train.classes)} and "
            f"{len(val.classes)} classes; the same ones, two at least, are needed"
        )
    chosen_classes = parse_class_names(class_names, val.classes) if class_names else val.classes
    planned_trials = []
    for name in chosen_classes:
        # A class may be called anything, a run may not.
        folder_name = f"{val.classes.index(name):02d}-{re.sub('[^A-Za-z0-9._-]+', '-', name)}"
        run_name = f"{cfg.name[:60]}-{folder_name}"[:100]
        planned_trials.append(
            ClassTrial(name, cfg.out / run_name, cfg.out / cfg.name / folder_name)
        )
    return planned_trials


def write_class_splits(trial: ClassTrial, cfg: RunConfig) -> None:
    """Make the three splits of a class, unless they are there.

    Raises:
        ConfigError: They are there, but of other data.
        DataError: A split has no image of the class.
    """
    train, val = cfg.data.train, cfg.data.val
    assert val is not None
    other_classes = [name for name in Dataset.open(val).classes if name != trial.name]
    try:
        write_subset(train, [trial.name], trial.data / "train")
        write_subset(val, [trial.name], trial.data / "val")
        write_subset(val, other_classes, trial.data / OTHER_CLASSES_SPLIT)
    except OccupiedFolderError:
        raise ConfigError(
            f"{trial.data} is of other data ({train}, {val}): give this run another name, "
            "with name=..."
        ) from None


def ood_task(cfg: RunConfig) -> OodConfig:
    """Return task ood with the config's settings, as far as they suit its method."""
    task = next((t for t in cfg.evaluations if isinstance(t, OodConfig)), DEFAULT_OOD_TASK)
    return task.asked_of(embedding_density=cfg.method.has_embedding_density)


def result_paths(trial: ClassTrial, cfg: RunConfig) -> list[Path]:
    """List the results of one class's finished evaluations, the latest step last."""
    return list(RunFolder(trial.run_dir).export_folder.find_results(stem=ood_task(cfg).stem))


def overrides(trial: ClassTrial, cfg: RunConfig) -> list[str]:
    """Return the overrides that make the config that of one class; task ood keeps its settings."""
    task = ood_task(cfg)
    ood_changes = {
        "ood": {OTHER_CLASSES_SPLIT: literal(trial.data / OTHER_CLASSES_SPLIT)},
        "every_epochs": cfg.optim.epochs,
    }
    ood_values = task.model_dump(mode="json") | ood_changes
    values: dict[str, object] = {
        "name": trial.run_dir.name,
        "data.train": literal(trial.data / "train"),
        "data.val": literal(trial.data / "val"),
        "data.bank": None,
        "evaluations": [ood_values],
    }
    return [config.override(key, value) for key, value in values.items()]


def finish_trial(trial: ClassTrial, cfg: RunConfig, args: argparse.Namespace) -> int:
    """Do what is missing of one class's training and evaluation.

    Returns:
        The exit code of the first command that failed, else 0.
    """
    start = time.monotonic()
    was_finished = bool(result_paths(trial, cfg))
    command_words = [literal(args.config), *args.overrides, *overrides(trial, cfg)]
    exit_code = run_command("submit", f"--local={args.ranks}", *command_words)
    if exit_code == 0:
        command_words = [literal(trial.run_dir), "--task", "ood"] + ["--baselines"] * args.baselines
        if cfg.method.has_embedding_density:  # a run that is there may have been begun with another
            command_words += ["--density", ood_task(cfg).density]
        exit_code = run_command("evaluate", *command_words)
    if not was_finished:  # a repetition only reads what is there
        seconds = trial.seconds() + time.monotonic() - start
        write_inside_folder(trial.seconds_file, json.dumps(round(seconds, 1)).encode())
    return exit_code


def read_class_result(trial: ClassTrial, cfg: RunConfig, with_baselines: bool) -> ClassResult:
    """Read the results of a finished class.

    Raises:
        ConfigError: One line: one of them is damaged.
    """
    path = result_paths(trial, cfg)[-1]
    baseline_results = {}
    try:
        result = read_result(path)
        if with_baselines:
            path = RunFolder(trial.run_dir).export_folder.baselines_path("ood")
            baseline_results = read_json(path)["results"]
        class_result = ClassResult(trial.name, result, baseline_results, trial.seconds())
        for scores in (
            class_result.auroc_by_score(),
            *map(class_result.auroc_by_score, baseline_results),
        ):
            one_class_table.mean_auroc([scores])
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is no result of task ood ({error!r}): remove it") from error
    return class_result


def write_report(
    cfg: RunConfig, class_results: Sequence[ClassResult], command: str, num_classes: int
) -> str:
    """Write the table of the classes so far as Markdown, JSON and picture; returns the table.

    Args:
        cfg: The config of all classes.
        class_results: The finished classes.
        command: What the user typed, for the footnote.
        num_classes: How many there will be.
    """
    method = cfg.method.name
    steps = sorted({trial.ood_result["step"] for trial in class_results})
    seconds = [trial.total_s for trial in class_results]
    first_result = class_results[0].ood_result
    num_tested = (
        first_result["queries"]["samples"] + first_result["ood"][OTHER_CLASSES_SPLIT]["samples"]
    )
    footnote = (
        f"{len(class_results)} of {num_classes} classes; {first_result['bank']['samples']} "
        f"training images and {steps[-1]} steps each, tested on {num_tested} images; "
        f"{max(seconds):.0f} s at most and "
        f"{sum(seconds):.0f} s in all, evaluation included\n\n    {command}"
    )
    table = one_class_table.markdown_table(method, class_results, footnote)
    json_facts = {
        "name": cfg.name,
        "command": command,
        "config": cfg.model_dump(mode="json"),
        "complete": len(class_results) == num_classes,
        "mean_auroc": one_class_table.mean_auroc_by_network(method, class_results),
        "classes": {
            trial.class_name: trial.ood_result
            | {"baselines": trial.baseline_results, "seconds_in_all": trial.total_s}
            for trial in class_results
        },
    }
    report_path = cfg.out / cfg.name / "one_class"
    write_inside_folder(report_path.with_suffix(".json"), json.dumps(json_facts, indent=1).encode())
    write_inside_folder(
        report_path.with_suffix(".png"),
        render_png(one_class_table.draw_auroc_bars(method, class_results)),
    )
    write_inside_folder(report_path.with_suffix(".md"), table.encode())
    return table


def run_all_classes(args: argparse.Namespace, command: str) -> int:
    """Train and evaluate all classes, one after the other; returns the exit code."""
    cfg = config.load(args.config, args.overrides, methods=CONFIGS)
    planned_trials = plan_trials(cfg, args.classes)
    for trial in planned_trials:
        write_class_splits(trial, cfg)
    class_results: list[ClassResult] = []
    table = ""
    for number, trial in enumerate(planned_trials):
        say(f"== class {number + 1} of {len(planned_trials)}: {trial.name}")
        if code := finish_trial(trial, cfg, args):
            say(f"{trial.name} is not finished: the same command goes on", to_stderr=True)
            return code
        class_results.append(read_class_result(trial, cfg, args.baselines))
        table = write_report(cfg, class_results, command, len(planned_trials))
    say("", *table.split("\n"), f"{cfg.out / cfg.name}/one_class.md, .json and .png")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, 2 (refused), 130 (Ctrl-C) or the code of a run that failed."""
    args = arguments(argv)
    with end_in_one_line() as ending:
        ending.exit_code = run_all_classes(
            args, f"{command_line('launch/one_class.py')} {shlex.join(argv)}"
        )
    return ending.exit_code
