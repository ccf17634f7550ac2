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
from vssl_dist.jsonfile import OneLineText, StepNumber, describe_first_error, read_json
from vssl_dist.run_folder import card_path_of

RESULT_FORMAT = 5
"""Format of results; a result of another format is computed again when it is asked for."""
LIKELIHOOD_SCORES = (
    "s1_self_likelihood",
    "s2_cross_view_likelihood",
    "s3_negative_elbo",
    "s5_bank_likelihood",
)
"""The scores of task ``ood`` that depend on the density, where a method has one."""
_FIRST_FORMAT_WITH_DENSITY = 5
"""The format since when VJE's results say their density."""


class _ResultTask(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    task: OneLineText


class _ResultKeys(BaseModel):
    """The keys of a result that every reader relies on."""

    model_config = ConfigDict(strict=True, extra="allow")

    format: int = 0
    step: StepNumber = 0
    task: _ResultTask | None = None
    density: Literal["polar", "cartesian"] | None = None
    metrics: dict[OneLineText, float] = {}
    results: dict[OneLineText, Any] = {}
    plots: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,254}$")]] = []
    substituted_images: int = 0


def read_result(path: Path) -> dict[str, Any]:
    """Read a result of an export, with ``density`` where its scores depend on one.

    Raises:
        OSError, ValueError: It, or the card of its export, cannot be read or is none.
    """
    result: dict[str, Any] = read_json(path)
    if result_problem := describe_result_problem(result):
        raise ValueError(result_problem)
    if result.get("task") is None:
        return result
    result = with_current_names(result)
    if result.get("format", 0) >= _FIRST_FORMAT_WITH_DENSITY:
        return result
    task, metrics = result["task"], result.get("metrics", {}).items()
    if task["task"] == "ood" and _method_of_result(path, result) == "vje":
        density = task.get("density", "cartesian")
        result["metrics"] = {score_name_with_density(key, density): value for key, value in metrics}
        result["density"] = density
    return result


def with_current_names(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result, or baselines, with figures under their current names.

    >>> task = {"task": "collapse"}
    >>> with_current_names({"task": task, "results": {"rankme_centred": 2.0}})["results"]
    {'effective_rank_centred': 2.0}
    """
    renamed_result = dict(result)
    if renamed_result["task"]["task"] != "collapse":
        return renamed_result
    if "results" in renamed_result:
        figures = renamed_result["results"].items()
        # Those of baselines lie one level deeper, by the network.
        results_by_name = {
            name: _with_current_collapse_names(value) if isinstance(value, dict) else value
            for name, value in figures
        }
        renamed_result["results"] = _with_current_collapse_names(results_by_name)
    if "metrics" in renamed_result:
        metrics = renamed_result["metrics"].items()
        renamed_result["metrics"] = {
            current_curve(name, of_training=False): value for name, value in metrics
        }
    return renamed_result


def _with_current_collapse_names(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {current_collapse_figure(name): value for name, value in figures.items()}


def describe_result_problem(result: object) -> str | None:
    """Say in one line why a value is no result, or return None if it is one."""
    try:
        _ResultKeys.model_validate(result)
    except ValidationError as error:
        return f"no result of an evaluation: {describe_first_error(error)}"
    return None


def score_name_with_density(name: str, density: str | None) -> str:
    """Name a score, or a curve of it, so that several densities can stand side by side.

    >>> score_name_with_density("ood/auroc_svhn_s1_self_likelihood", "polar")
    'ood/auroc_svhn_s1_self_likelihood_polar'
    >>> score_name_with_density("knn", "polar")
    'knn'
    >>> score_name_with_density("s1_self_likelihood", None)
    's1_self_likelihood'
    """
    return f"{name}_{density}" if density and name.endswith(LIKELIHOOD_SCORES) else name


def results_named_by_density(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``results`` of a result with likelihoods named by their density."""
    density = result.get("density")
    if density is None:
        return dict(result["results"])
    return {
        split: {
            score_name_with_density(score, density): value
            for score, value in figures_by_score.items()
        }
        for split, figures_by_score in result["results"].items()
    }


def _method_of_result(path: Path, result: Mapping[str, Any]) -> str | None:
    """Return the method of a result's export, which results of earlier versions do not state."""
    card_path = card_path_of(path.with_name(str(result.get("export", ""))))
    try:
        return Card.read(card_path).method
    except OSError:
        return None
