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
from vssl_dist.commands.subcommand import call
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
from vssl_dist.text import print_printable

if TYPE_CHECKING:
    from data_prep.subset import OccupiedFolderError, parse_class_names, write_subset
else:  # in a checkout beside this folder, in a wheel within the package
    _subset = import_module(module_name("data_prep.subset"))
    OccupiedFolderError = _subset.OccupiedFolderError
    parse_class_names = _subset.parse_class_names
    write_subset = _subset.write_subset

QUICK = OodConfig(pairs=1, bootstrap=0)
"""Task ood of a config that has none: with the task's defaults it would outlast the training."""


@dataclass(frozen=True)
class Trial:
    """The training on one class alone."""

    name: str
    """Name of the class."""
    run: Path
    """Run folder of the training."""
    data: Path
    """Folder of its splits, which are links into those of the config."""

    @property
    def clock(self) -> Path:
        """The file that holds the seconds spent so far."""
        return self.data / "seconds.json"

    def seconds(self) -> float:
        """Read the seconds that the trial has taken, in all calls that were not killed."""
        if not self.clock.exists():
            return 0.0
        try:
            return float(read_json(self.clock))
        except (ValueError, TypeError, OverflowError) as error:
            raise ConfigError(f"{self.clock}: holds no seconds ({error}): remove it") from error


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("one-class", argv)


def trials(cfg: RunConfig, class_names: str | None) -> list[Trial]:
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
    names = parse_class_names(class_names, val.classes) if class_names else val.classes
    planned = []
    for name in names:
        # A class may be called anything, a run may not.
        slug = f"{val.classes.index(name):02d}-{re.sub('[^A-Za-z0-9._-]+', '-', name)}"
        run = f"{cfg.name[:60]}-{slug}"[:100]
        planned.append(Trial(name, cfg.out / run, cfg.out / cfg.name / slug))
    return planned


def prepare(trial: Trial, cfg: RunConfig) -> None:
    """Make the three splits of a class, unless they are there.

    Raises:
        ConfigError: They are there, but of other data.
        DataError: A split has no image of the class.
    """
    train, val = cfg.data.train, cfg.data.val
    assert val is not None
    others = [name for name in Dataset.open(val).classes if name != trial.name]
    try:
        write_subset(train, [trial.name], trial.data / "train")
        write_subset(val, [trial.name], trial.data / "val")
        write_subset(val, others, trial.data / OTHER_CLASSES_SPLIT)
    except OccupiedFolderError:
        raise ConfigError(
            f"{trial.data} is of other data ({train}, {val}): give this run another name, "
            "with name=..."
        ) from None


def task_of(cfg: RunConfig) -> OodConfig:
    """Return task ood with the config's settings, as far as they suit its method."""
    task = next((t for t in cfg.evaluations if isinstance(t, OodConfig)), QUICK)
    return task.asked_of(embedding_density=cfg.method.has_embedding_density)


def result_paths(trial: Trial, cfg: RunConfig) -> list[Path]:
    """List the results of one class's finished evaluations, the latest step last."""
    return list(RunFolder(trial.run).export_folder.find_results(stem=task_of(cfg).stem))


def overrides(trial: Trial, cfg: RunConfig) -> list[str]:
    """Return the overrides that make the config that of one class; task ood keeps its settings."""
    task = task_of(cfg)
    changes = {
        "ood": {OTHER_CLASSES_SPLIT: literal(trial.data / OTHER_CLASSES_SPLIT)},
        "every_epochs": cfg.optim.epochs,
    }
    ood_task = task.model_dump(mode="json") | changes
    values: dict[str, object] = {
        "name": trial.run.name,
        "data.train": literal(trial.data / "train"),
        "data.val": literal(trial.data / "val"),
        "data.bank": None,
        "evaluations": [ood_task],
    }
    return [config.override(key, value) for key, value in values.items()]


