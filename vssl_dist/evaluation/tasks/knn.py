"""Task ``knn``: the accuracy of weighted neighbours for every k and temperature."""

from __future__ import annotations

from matplotlib.figure import Figure

from vssl_dist.config import KnnConfig
from vssl_dist.errors import DataError
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores.knn import knn_grid
from vssl_dist.evaluation.scores.table import Accuracy
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Results, Task, TaskResult


def measure_knn(frozen: FrozenFeatures, task: KnnConfig) -> TaskResult:
    """Measure the accuracy for every k and temperature: ``"k20_t0.07"`` to ``top1`` and ``top5``.

    ``knn/top1`` is the first k with the first temperature.
    """
    bank = frozen.features("bank")
    queries = frozen.features("queries")
    try:
        grid = knn_grid(bank, queries, task.k, task.temperature, device=frozen.device)
    except ValueError as error:
        raise DataError(f"k-NN on {frozen.images.splits['queries'].folder}: {error}") from error
    results = {f"k{k}_t{t:g}": point._asdict() for (k, t), point in grid.items()}
    first = next(iter(results.values()))
    # The most telling one first; see `TaskResult.metrics`.
    metrics = {f"knn/{name}": value for name, value in first.items()}
    for point, accuracies in results.items():
        metrics |= {f"knn/{name}_{point}": value for name, value in accuracies.items()}
    return TaskResult(results, metrics, {"grid": lambda: _plot(grid)})


def _plot(grid: dict[tuple[int, float], Accuracy]) -> Figure:
    """Draw top-1 over k, a line per temperature."""
    ks = sorted({k for k, _ in grid})
    lines: dict[str, plots.Curve] = {
        f"T = {t:g}": (ks, [100 * grid[k, t].top1 for k in ks])
        for t in sorted({t for _, t in grid})
    }
    figure, (axes,) = plots.empty_figure("k-NN")
    plots.draw_lines(axes, lines, x="k", y="top-1 %", log=len(ks) > 1)
    plots.set_ticks(axes, ks)
    return figure


def _columns(results: Results) -> dict[str, str]:
    return {
        point.replace("_", " "): f"{100 * accuracies['top1']:.1f}"
        for point, accuracies in results.items()
    }


KNN = Task(measure_knn, "k-NN top-1 %", _columns)
