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
from vssl_dist.evaluation.scores.cross_view import pair_scores
from vssl_dist.evaluation.scores.outliers import OutlierSetup, fit_scores
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.scores.variational import VariationalSetup
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Plot, Results, Task, TaskResult, check_labels
from vssl_dist.exports.results import score_name


def measure_ood(frozen: FrozenFeatures, task: OodConfig) -> TaskResult:
    """Measure how well each score tells the held-out images from each other dataset.

    ``results[dataset][score]`` has ``auroc``, ``aupr``, ``fpr95`` and the ends of their bootstrap
    intervals ``auroc_interval`` and so on.  Of an export with a posterior there are also the scores
    of `variational_scores` and, with ``pairs``, those of `pair_scores`.  Where those depend on
    ``density``, curves and pictures name it.
    """
    score_split = _fit_scorer(frozen, task)
    density = task.density if has_embedding_density(frozen.card) else None
    inside = score_split("queries")
    results: Results = {}
    drawn: dict[str, Plot] = {}
    for split in frozen.ood_splits:
        results[split] = {}
        curves: dict[str, plots.Curve] = {}
        for name, outside in score_split(split).items():
            figures: Results = detection.detection(inside[name], outside)._asdict()
            if task.bootstrap:
                intervals = detection.bootstrap_intervals(
                    inside[name], outside, count=task.bootstrap
                )
                figures |= {f"{key}_interval": list(ends) for key, ends in intervals.items()}
            results[split][name] = figures
            label = score_name(name, density).replace("_", " ")
            curves[f"{label} {100 * figures['auroc']:.1f}"] = detection.roc(inside[name], outside)
        drawn[f"roc-{split}"] = _roc_plot(split, curves)
    metrics = {
        f"ood/{figure}_{split}_{score_name(name, density)}": figures[figure]
        for split, by_score in results.items()
        for name, figures in by_score.items()
        for figure in detection.Detection._fields
    }
    return TaskResult(results, metrics, drawn)


def _fit_scorer(
    frozen: FrozenFeatures, task: OodConfig
) -> Callable[[str], dict[str, detection.Floats]]:
    """Fit every score to the bank; returns what scores the images of a split, by score."""
    posterior = frozen.network.posterior()
    bank = frozen.features("bank")
    check_labels(frozen, bank, "bank")
    variational = None
    views = None
    if posterior is not None:
        variational = VariationalSetup(posterior, task.density, task.draws, task.posteriors)
        if task.pairs:
            views = AugmentedPairs.of_run(frozen.card, task.pairs)
    scores = fit_scores(
        OutlierSetup(bank, frozen.classes, task.k, task.l2, frozen.device, variational)
    )

    def score_split(split: str) -> dict[str, detection.Floats]:
        features = frozen.features(split).features
        by_name = {name: score(features).numpy() for name, score in scores.items()}
        if variational is not None and views is not None:
            pairs = pair_scores(variational, features, frozen.variants(split, views))
            by_name |= {name: values.numpy() for name, values in pairs.items()}
        for name, values in by_name.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"{frozen.images.splits[split].folder}: scores {name} are not finite: "
                    "the network is damaged, evaluate an earlier export"
                )
        return dict(sorted(by_name.items()))

    return score_split


def _roc_plot(split: str, curves: Mapping[str, plots.Curve]) -> Plot:
    def draw() -> Figure:
        figure, (axes,) = plots.empty_figure(f"{split}: AUROC %")
        # Chance, and the true positive rate at which FPR95 is read off.
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        plots.draw_lines(axes, curves, x="false positive rate", y="true positive rate", marker="")
        axes.axhline(0.95, color="0.8", linewidth=1, linestyle=":")
        return figure

    return draw


def _columns(results: Results) -> dict[str, str]:
    return {
        f"{split} {name.replace('_', ' ')}": (
            f"{100 * figures['auroc']:.1f}/{100 * figures['fpr95']:.1f}"
        )
        for split, by_score in results.items()
        for name, figures in by_score.items()
    }


OOD = Task(measure_ood, "AUROC/FPR95 %", _columns)