def finish(trial: Trial, cfg: RunConfig, args: argparse.Namespace) -> int:
    """Do what is missing of one class's training and evaluation.

    Returns:
        The exit code of the first command that failed, else 0.
    """
    start = time.monotonic()
    was_finished = bool(result_paths(trial, cfg))
    words = [literal(args.config), *args.overrides, *overrides(trial, cfg)]
    code = call("submit", f"--local={args.ranks}", *words)
    if code == 0:
        words = [literal(trial.run), "--task", "ood"] + ["--baselines"] * args.baselines
        if cfg.method.has_embedding_density:  # a run that is there may have been begun with another
            words += ["--density", task_of(cfg).density]
        code = call("evaluate", *words)
    if not was_finished:  # a repetition only reads what is there
        seconds = trial.seconds() + time.monotonic() - start
        write_inside_folder(trial.clock, json.dumps(round(seconds, 1)).encode())
    return code


def collect(trial: Trial, cfg: RunConfig, with_baselines: bool) -> ClassResult:
    """Read the results of a finished class.

    Raises:
        ConfigError: One line: one of them is damaged.
    """
    path = result_paths(trial, cfg)[-1]
    baselines = {}
    try:
        result = read_result(path)
        if with_baselines:
            path = RunFolder(trial.run).export_folder.baselines_path("ood")
            baselines = read_json(path)["results"]
        trained = ClassResult(trial.name, result, baselines, trial.seconds())
        for scores in (trained.auroc_by_score(), *map(trained.auroc_by_score, baselines)):
            one_class_table.mean_auroc([scores])
    except ConfigError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is no result of task ood ({error!r}): remove it") from error
    return trained


def report(cfg: RunConfig, trained: Sequence[ClassResult], command: str, classes: int) -> str:
    """Write the table of the classes so far as Markdown, JSON and picture; returns the table.

    Args:
        cfg: The config of all classes.
        trained: The finished classes.
        command: What the user typed, for the footnote.
        classes: How many there will be.
    """
    method = cfg.method.name
    steps = sorted({trial.ood_result["step"] for trial in trained})
    seconds = [trial.total_s for trial in trained]
    first = trained[0].ood_result
    tested = first["queries"]["samples"] + first["ood"][OTHER_CLASSES_SPLIT]["samples"]
    footnote = (
        f"{len(trained)} of {classes} classes; {first['bank']['samples']} training images and "
        f"{steps[-1]} steps each, tested on {tested} images; {max(seconds):.0f} s at most and "
        f"{sum(seconds):.0f} s in all, evaluation included\n\n    {command}"
    )
    table = one_class_table.markdown_table(method, trained, footnote)
    facts = {
        "name": cfg.name,
        "command": command,
        "config": cfg.model_dump(mode="json"),
        "complete": len(trained) == classes,
        "mean_auroc": one_class_table.mean_auroc_by_network(method, trained),
        "classes": {
            trial.class_name: trial.ood_result
            | {"baselines": trial.baseline_results, "seconds_in_all": trial.total_s}
            for trial in trained
        },
    }
    path = cfg.out / cfg.name / "one_class"
    write_inside_folder(path.with_suffix(".json"), json.dumps(facts, indent=1).encode())
    write_inside_folder(
        path.with_suffix(".png"), render_png(one_class_table.draw_auroc_bars(method, trained))
    )
    write_inside_folder(path.with_suffix(".md"), table.encode())
    return table


def run(args: argparse.Namespace, command: str) -> int:
    """Train and evaluate all classes, one after the other; returns the exit code."""
    cfg = config.load(args.config, args.overrides, methods=CONFIGS)
    planned = trials(cfg, args.classes)
    for trial in planned:
        prepare(trial, cfg)
    trained: list[ClassResult] = []
    table = ""
    for number, trial in enumerate(planned):
        print_printable(f"== class {number + 1} of {len(planned)}: {trial.name}")
        if code := finish(trial, cfg, args):
            print_printable(
                f"{trial.name} is not finished: the same command goes on", to_stderr=True
            )
            return code
        trained.append(collect(trial, cfg, args.baselines))
        table = report(cfg, trained, command, len(planned))
    print_printable("", *table.split("\n"), f"{cfg.out / cfg.name}/one_class.md, .json and .png")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, 2 (refused), 130 (Ctrl-C) or the code of a run that failed."""
    args = arguments(argv)
    with end_in_one_line() as ending:
        ending.exit_code = run(args, f"{command_line('launch/one_class.py')} {shlex.join(argv)}")
    return ending.exit_code
