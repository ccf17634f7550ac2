"""Task ``uncertainty``: what the variance of a posterior knows about failures and spoilt images."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from vssl_dist.config import UncertaintyConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.features.corruptions import CORRUPTION_BY_KIND, NUM_LEVELS
from vssl_dist.evaluation.features.variants import CorruptedVariants
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.figures.contact_sheet import draw_contact_sheet
from vssl_dist.evaluation.scores.outliers import OutlierSetup, fit_knn_distance_score
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.selective import (
    Float64Array,
    aurc,
    find_extreme_rows,
    find_knn_failures,
    mean_within_image_spearman,
    risk_coverage_curve,
    spearman_correlation,
)
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.scores.variational import posterior_size
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import (
    DrawPlot,
    EvaluationTask,
    TaskFigures,
    TaskResult,
    check_labels,
)


def measure_uncertainty(
    frozen_features: FrozenFeatures, task_config: UncertaintyConfig
) -> TaskResult:
    """Measure what the sum of the log-variances knows, beside the distance to the k-th neighbour.

    ``results["risk"][NAME]["aurc"]`` is the area under the risk-coverage curve of the k-NN
    prediction when images are ranked by NAME, between ``aurc_best`` and about ``error``;
    ``results["corruptions"][KIND]`` has rank correlations of the posterior's size with the level
    of a corruption, over all images (``spearman``) and within each (``within``), and the
    mean size at each level from 0 on.  A network without a posterior has the neighbours' part only.
    """
    posterior = frozen_features.network.load_posterior()
    bank = frozen_features.split_features("bank")
    queries = frozen_features.split_features("queries")
    check_labels(frozen_features, bank, "bank")
    check_labels(frozen_features, queries, "queries")
    uncertainties = _compute_uncertainties(frozen_features, task_config, bank, queries, posterior)
    is_failure = find_knn_failures(
        bank, queries, task_config.k, task_config.temperature, frozen_features.device
    )
    risk_curves = {
        name: risk_coverage_curve(values, is_failure) for name, values in uncertainties.items()
    }
    results: TaskFigures = {
        "error": float(is_failure.mean()),
        # Ranked by the failures themselves: no uncertainty can do better.
        "aurc_best": aurc(is_failure, is_failure),
        "risk": {name: {"aurc": float(curve.mean())} for name, curve in risk_curves.items()},
    }
    metrics = {f"uncertainty/aurc_{name}": risk["aurc"] for name, risk in results["risk"].items()}
    plot_by_name: dict[str, DrawPlot] = {"risk": lambda: _plot_risk(risk_curves)}
    if posterior is not None:
        posterior_sizes = uncertainties["posterior_size"]
        results["corruptions"] = _correlate_with_corruptions(
            frozen_features, task_config, posterior
        )
        metrics |= {
            f"uncertainty/{figure}_{kind}": figures[figure]
            for kind, figures in results["corruptions"].items()
            for figure in ("spearman", "within")
        }
        most_certain, least_certain = find_extreme_rows(posterior_sizes, task_config.shown)
        results |= {"most_certain": most_certain, "least_certain": least_certain}
        plot_by_name["corruptions"] = lambda: _plot_corruptions(results["corruptions"])
        plot_by_name["sheet"] = lambda: _draw_extreme_images(
            frozen_features.task_images.dataset_by_split["queries"], results, posterior_sizes
        )
    metrics |= {"uncertainty/error": results["error"]}
    return TaskResult(results, metrics, plot_by_name)


def _compute_uncertainties(
    frozen_features: FrozenFeatures,
    task_config: UncertaintyConfig,
    bank: LabelledFeatures,
    queries: LabelledFeatures,
    posterior: Posterior | None,
) -> dict[str, Float64Array]:
    """Compute each uncertainty of the queries, ``(M,)`` by name; the higher, the less certain."""
    # The penalty of the setup's classifier plays no part: only the distance is asked for.
    outlier_setup = OutlierSetup(
        bank, frozen_features.num_classes, task_config.k, 1.0, frozen_features.device
    )
    neighbour_distances = {
        "knn_distance": fit_knn_distance_score(outlier_setup)(queries.features).numpy()
    }
    if posterior is None:
        return neighbour_distances
    return {
        "posterior_size": posterior_size(posterior, queries.features).numpy()
    } | neighbour_distances


def _correlate_with_corruptions(
    frozen_features: FrozenFeatures, task_config: UncertaintyConfig, posterior: Posterior
) -> TaskFigures:
    """Correlate the posterior's size with the level of each kind of corruption."""
    corruptions = CorruptedVariants()
    features = frozen_features.variant_features("queries", corruptions, task_config.max_corrupted)
    posterior_sizes = posterior_size(posterior, features.flatten(0, 1)).numpy()
    posterior_sizes = posterior_sizes.reshape(len(features), corruptions.pictures_per_image)
    level_strengths = np.arange(NUM_LEVELS + 1.0)
    results = {}
    for kind_index, kind in enumerate(CORRUPTION_BY_KIND):
        # Column 0 is the image as it is, level 0 of every kind.
        first_column = 1 + kind_index * NUM_LEVELS
        sizes_by_level = np.concatenate(
            [posterior_sizes[:, :1], posterior_sizes[:, first_column : first_column + NUM_LEVELS]],
            axis=1,
        )
        pooled_strength = np.broadcast_to(level_strengths, sizes_by_level.shape).ravel()
        results[kind] = {
            "spearman": spearman_correlation(sizes_by_level.ravel(), pooled_strength),
            "within": mean_within_image_spearman(sizes_by_level, level_strengths),
            "sizes": sizes_by_level.mean(0).tolist(),
        }
    return results


