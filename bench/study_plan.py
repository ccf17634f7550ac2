"""The schema of a study file, and the runs that follow from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from vssl_dist import config
from vssl_dist.config import Model, OodConfig, RunConfig, load_block
from vssl_dist.config.fields import FilePath, Positive, as_tuple
from vssl_dist.config.paths import literal
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import ConfigError
from vssl_dist.exports.results import RESULT_FORMAT, read_result
from vssl_dist.jobs.evaluation_job import PendingEvaluation
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder

Words = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)]
BASE_POINT = "base point"


class Point(Model):
    """A configuration from which one factor at a time is changed."""

    config: FilePath
    overrides: Words = ()
    """``dotted.key=value``, after the study's ``common`` ones."""


class Factor(Model):
    """One thing that is changed, and to what."""

    name: str
    point: str
    values: Annotated[dict[str, Words], Field(min_length=1)]
    """Overrides by the value's name in the table; a value without any is the base point."""


class Elsewhere(Model):
    """Figures of the base points that other programs have left in JSON files."""

    command: str
    """The command that makes the files."""
    rows: Annotated[dict[str, Words], Field(min_length=1)]
    """The file, then the keys in it, by the row's name: a point's, or ``raw pixels``."""


class Study(Model):
    """A study file: the runs, the columns of their tables, and the words around them."""

    title: str
    data: str
    """The command that makes the data."""
    about: str = ""
    """What a reader should know beside the table."""
    conclusion: str = ""
    """What the figures say, written when they were there."""
    ranks: Positive = 2
    """Processes of each run, on this machine."""
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    common: Words = ()
    """Overrides that every run has."""
    columns: Annotated[dict[str, Words], Field(min_length=1)]
    """Where a figure lies in a result: the task, then the keys; a name with % is shown times
    100."""
    elsewhere: dict[str, Elsewhere] = Field(default_factory=dict)
    """More columns of the base points' table."""
    drawn: Words = ()
    """Columns in the picture; none: all with a %."""
    points: Annotated[dict[str, Point], Field(min_length=1)]
    factors: Annotated[tuple[Factor, ...], BeforeValidator(as_tuple)] = ()

    @property
    def tasks(self) -> list[str]:
        """The evaluation tasks that the columns need."""
        return sorted({path[0] for path in self.columns.values()})


@dataclass(frozen=True)
class Trial:
    """One run of a study."""

    point: str
    factor: str
    value: str
    seed: int
    config: Path
    overrides: tuple[str, ...]

    @cached_property
    def cfg(self) -> RunConfig:
        """The run's configuration; a wrong one is a ``ConfigError``."""
        return config.load(self.config, self.overrides, methods=CONFIGS)

    @property
    def label(self) -> str:
        """Name of the run in messages: point, factor, value and seed."""
        setting = self.value if self.factor == BASE_POINT else f"{self.factor} {self.value}"
        return f"{self.point}, {setting}, seed {self.seed}"

    @property
    def export(self) -> Path:
        """Path of the backbone after the last step."""
        steps = self.cfg.total_steps(Dataset.open(self.cfg.data.train).samples)
        return RunFolder(self.cfg.dir).export_folder.backbone_path(steps)

    def results(self) -> dict[str, dict[str, object]] | None:
        """Read the results of each evaluation of the last export, by task.

        None: something is not there, torn, or the result of an earlier version.
        """
        export = self.export
        step = int(export.stem.rpartition("-")[2])
        evaluations = [PendingEvaluation(export, step, task) for task in self.cfg.tasks]
        if not all(evaluation.is_done() for evaluation in evaluations):
            return None
        results = {
            evaluation.task.task: read_result(evaluation.result_path) for evaluation in evaluations
        }
        if any(result.get("format") != RESULT_FORMAT for result in results.values()):
            return None
        return {task: result["results"] for task, result in results.items()}

    @property
    def density(self) -> str | None:
        """Density of the likelihoods in task ood, where the method and the study have them."""
        if not self.cfg.method.has_embedding_density:
            return None
        ood_tasks = (task for task in self.cfg.tasks if isinstance(task, OodConfig))
        return next((task.density for task in ood_tasks), None)


def read_study(path: Path) -> Study:
    """Read a study file, as strictly as a configuration.

    Raises:
        ConfigError: One line that names the file, the key and the remedy.
    """
    study = load_block(path, Study)
    unknown_columns = sorted({*study.drawn} - {*study.columns})
    if unknown_columns:
        raise ConfigError(f"{path}: drawn: {unknown_columns[0]!r} is none of the columns")
    for factor in study.factors:
        if factor.point not in study.points:
            raise ConfigError(
                f"{path}: factors: {factor.name} starts from {factor.point!r}, which is none of "
                f"the points ({', '.join(study.points)})"
            )
    return study


def plan_trials(study: Study, name: str, out: Path) -> list[Trial]:
    """Plan every run, the base points first; a value without overrides is its base point's run.

    Args:
        study: The study.
        name: Name of the study, with which those of its runs begin.
        out: Folder of its runs.

    Raises:
        ConfigError: A run's configuration is wrong, lacks an evaluation that a column needs, or
            two runs would share a folder.
    """
    planned = [*_base_trials(study, name, out), *_factor_trials(study, name, out)]
    trial_by_folder: dict[Path, Trial] = {}
    for trial in planned:
        try:
            cfg = trial.cfg
        except ConfigError as error:
            raise ConfigError(f"{trial.label}: {error}") from error
        if other_trial := trial_by_folder.get(cfg.dir):
            raise ConfigError(
                f"{trial.label} and {other_trial.label} would both be {cfg.dir}: rename"
            )
        missing_tasks = set(study.tasks) - {task.task for task in cfg.evaluations}
        if missing_tasks:
            raise ConfigError(
                f"{trial.label}: columns need {', '.join(sorted(missing_tasks))}, which "
                "evaluations "
                "do not have"
            )
        trial_by_folder[cfg.dir] = trial
    return planned


def _base_trials(study: Study, name: str, out: Path) -> Iterator[Trial]:
    for seed in study.seeds:
        for point in study.points:
            yield _trial(study, name, out, (point, BASE_POINT, "base", seed), ())


def _factor_trials(study: Study, name: str, out: Path) -> Iterator[Trial]:
    for factor in study.factors:
        for value, overrides in factor.values.items():
            for seed in study.seeds if overrides else ():
                setting = (factor.point, factor.name, value, seed)
                yield _trial(study, name, out, setting, overrides)


def _trial(
    study: Study,
    name: str,
    out: Path,
    setting: tuple[str, str, str, int],
    factor_overrides: Words,
) -> Trial:
    point, factor, value, seed = setting
    words = [name, point, *([] if factor == BASE_POINT else [factor]), value, f"s{seed}"]
    run_name = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(words)).strip("-")
    base_point = study.points[point]
    run_overrides = (
        config.override("name", run_name),
        config.override("out", literal(out)),
        config.override("seed", seed),
    )
    # Later ones win: a factor over its point, and nothing over the run's own name.
    overrides = (*study.common, *base_point.overrides, *factor_overrides, *run_overrides)
    return Trial(point, factor, value, seed, base_point.config, overrides)
