"""Results as they lie on disk, also those of earlier versions, under the names of today.

A figure's name says what was measured.  VJE's likelihoods depend on the density that they are of
(`evaluation.scores.variational`): a result of task ``ood`` says which, curves and tables name it,
and a result from before it was said is ``cartesian``, which was the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vssl_dist.curves import current_collapse_figure, current_curve
from vssl_dist.exports.card import Card
from vssl_dist.jsonfile import Line, Step, first_complaint, read_json
from vssl_dist.run_folder import card_of

FORMAT = 5
"""Of the results; those of another format are found again when they are asked for."""
LIKELIHOODS = (
    "s1_self_likelihood",
    "s2_cross_view_likelihood",
    "s3_negative_elbo",
    "s5_bank_likelihood",
)
"""The scores of task ``ood`` that depend on the density, where a method has one."""
_DENSITY_STATED = 5
"""The format since when VJE's results say their density."""


class _Task(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    task: Line


class _Result(BaseModel):
    """What every reader of a result relies on."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int = 0
    step: Step = 0
    task: _Task | None = None
    density: Literal["polar", "cartesian"] | None = None
    metrics: dict[Line, float] = {}
    results: dict[Line, Any] = {}
    plots: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]] = []
    substituted_images: int = 0


def read_result(path: Path) -> dict[str, Any]:
    """A result of an export, with ``density`` where its scores depend on one.

    Raises:
        OSError, ValueError: It, or the card of its export, cannot be read or is none.
    """
    result: dict[str, Any] = read_json(path)
    if problem := problem_of(result):
        raise ValueError(problem)
    if result.get("task") is None:
        return result
    result = with_current_names(result)
    if result.get("format", 0) >= _DENSITY_STATED:
        return result
    task, metrics = result["task"], result.get("metrics", {}).items()
    if task["task"] == "ood" and _method(path, result) == "vje":
        density = task.get("density", "cartesian")
        result["metrics"] = {score_name(key, density): value for key, value in metrics}
        result["density"] = density
    return result


def with_current_names(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result, or one of baselines, whose figures have the names of today.

    >>> task = {"task": "collapse"}
    >>> with_current_names({"task": task, "results": {"rankme_centred": 2.0}})["results"]
    {'effective_rank_centred': 2.0}
    """
    renamed = dict(result)
    if renamed["task"]["task"] != "collapse":
        return renamed
    if "results" in renamed:
        figures = renamed["results"].items()
        # Those of baselines lie one level deeper, by the network.
        named = {k: _renamed(v) if isinstance(v, dict) else v for k, v in figures}
        renamed["results"] = _renamed(named)
    if "metrics" in renamed:
        metrics = renamed["metrics"].items()
        renamed["metrics"] = {current_curve(k, of_training=False): v for k, v in metrics}
    return renamed


def _renamed(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {current_collapse_figure(name): value for name, value in figures.items()}


def problem_of(result: object) -> str | None:
    """Why this is no result, in one line; None: it is one."""
    try:
        _Result.model_validate(result)
    except ValidationError as error:
        return f"no result of an evaluation: {first_complaint(error)}"
    return None


def score_name(name: str, density: str | None) -> str:
    """What a score, or a curve of it, is called where several densities may stand side by side.

    >>> score_name("ood/auroc_svhn_s1_self_likelihood", "polar")
    'ood/auroc_svhn_s1_self_likelihood_polar'
    >>> score_name("knn", "polar"), score_name("s1_self_likelihood", None)
    ('knn', 's1_self_likelihood')
    """
    return f"{name}_{density}" if density and name.endswith(LIKELIHOODS) else name


def shown(result: Mapping[str, Any]) -> dict[str, Any]:
    """The ``results`` of a result as tables name them: likelihoods by their density."""
    density = result.get("density")
    if density is None:
        return dict(result["results"])
    return {
        part: {score_name(score, density): found for score, found in by_score.items()}
        for part, by_score in result["results"].items()
    }


def _method(path: Path, result: Mapping[str, Any]) -> str | None:
    """Of the export that a result is of; results did not say it."""
    card = card_of(path.with_name(str(result.get("export", ""))))
    try:
        return Card.read(card).method
    except OSError:
        return None