def _plot_risk(risk_curves: dict[str, Float64Array]) -> Figure:
    figure, (axes,) = plots.make_empty_figure("risk and coverage of k-NN")
    curve_by_label: dict[str, plots.Curve] = {}
    for name, risk_by_coverage in risk_curves.items():
        # A thousand points are more than the picture has pixels across.
        drawn_points = np.unique(
            np.linspace(0, len(risk_by_coverage) - 1, min(len(risk_by_coverage), 1000)).astype(int)
        )
        label = f"{name.replace('_', ' ')} {100 * risk_by_coverage.mean():.1f}"
        curve_by_label[label] = (
            (drawn_points + 1) / len(risk_by_coverage),
            100 * risk_by_coverage[drawn_points],
        )
    plots.draw_lines(
        axes,
        curve_by_label,
        x_label="share of the images, most certain first",
        y_label="error %",
        marker="",
    )
    return figure


def _plot_corruptions(figures_by_kind: TaskFigures) -> Figure:
    figure, (axes,) = plots.make_empty_figure("mean within-image Spearman %")
    curve_by_label: dict[str, plots.Curve] = {
        f"{kind} {100 * figures['within']:+.1f}": (range(NUM_LEVELS + 1), figures["sizes"])
        for kind, figures in figures_by_kind.items()
    }
    plots.draw_lines(axes, curve_by_label, x_label="level", y_label="sum of log-variances")
    return figure


def _draw_extreme_images(
    dataset: Dataset, results: TaskFigures, posterior_sizes: Float64Array
) -> Figure:
    ids_by_row_name = {
        "most certain": results["most_certain"],
        "least certain": results["least_certain"],
    }
    return draw_contact_sheet(
        dataset, ids_by_row_name, lambda image_id: f"{posterior_sizes[image_id]:.4g}"
    )


def _table_columns(results: TaskFigures) -> dict[str, str]:
    cell_by_column = {"error": f"{100 * results['error']:.1f}"}
    cell_by_column["AURC best"] = f"{100 * results['aurc_best']:.1f}"
    for name, risk in results["risk"].items():
        cell_by_column[f"AURC {name.replace('_', ' ')}"] = f"{100 * risk['aurc']:.1f}"
    for kind, figures in results.get("corruptions", {}).items():
        cell_by_column[f"pooled Spearman {kind}"] = f"{100 * figures['spearman']:.1f}"
        cell_by_column[f"within-image Spearman {kind}"] = f"{100 * figures['within']:.1f}"
    return cell_by_column


UNCERTAINTY = EvaluationTask(measure_uncertainty, "risk, rank correlation %", _table_columns)
