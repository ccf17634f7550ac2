"""Task ``ood``: how well scores tell the held-out images from those of other datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vssl_dist.config import OodConfig
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.variants import AugmentedPairs
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores import detection
from vssl_dist.evaluation.scores.cross_view import pair_scores
from vssl_dist.evaluation.scores.outliers import Fitting, fit_scores
from vssl_dist.evaluation.scores.posterior import has_embedding_density
from vssl_dist.evaluation.scores.variational import Scoring
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Plot, Task, TaskResult, check_labels
from vssl_dist.exports.results import score_name


def ood(subject: FrozenFeatures, settings: OodConfig) -> TaskResult:
    """How well each score tells the held-out images from each other dataset.

    ``results[dataset][score]`` has ``auroc``, ``aupr``, ``fpr95`` and the ends of their bootstrap
    intervals ``auroc_interval`` and so on.  Of an export with a posterior there are also the scores
    of `variational_scores` and, with ``pairs``, those of `pair_scores`.  Where those depend on
    ``density``, curves and pictures name it.
    """
    scored = _scorer(subject, settings)
    density = settings.density if has_embedding_density(subject.card) else None
    own = scored("queries")
    results: dict[str, Any] = {}
    drawn: dict[str, Plot] = {}
    for part in subject.ood_datasets:
        results[part], curves = {}, {}
        for name, foreign in scored(part).items():
            pair = own[name], foreign
            found: dict[str, Any] = detection.detection(*pair)._asdict()
            if settings.bootstrap:
                ends = detection.intervals(*pair, count=settings.bootstrap)
                found |= {f"{figure}_interval": list(pair) for figure, pair in ends.items()}
            results[part][name] = found
            label = score_name(name, density).replace("_", " ")
            curves[f"{label} {100 * found['auroc']:.1f}"] = detection.roc(*pair)
        drawn[f"roc-{part}"] = _roc(part, curves)
    named = {
        f"ood/{figure}_{part}_{score_name(name, density)}": found[figure]
        for part, by_score in results.items()
        for name, found in by_score.items()
        for figure in detection.Detection._fields
    }
    return TaskResult(results, named, drawn)


def _scorer(
    subject: FrozenFeatures, settings: OodConfig
) -> Callable[[str], dict[str, detection.Floats]]:
    """Every score, fitted to the bank: of the images of a part, by name."""
    posterior, bank = subject.network.posterior(), subject.features("bank")
    check_labels(subject, bank, "bank")
    setup, views = None, None
    if posterior is not None:
        setup = Scoring(posterior, settings.density, settings.draws, settings.posteriors)
        if settings.pairs:
            views = AugmentedPairs.of_run(subject.card, settings.pairs)
    scores = fit_scores(
        Fitting(bank, subject.classes, settings.k, settings.l2, subject.device, setup)
    )

    def scored(part: str) -> dict[str, detection.Floats]:
        features = subject.features(part).features
        found = {name: score(features).numpy() for name, score in scores.items()}
        if setup is not None and views is not None:
            pairs = pair_scores(setup, features, subject.variants(part, views))
            found |= {name: score.numpy() for name, score in pairs.items()}
        for name, each in found.items():
            if not np.isfinite(each).all():
                raise DataError(
                    f"{subject.images.parts[part].folder}: scores {name} are not finite: "
                    "the network is damaged, evaluate an earlier export"
                )
        return dict(sorted(found.items()))

    return scored


def _roc(part: str, curves: dict[str, tuple[detection.Floats, detection.Floats]]) -> Plot:
    def draw() -> Figure:
        figure, (axes,) = plots.page(f"{part}: AUROC %")
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        plots.lines(axes, curves, x="false positive rate", y="true positive rate", marker="")
        axes.axhline(0.95, color="0.8", linewidth=1, linestyle=":")
        return figure

    return draw


def _columns(results: dict[str, Any]) -> dict[str, str]:
    return {
        f"{part} {name.replace('_', ' ')}": f"{100 * found['auroc']:.1f}/{100 * found['fpr95']:.1f}"
        for part, by_score in results.items()
        for name, found in by_score.items()
    }


OOD = Task(ood, "AUROC/FPR95 %", _columns)
