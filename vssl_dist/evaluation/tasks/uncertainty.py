"""Task ``uncertainty``: what the variance of a posterior knows about failures and spoilt images."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vssl_dist.config import UncertaintyConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.evaluation.features.corruptions import KINDS, LEVELS
from vssl_dist.evaluation.features.variants import Corruptions
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.figures.contact_sheet import sheet
from vssl_dist.evaluation.scores.outliers import Fitting, knn_distance
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.selective import (
    Floats,
    aurc,
    extremes,
    failures,
    risk_coverage,
    spearman,
    within,
)
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.scores.variational import posterior_size
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Plot, Task, TaskResult, check_labels


def uncertainty(subject: FrozenFeatures, settings: UncertaintyConfig) -> TaskResult:
    """What the sum of the log-variances knows, beside the distance to the k-th neighbour.

    ``results["risk"][NAME]["aurc"]`` is the area under the risk-coverage curve of the k-NN
    prediction when images are ranked by NAME, between ``aurc_best`` and about ``error``;
    ``results["corruptions"][KIND]`` has rank correlations of the posterior's size with the level
    of a corruption, over all images (``spearman``) and within each (``within``), and the mean
    size at each level from 0 on.  A network without a posterior has the neighbours' part only.
    """
    posterior = subject.network.posterior()
    bank, queries = subject.features("bank"), subject.features("queries")
    check_labels(subject, bank, "bank")
    check_labels(subject, queries, "queries")
    measures = _measures(subject, settings, bank, queries, posterior)
    failed = failures(bank, queries, settings.k, settings.temperature, subject.device)
    curves = {name: risk_coverage(measure, failed) for name, measure in measures.items()}
    results: dict[str, Any] = {
        "error": float(failed.mean()),
        "aurc_best": aurc(failed, failed),
        "risk": {name: {"aurc": float(curve.mean())} for name, curve in curves.items()},
    }
    named = {f"uncertainty/aurc_{name}": one["aurc"] for name, one in results["risk"].items()}
    drawn: dict[str, Plot] = {"risk": lambda: _risk(curves)}
    if posterior is not None:
        size = measures["posterior_size"]
        results["corruptions"] = _corruptions(subject, settings, posterior)
        named |= {
            f"uncertainty/{figure}_{kind}": found[figure]
            for kind, found in results["corruptions"].items()
            for figure in ("spearman", "within")
        }
        certain, uncertain = extremes(size, settings.shown)
        results |= {"most_certain": certain, "least_certain": uncertain}
        drawn["corruptions"] = lambda: _levels(results["corruptions"])
        drawn["sheet"] = lambda: _sheet(subject.images.parts["queries"], results, size)
    return TaskResult(results, named | {"uncertainty/error": results["error"]}, drawn)


def _measures(
    subject: FrozenFeatures,
    settings: UncertaintyConfig,
    bank: Features,
    queries: Features,
    posterior: Posterior | None,
) -> dict[str, Floats]:
    distance = knn_distance(Fitting(bank, subject.classes, settings.k, 1.0, subject.device))
    found = {"knn_distance": distance(queries.features).numpy()}
    if posterior is None:
        return found
    return {"posterior_size": posterior_size(posterior, queries.features).numpy()} | found


def _corruptions(
    subject: FrozenFeatures, settings: UncertaintyConfig, posterior: Posterior
) -> dict[str, Any]:
    corruptions = Corruptions()
    features = subject.variants("queries", corruptions, settings.max_corrupted)
    size = posterior_size(posterior, features.flatten(0, 1)).numpy()
    size = size.reshape(len(features), corruptions.count)
    results = {}
    for number, kind in enumerate(KINDS):
        first = 1 + number * LEVELS
        levels = np.concatenate([size[:, :1], size[:, first : first + LEVELS]], axis=1)
        strength = np.arange(LEVELS + 1.0)
        pooled = np.broadcast_to(strength, levels.shape).ravel()
        results[kind] = {
            "spearman": spearman(levels.ravel(), pooled),
            "within": within(levels, strength),
            "sizes": levels.mean(0).tolist(),
        }
    return results


def _risk(curves: dict[str, Floats]) -> Figure:
    figure, (axes,) = plots.page("risk and coverage of k-NN")
    shown = {}
    for name, risk in curves.items():
        some = np.unique(np.linspace(0, len(risk) - 1, min(len(risk), 1000)).astype(int))
        label = f"{name.replace('_', ' ')} {100 * risk.mean():.1f}"
        shown[label] = ((some + 1) / len(risk), 100 * risk[some])
    plots.lines(axes, shown, x="share of the images, most certain first", y="error %", marker="")
    return figure


def _levels(corruptions: dict[str, Any]) -> Figure:
    figure, (axes,) = plots.page("mean within-image Spearman %")
    lines = {
        f"{kind} {100 * found['within']:+.1f}": (list(range(LEVELS + 1)), found["sizes"])
        for kind, found in corruptions.items()
    }
    plots.lines(axes, lines, x="level", y="sum of log-variances")
    return figure


def _sheet(dataset: Dataset, results: dict[str, Any], size: Floats) -> Figure:
    rows = {
        "most certain": results["most_certain"],
        "least certain": results["least_certain"],
    }
    return sheet(dataset, rows, lambda row: f"{size[row]:.4g}")


def _columns(results: dict[str, Any]) -> dict[str, str]:
    cells = {"error": f"{100 * results['error']:.1f}"}
    cells["AURC best"] = f"{100 * results['aurc_best']:.1f}"
    for name, found in results["risk"].items():
        cells[f"AURC {name.replace('_', ' ')}"] = f"{100 * found['aurc']:.1f}"
    for kind, found in results.get("corruptions", {}).items():
        cells[f"pooled Spearman {kind}"] = f"{100 * found['spearman']:.1f}"
        cells[f"within-image Spearman {kind}"] = f"{100 * found['within']:.1f}"
    return cells


UNCERTAINTY = Task(uncertainty, "risk, rank correlation %", _columns)
