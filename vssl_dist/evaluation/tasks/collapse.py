"""Task ``collapse``: whether features still fill their space."""

from __future__ import annotations

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
    compute_singular_values,
    effective_rank,
    uniformity,
)
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import EvaluationTask, TaskFigures, TaskResult
from vssl_dist.jsonfile import describe_first_error
from vssl_dist.methods import monitors


def measure_collapse(frozen_features: FrozenFeatures, task_config: CollapseConfig) -> TaskResult:
    """Measure RankMe, spread, uniformity and alignment of the held-out images' features.

    ``rankme`` is of the features as they are, ``effective_rank_centred`` of them less their mean.
    Curve ``train/effective_rank`` is a third: of unit embeddings of a batch, uncentred.
    ``alignment`` is None where the export's card does not say how views were made.
    """
    features = frozen_features.split_features("queries").features.float()
    if len(features) < 2:
        folder = frozen_features.task_images.dataset_by_split["queries"].folder
        raise DataError(f"{folder}: one image has no spread, collapse needs two at least")
    singular_values = compute_singular_values(features)
    centred_singular_values = compute_singular_values(features, subtract_mean=True)
    figures = {
        "rankme": effective_rank(singular_values),
        "effective_rank_centred": effective_rank(centred_singular_values),
        "spread": monitors.spread(features).item(),
        "uniformity": uniformity(features),
    }
    view_alignment = _measure_alignment(frozen_features, task_config)
    results = figures | {"alignment": view_alignment, "width": features.shape[1]}
    # A curve has no point that is None, a result says that there was nothing to measure.
    if view_alignment is not None:
        figures["alignment"] = view_alignment
    metrics = {f"collapse/{name}": value for name, value in figures.items()}
    spectra = {"as they are": singular_values.tolist(), "centred": centred_singular_values.tolist()}
    return TaskResult(results, metrics, {"spectrum": lambda: _plot_spectra(spectra)})


def _measure_alignment(
    frozen_features: FrozenFeatures, task_config: CollapseConfig
) -> float | None:
    """Measure alignment by the first two recipes of views of the run's training, seed 0."""
    recipes = list(frozen_features.card.config.data.views)
    if not recipes or not task_config.pairs:
        return None
    try:
        first_recipe, *more_recipes = TypeAdapter(Views).validate_python(recipes)
    except ValidationError as error:
        problem = f"config.data.views of the card: {describe_first_error(error)}"
        raise DataError(f"collapse: {problem} (set pairs to 0)") from error
    # A method that sees one view of each image is asked about two draws of it.
    second_recipe = more_recipes[0] if more_recipes else first_recipe
    # At the size of the network's images, which is what every feature here is of.
    first_recipe, second_recipe = (
        recipe.model_copy(update={"size": None}) for recipe in (first_recipe, second_recipe)
    )
    view_pairs = AugmentedPairs(Pairs((first_recipe, second_recipe), count=1, seed=0))
    return alignment(frozen_features.variant_features("queries", view_pairs, task_config.pairs))


def _plot_spectra(spectra: dict[str, list[float]]) -> Figure:
    figure, (axes,) = plots.make_empty_figure("singular values")
    curves: dict[str, plots.Curve] = {
        name: (range(1, len(values) + 1), values) for name, values in spectra.items()
    }
    plots.draw_lines(axes, curves, x_label="rank", y_label="singular value", marker="")
    # A logarithmic axis without one positive value cannot be drawn.
    if any(map(any, spectra.values())):
        axes.set_yscale("log")
    return figure


def _table_columns(results: TaskFigures) -> dict[str, str]:
    return {
        name.replace("_", " "): _format_three_digits(value)
        for name, value in results.items()
        if value is not None
    }


def _format_three_digits(value: float) -> str:
    """Format three digits, and all that stand before the point."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


COLLAPSE = EvaluationTask(measure_collapse, "features", _table_columns)
