"""Task ``ood``: how well scores tell the held-out images from those of other datasets."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.figure import Figure

from vssl_dist.config import OodConfig
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.variants import AugmentedPairs
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores import detection
from vssl_dist.evaluation.scores.cross_view import score_view_pairs
from vssl_dist.evaluation.scores.outliers import OutlierSetup, fit_outlier_scores
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.scores.variational import VariationalSetup
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import (
    DrawPlot,
    EvaluationTask,
    TaskFigures,
    TaskResult,
    check_labels,
)
from vssl_dist.exports.results import score_name_with_density


def measure_ood(frozen_features: FrozenFeatures, task_config: OodConfig) -> TaskResult:
    """Measure how well each score tells the held-out images from each other dataset.

    ``results[dataset][score]`` has ``auroc``, ``aupr``, ``fpr95`` and the ends of their bootstrap
    intervals ``auroc_interval`` and so on.  Of an export with a posterior there are also the scores
    of `make_variational_scores` and, with ``pairs``, those of `score_view_pairs`.  Where those
    depend on ``density``, curves and pictures name it.
    """
    score_split = _fit_split_scorer(frozen_features, task_config)
    density = task_config.density if has_embedding_density(frozen_features.card) else None
    inlier_scores = score_split("queries")
    results: TaskFigures = {}
    plot_by_name: dict[str, DrawPlot] = {}
    for split_name in frozen_features.ood_split_names:
        results[split_name] = {}
        curves: dict[str, plots.Curve] = {}
        for name, outlier_scores in score_split(split_name).items():
            figures: TaskFigures = detection.compute_detection(
                inlier_scores[name], outlier_scores
            )._asdict()
            if task_config.bootstrap:
                intervals = detection.bootstrap_intervals(
                    inlier_scores[name], outlier_scores, resampling_count=task_config.bootstrap
                )
                figures |= {
                    f"{key}_interval": list(interval_ends)
                    for key, interval_ends in intervals.items()
                }
            results[split_name][name] = figures
            curve_label = score_name_with_density(name, density).replace("_", " ")
            curves[f"{curve_label} {100 * figures['auroc']:.1f}"] = detection.roc_curve(
                inlier_scores[name], outlier_scores
            )
        plot_by_name[f"roc-{split_name}"] = _make_roc_plot(split_name, curves)
    metrics = {
        f"ood/{figure}_{split_name}_{score_name_with_density(name, density)}": figures[figure]
        for split_name, figures_by_score in results.items()
        for name, figures in figures_by_score.items()
        for figure in detection.DetectionFigures._fields
    }
    return TaskResult(results, metrics, plot_by_name)


def _fit_split_scorer(
    frozen_features: FrozenFeatures, task_config: OodConfig
) -> Callable[[str], dict[str, detection.Float64Array]]:
    """Fit every score to the bank; returns what scores the images of a split, by score."""
    posterior = frozen_features.network.load_posterior()
    bank = frozen_features.split_features("bank")
    check_labels(frozen_features, bank, "bank")
    variational = None
    view_pairs = None
    if posterior is not None:
        variational = VariationalSetup(
            posterior, task_config.density, task_config.draws, task_config.posteriors
        )
        if task_config.pairs:
            view_pairs = AugmentedPairs.of_run(frozen_features.card, task_config.pairs)
    score_functions = fit_outlier_scores(
        OutlierSetup(
            bank,
            frozen_features.num_classes,
            task_config.k,
            task_config.l2,
            frozen_features.device,
            variational,
        )
    )

    def score_split(split_name: str) -> dict[str, detection.Float64Array]:
        features = frozen_features.split_features(split_name).features
        scores_by_name = {name: score(features).numpy() for name, score in score_functions.items()}
        if variational is not None and view_pairs is not None:
            scores_of_pairs = score_view_pairs(
                variational, features, frozen_features.variant_features(split_name, view_pairs)
            )
            scores_by_name |= {name: values.numpy() for name, values in scores_of_pairs.items()}
        for name, values in scores_by_name.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"{frozen_features.task_images.dataset_by_split[split_name].folder}: scores "
                    f"{name} are not finite: the network is damaged, evaluate an earlier export"
                )
        return dict(sorted(scores_by_name.items()))

    return score_split


def _make_roc_plot(split: str, curves: Mapping[str, plots.Curve]) -> DrawPlot:
    def draw() -> Figure:
        figure, (axes,) = plots.make_empty_figure(f"{split}: AUROC %")
        # Chance, and the true positive rate at which FPR95 is read off.
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        plots.draw_lines(
            axes, curves, x_label="false positive rate", y_label="true positive rate", marker=""
        )
        axes.axhline(0.95, color="0.8", linewidth=1, linestyle=":")
        return figure

    return draw


def _table_columns(results: TaskFigures) -> dict[str, str]:
    return {
        f"{split} {name.replace('_', ' ')}": (
            f"{100 * figures['auroc']:.1f}/{100 * figures['fpr95']:.1f}"
        )
        for split, by_score in results.items()
        for name, figures in by_score.items()
    }


OOD = EvaluationTask(measure_ood, "AUROC/FPR95 %", _table_columns)
