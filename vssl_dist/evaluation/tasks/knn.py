"""Task ``knn``: the accuracy of weighted neighbours for every k and temperature."""

from __future__ import annotations

from matplotlib.figure import Figure

from vssl_dist.config import KnnConfig
from vssl_dist.errors import DataError
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores.knn import knn_accuracy_grid
from vssl_dist.evaluation.scores.table import TopAccuracy
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import EvaluationTask, TaskFigures, TaskResult


def measure_knn(frozen_features: FrozenFeatures, task_config: KnnConfig) -> TaskResult:
    """Measure the accuracy for every k and temperature: ``"k20_t0.07"`` to ``top1`` and ``top5``.

    ``knn/top1`` is the first k with the first temperature.
    """
    bank = frozen_features.split_features("bank")
    queries = frozen_features.split_features("queries")
    try:
        accuracy_grid = knn_accuracy_grid(
            bank, queries, task_config.k, task_config.temperature, device=frozen_features.device
        )
    except ValueError as error:
        raise DataError(
            f"k-NN on {frozen_features.task_images.dataset_by_split['queries'].folder}: {error}"
        ) from error
    results = {
        f"k{k}_t{temperature:g}": point._asdict()
        for (k, temperature), point in accuracy_grid.items()
    }
    first_accuracies = next(iter(results.values()))
    # The most telling one first; see `TaskResult.metrics`.
    metrics = {f"knn/{name}": value for name, value in first_accuracies.items()}
    for point, accuracies in results.items():
        metrics |= {f"knn/{name}_{point}": value for name, value in accuracies.items()}
    return TaskResult(results, metrics, {"grid": lambda: _plot_accuracy_grid(accuracy_grid)})


def _plot_accuracy_grid(accuracy_grid: dict[tuple[int, float], TopAccuracy]) -> Figure:
    """Draw top-1 over k, a line per temperature."""
    ks = sorted({k for k, _ in accuracy_grid})
    curve_by_temperature: dict[str, plots.Curve] = {
        f"T = {temperature:g}": (ks, [100 * accuracy_grid[k, temperature].top1 for k in ks])
        for temperature in sorted({temperature for _, temperature in accuracy_grid})
    }
    figure, (axes,) = plots.make_empty_figure("k-NN")
    plots.draw_lines(axes, curve_by_temperature, x_label="k", y_label="top-1 %", log_x=len(ks) > 1)
    plots.set_x_ticks(axes, ks)
    return figure


def _table_columns(results: TaskFigures) -> dict[str, str]:
    return {
        point.replace("_", " "): f"{100 * accuracies['top1']:.1f}"
        for point, accuracies in results.items()
    }


KNN = EvaluationTask(measure_knn, "k-NN top-1 %", _table_columns)
