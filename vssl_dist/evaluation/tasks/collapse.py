"""Task ``collapse``: whether features still fill their space."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from pydantic import TypeAdapter, ValidationError

from vssl_dist.config import CollapseConfig
from vssl_dist.config.recipes import Views
from vssl_dist.data.passes import Pairs
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.variants import AugmentedPairs
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores.spectrum import (
    alignment,
    rank,
    spectrum,
    uniformity,
)
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Task, TaskResult
from vssl_dist.jsonfile import first_complaint
from vssl_dist.methods import monitors


def collapse(subject: FrozenFeatures, settings: CollapseConfig) -> TaskResult:
    """RankMe, spread, uniformity and alignment of the held-out images' features.

    ``rankme`` is of the features as they are, ``effective_rank_centred`` of them less their mean.
    Curve ``train/effective_rank`` is a third: of unit embeddings of a batch, uncentred.
    ``alignment`` is None where the export's card does not say how views were made.
    """
    features = subject.features("queries").features.float()
    if len(features) < 2:
        folder = subject.images.parts["queries"].folder
        raise DataError(f"{folder}: one image has no spread, collapse needs two at least")
    values, centred = spectrum(features), spectrum(features, centred=True)
    found = {
        "rankme": rank(values),
        "effective_rank_centred": rank(centred),
        "spread": monitors.spread(features).item(),
        "uniformity": uniformity(features),
    }
    aligned = _alignment(subject, settings)
    results = found | {"alignment": aligned, "width": features.shape[1]}
    if aligned is not None:
        found["alignment"] = aligned
    named = {f"collapse/{name}": value for name, value in found.items()}
    curves = {"as they are": values.tolist(), "centred": centred.tolist()}
    return TaskResult(results, named, {"spectrum": lambda: _plot(curves)})


def _alignment(subject: FrozenFeatures, settings: CollapseConfig) -> float | None:
    """Of the first two kinds of views that the run was trained with, seed 0."""
    recipes = list(subject.card.config.data.views)
    if not recipes or not settings.pairs:
        return None
    try:
        first, *others = TypeAdapter(Views).validate_python(recipes)
    except ValidationError as error:
        said = f"config.data.views of the card: {first_complaint(error)}"
        raise DataError(f"collapse: {said} (set pairs to 0)") from error
    # A method that sees one view of each image is asked about two draws of it.
    pair = (first, others[0] if others else first)
    plain = [recipe.model_copy(update={"size": None}) for recipe in pair]
    views = AugmentedPairs(Pairs((plain[0], plain[1]), count=1, seed=0))
    return alignment(subject.variants("queries", views, settings.pairs))


def _plot(curves: dict[str, list[float]]) -> Figure:
    figure, (axes,) = plots.page("singular values")
    ranked = {name: (range(1, len(values) + 1), values) for name, values in curves.items()}
    plots.lines(axes, ranked, x="rank", y="singular value", marker="")
    if any(map(any, curves.values())):
        axes.set_yscale("log")
    return figure


def _columns(results: dict[str, Any]) -> dict[str, str]:
    known = {name: value for name, value in results.items() if value is not None}
    return {name.replace("_", " "): _shown(value) for name, value in known.items()}


def _shown(value: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


COLLAPSE = Task(collapse, "features", _columns)
