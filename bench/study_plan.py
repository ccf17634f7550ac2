"""What a study file says, and the runs that follow from it."""

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
from vssl_dist.exports.results import FORMAT, read_result
from vssl_dist.jobs.evaluation_job import PendingEvaluation
from vssl_dist.methods import CONFIGS
from vssl_dist.run_folder import RunFolder

Words = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(as_tuple)]
BASE = "base point"


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
    """Overrides by the value's name in the table; none: the base point itself."""


class Elsewhere(Model):
    """Figures of the base points that other programs have left in JSON files."""

    command: str
    """What makes them."""
    rows: Annotated[dict[str, Words], Field(min_length=1)]
    """The file, then the keys in it, by the row's name: a point's, or ``raw pixels``."""


class Study(Model):
    """A study file."""

    title: str
    data: str
    """The command that makes the data."""
    about: str = ""
    """What a reader should know beside the table."""
    conclusion: str = ""
    """What the figures say, written when they were there."""
    ranks: Positive = 2
    """Of each run, on this machine."""
    seeds: Annotated[Seeds, Field(min_length=1)] = (0,)
    common: Words = ()
    """Overrides of every run."""
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
        """For people."""
        what = self.value if self.factor == BASE else f"{self.factor} {self.value}"
        return f"{self.point}, {what}, seed {self.seed}"

    @property
    def export(self) -> Path:
        """The backbone after the last step."""
        steps = self.cfg.total_steps(Dataset.open(self.cfg.data.train).samples)
        return RunFolder(self.cfg.dir).exports.backbone(steps)

    def results(self) -> dict[str, dict[str, object]] | None:
        """What each evaluation of the last export found.

        None: something is not there, torn, or what an earlier version found.
        """
        export = self.export
        step = int(export.stem.rpartition("-")[2])
        due = [PendingEvaluation(export, step, task) for task in self.cfg.tasks]
        if not all(one.done() for one in due):
            return None
        results = {one.task.task: read_result(one.result) for one in due}
        if any(result.get("format") != FORMAT for result in results.values()):
            return None
        return {task: result["results"] for task, result in results.items()}

    @property
    def density(self) -> str | None:
        """Of the likelihoods in task ood, where the method and the study have them."""
        tasks = (task for task in self.cfg.tasks if isinstance(task, OodConfig))
        judges = self.cfg.method.has_embedding_density
        return next((task.density for task in tasks), None) if judges else None


def read_study(path: Path) -> Study:
    """A study file, as strictly read as a configuration.

    Raises:
        ConfigError: One line that names the file, the key and the remedy.
    """
    study = load_block(path, Study)
    strange = sorted({*study.drawn} - {*study.columns})
    if strange:
        raise ConfigError(f"{path}: drawn: {strange[0]!r} is none of the columns")
    for factor in study.factors:
        if factor.point not in study.points:
            raise ConfigError(
                f"{path}: factors: {factor.name} starts from {factor.point!r}, which is none of "
                f"the points ({', '.join(study.points)})"
            )
    return study


def trials(study: Study, name: str, out: Path) -> list[Trial]:
    """Every run, the base points first; a value without overrides is its base point's run.

    Args:
        study: The study.
        name: Of the study, with which the names of its runs begin.
        out: Folder of its runs.

    Raises:
        ConfigError: A run's configuration is wrong, lacks an evaluation that a column needs, or
            two runs would share a folder.
    """
    planned = [*_base(study, name, out), *_changed(study, name, out)]
    seen: dict[Path, Trial] = {}
    for trial in planned:
        try:
            cfg = trial.cfg
        except ConfigError as error:
            raise ConfigError(f"{trial.label}: {error}") from error
        if other := seen.get(cfg.dir):
            raise ConfigError(f"{trial.label} and {other.label} would both be {cfg.dir}: rename")
        missing = set(study.tasks) - {task.task for task in cfg.evaluations}
        if missing:
            raise ConfigError(
                f"{trial.label}: columns need {', '.join(sorted(missing))}, which evaluations "
                "do not have"
            )
        seen[cfg.dir] = trial
    return planned


def _base(study: Study, name: str, out: Path) -> Iterator[Trial]:
    for seed in study.seeds:
        for point in study.points:
            yield _trial(study, name, out, (point, BASE, "base", seed), ())


def _changed(study: Study, name: str, out: Path) -> Iterator[Trial]:
    for factor in study.factors:
        for value, overrides in factor.values.items():
            for seed in study.seeds if overrides else ():
                place = (factor.point, factor.name, value, seed)
                yield _trial(study, name, out, place, overrides)


def _trial(
    study: Study, name: str, out: Path, place: tuple[str, str, str, int], more: Words
) -> Trial:
    point, factor, value, seed = place
    parts = [name, point, *([] if factor == BASE else [factor]), value, f"s{seed}"]
    run = re.sub(r"[^A-Za-z0-9._]+", "-", "-".join(parts)).strip("-")
    given = study.points[point]
    own = (
        config.override("name", run),
        config.override("out", literal(out)),
        config.override("seed", seed),
    )
    overrides = (*study.common, *given.overrides, *more, *own)
    return Trial(point, factor, value, seed, given.config, overrides)
