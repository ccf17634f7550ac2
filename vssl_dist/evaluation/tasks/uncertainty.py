"""Task ``uncertainty``: what the variance of a posterior knows about failures and spoilt images."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from vssl_dist.config import UncertaintyConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.features.corruptions import KINDS, LEVELS
from vssl_dist.evaluation.features.variants import Corruptions
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.figures.contact_sheet import draw_sheet
from vssl_dist.evaluation.scores.outliers import OutlierSetup, knn_distance
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.selective import (
    Floats,
    aurc,
    extremes,
    knn_failures,
    risk_coverage,
    spearman,
    within_image_spearman,
)
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.scores.variational import posterior_size
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Plot, Results, Task, TaskResult, check_labels


def measure_uncertainty(frozen: FrozenFeatures, task: UncertaintyConfig) -> TaskResult:
    """Measure what the sum of the log-variances knows, beside the distance to the k-th neighbour.

    ``results["risk"][NAME]["aurc"]`` is the area under the risk-coverage curve of the k-NN
    prediction when images are ranked by NAME, between ``aurc_best`` and about ``error``;
    ``results["corruptions"][KIND]`` has rank correlations of the posterior's size with the level
    of a corruption, over all images (``spearman``) and within each (``within``), and the mean
    size at each level from 0 on.  A network without a posterior has the neighbours' part only.
    """
    posterior = frozen.network.posterior()
    bank = frozen.features("bank")
    queries = frozen.features("queries")
    check_labels(frozen, bank, "bank")
    check_labels(frozen, queries, "queries")
    uncertainties = _uncertainties(frozen, task, bank, queries, posterior)
    failed = knn_failures(bank, queries, task.k, task.temperature, frozen.device)
    curves = {name: risk_coverage(values, failed) for name, values in uncertainties.items()}
    results: Results = {
        "error": float(failed.mean()),
        # Ranked by the failures themselves: no uncertainty can do better.
        "aurc_best": aurc(failed, failed),
        "risk": {name: {"aurc": float(curve.mean())} for name, curve in curves.items()},
    }
    metrics = {f"uncertainty/aurc_{name}": risk["aurc"] for name, risk in results["risk"].items()}
    drawn: dict[str, Plot] = {"risk": lambda: _plot_risk(curves)}
    if posterior is not None:
        size = uncertainties["posterior_size"]
        results["corruptions"] = _corruptions(frozen, task, posterior)
        metrics |= {
            f"uncertainty/{figure}_{kind}": figures[figure]
            for kind, figures in results["corruptions"].items()
            for figure in ("spearman", "within")
        }
        certain, uncertain = extremes(size, task.shown)
        results |= {"most_certain": certain, "least_certain": uncertain}
        drawn["corruptions"] = lambda: _plot_corruptions(results["corruptions"])
        drawn["sheet"] = lambda: _draw_extremes(frozen.images.splits["queries"], results, size)
    metrics |= {"uncertainty/error": results["error"]}
    return TaskResult(results, metrics, drawn)


def _uncertainties(
    frozen: FrozenFeatures,
    task: UncertaintyConfig,
    bank: Features,
    queries: Features,
    posterior: Posterior | None,
) -> dict[str, Floats]:
    """Compute each uncertainty of the queries, ``(M,)`` by name; the higher, the less certain."""
    # The penalty of the setup's classifier plays no part: only the distance is asked for.
    setup = OutlierSetup(bank, frozen.classes, task.k, 1.0, frozen.device)
    distance = {"knn_distance": knn_distance(setup)(queries.features).numpy()}
    if posterior is None:
        return distance
    return {"posterior_size": posterior_size(posterior, queries.features).numpy()} | distance


def _corruptions(frozen: FrozenFeatures, task: UncertaintyConfig, posterior: Posterior) -> Results:
    """Correlate the posterior's size with the level of each kind of corruption."""
    corruptions = Corruptions()
    features = frozen.variants("queries", corruptions, task.max_corrupted)
    size = posterior_size(posterior, features.flatten(0, 1)).numpy()
    size = size.reshape(len(features), corruptions.count)
    strength = np.arange(LEVELS + 1.0)
    results = {}
    for index, kind in enumerate(KINDS):
        # Column 0 is the image as it is, level 0 of every kind.
        first = 1 + index * LEVELS
        by_level = np.concatenate([size[:, :1], size[:, first : first + LEVELS]], axis=1)
        pooled_strength = np.broadcast_to(strength, by_level.shape).ravel()
        results[kind] = {
            "spearman": spearman(by_level.ravel(), pooled_strength),
            "within": within_image_spearman(by_level, strength),
            "sizes": by_level.mean(0).tolist(),
        }
    return results


def _plot_risk(curves: dict[str, Floats]) -> Figure:
    figure, (axes,) = plots.empty_figure("risk and coverage of k-NN")
    lines: dict[str, plots.Curve] = {}
    for name, risk in curves.items():
        # A thousand points are more than the picture has pixels across.
        indices = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), 1000)).astype(int))
        label = f"{name.replace('_', ' ')} {100 * risk.mean():.1f}"
        lines[label] = ((indices + 1) / len(risk), 100 * risk[indices])
    plots.draw_lines(
        axes, lines, x="share of the images, most certain first", y="error %", marker=""
    )
    return figure


def _plot_corruptions(corruptions: Results) -> Figure:
    figure, (axes,) = plots.empty_figure("mean within-image Spearman %")
    lines: dict[str, plots.Curve] = {
        f"{kind} {100 * figures['within']:+.1f}": (range(LEVELS + 1), figures["sizes"])
        for kind, figures in corruptions.items()
    }
    plots.draw_lines(axes, lines, x="level", y="sum of log-variances")
    return figure


def _draw_extremes(dataset: Dataset, results: Results, size: Floats) -> Figure:
    rows = {
        "most certain": results["most_certain"],
        "least certain": results["least_certain"],
    }
    return draw_sheet(dataset, rows, lambda image_id: f"{size[image_id]:.4g}")


def _columns(results: Results) -> dict[str, str]:
    cells = {"error": f"{100 * results['error']:.1f}"}
    cells["AURC best"] = f"{100 * results['aurc_best']:.1f}"
    for name, risk in results["risk"].items():
        cells[f"AURC {name.replace('_', ' ')}"] = f"{100 * risk['aurc']:.1f}"
    for kind, figures in results.get("corruptions", {}).items():
        cells[f"pooled Spearman {kind}"] = f"{100 * figures['spearman']:.1f}"
        cells[f"within-image Spearman {kind}"] = f"{100 * figures['within']:.1f}"
    return cells


UNCERTAINTY = Task(measure_uncertainty, "risk, rank correlation %", _columns)
