"""Every task, by the name a config uses.  To add one: write the function, add the line."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vssl_dist.config import CollapseConfig, KnnConfig, LinearConfig, OodConfig
from vssl_dist.data.shards import DataError
from vssl_dist.evaluation import metrics
from vssl_dist.evaluation.collapse import rankme, uniformity
from vssl_dist.evaluation.knn import Accuracy, Features, knn_grid
from vssl_dist.evaluation.linear import Training, best_l2, best_lr, logistic, sgd
from vssl_dist.evaluation.ood import Fitting, fit_scores
from vssl_dist.evaluation.probe import accuracy, subset
from vssl_dist.evaluation.subject import Subject
from vssl_dist.methods import monitors


class Figures(NamedTuple):
    """What a task finds out."""

    results: dict[str, Any]
    """As JSON values."""
    metrics: dict[str, float]
    """The same by their names on the run's curves, the most telling one first."""


class Task(NamedTuple):
    """One task: a function of what is evaluated, and how its results are shown."""

    measure: Callable[[Subject, Any], Figures]
    title: str
    columns: Callable[[dict[str, Any]], dict[str, str]]
    """The cells of a table's row by the names of their columns."""


def knn(subject: Subject, settings: KnnConfig) -> Figures:
    """Accuracy for every k and temperature: ``"k20_t0.07"`` to ``top1`` and ``top5``.

    ``knn/top1`` is the first k with the first temperature.
    """
    bank, queries = subject.features("bank"), subject.features("queries")
    try:
        grid = knn_grid(bank, queries, settings.k, settings.temperature, device=subject.device)
    except ValueError as error:
        raise DataError(f"k-NN on {subject.images.parts['queries'].folder}: {error}") from error
    results = {f"k{k}_t{t:g}": point._asdict() for (k, t), point in grid.items()}
    first = next(iter(results.values()))
    named = {f"knn/{name}": value for name, value in first.items()}
    for point, accuracies in results.items():
        named |= {f"knn/{name}_{point}": value for name, value in accuracies.items()}
    return Figures(results, named)


def linear(subject: Subject, settings: LinearConfig) -> Figures:
    """Accuracy of linear classifiers: ``sgd``, ``logistic`` and ``logistic_SHARE``.

    Each has ``top1``, ``top5``, what was chosen on held-out training images and, over the seeds,
    the standard deviation ``top1_std``.
    """
    bank, queries = subject.features("bank"), subject.features("queries")
    _check_labels(subject, bank, "bank")
    _check_labels(subject, queries, "queries")
    if int(bank.labels.min()) == int(bank.labels.max()):
        raise DataError(
            f"{subject.images.parts['bank'].folder}: its images are of one class, "
            "there is nothing for a linear probe to tell apart"
        )
    data = Training(bank, torch.arange(len(bank.labels)), subject.classes, subject.device)
    results = {"sgd": _sgd(data, queries, settings), "logistic": _logistic(data, queries, settings)}
    for share in settings.shares:
        results[f"logistic_{share:g}"] = _low_shot(data, queries, settings, share)
    named = {f"linear/{name}": results["sgd"][name] for name in ("top1", "top5", "top1_std")}
    for kind in list(results)[1:]:
        shown = ("top1", "top5", "top1_std")
        named |= {f"linear/{kind}_{n}": results[kind][n] for n in shown if n in results[kind]}
    return Figures(results, named)


def _sgd(data: Training, queries: Features, settings: LinearConfig) -> dict[str, Any]:
    lengths = {"epochs": settings.epochs, "batch": settings.sgd_batch}
    chosen = best_lr(data, settings.lr, settings.held_out, **lengths)
    seeds = range(settings.seeds)
    probes = sgd(data, [chosen["lr"]], seeds, **lengths)
    return chosen | _over_seeds([accuracy(probe, queries) for probe in probes.values()])


def _logistic(data: Training, queries: Features, settings: LinearConfig) -> dict[str, Any]:
    chosen = best_l2(data, settings.l2, settings.held_out, seed=0)
    (probe,) = logistic(data, [chosen["l2"]]).values()
    return chosen | accuracy(probe, queries)._asdict()


def _low_shot(
    data: Training, queries: Features, settings: LinearConfig, share: float
) -> dict[str, Any]:
    chosen, found = [], []
    for seed in range(settings.seeds):
        few = data.only(subset(data.features.labels, share, seed))
        chosen.append(best_l2(few, settings.l2, settings.held_out, seed))
        (probe,) = logistic(few, [chosen[-1]["l2"]]).values()
        found.append(accuracy(probe, queries))
    return {
        "images": len(few.rows),
        "l2": [one["l2"] for one in chosen],
        "held_out_images": chosen[0]["held_out_images"],
    } | _over_seeds(found)


def _over_seeds(found: Sequence[Accuracy]) -> dict[str, Any]:
    top1, top5 = ([getattr(one, name) for one in found] for name in Accuracy._fields)
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    mean = {"top1": statistics.fmean(top1), "top5": statistics.fmean(top5)}
    return mean | {"top1_std": spread, "top1_of_seeds": top1}


def ood(subject: Subject, settings: OodConfig) -> Figures:
    """How well each score tells the held-out images from each other dataset.

    ``results[dataset][score]`` has ``auroc``, ``aupr``, ``fpr95`` and the ends of their bootstrap
    intervals ``auroc_interval`` and so on.
    """
    bank, inside = subject.features("bank"), subject.features("queries")
    _check_labels(subject, bank, "bank")
    scores = fit_scores(
        Fitting(bank, subject.classes, settings.k, settings.l2, device=subject.device)
    )
    own = {name: score(inside.features).numpy() for name, score in scores.items()}
    results: dict[str, Any] = {}
    for part in subject.strangers:
        foreign = subject.features(part).features
        results[part] = {}
        for name, score in scores.items():
            pair = own[name], score(foreign).numpy()
            found: dict[str, Any] = metrics.detection(*pair)._asdict()
            if settings.bootstrap:
                ends = metrics.intervals(*pair, count=settings.bootstrap)
                found |= {f"{figure}_interval": list(pair) for figure, pair in ends.items()}
            results[part][name] = found
    named = {
        f"ood/{figure}_{part}_{name}": found[figure]
        for part, by_score in results.items()
        for name, found in by_score.items()
        for figure in metrics.Detection._fields
    }
    return Figures(results, named)


def collapse(subject: Subject, settings: CollapseConfig) -> Figures:
    """RankMe, spread and uniformity of the held-out images' features."""
    features = subject.features("queries").features.float()
    if len(features) < 2:
        folder = subject.images.parts["queries"].folder
        raise DataError(f"{folder}: one image has no spread, collapse needs two at least")
    results = {
        "rankme": rankme(features),
        "spread": monitors.spread(features).item(),
        "uniformity": uniformity(features),
        "width": features.shape[1],
    }
    named = {f"collapse/{name}": results[name] for name in ("rankme", "spread", "uniformity")}
    return Figures(results, named)


def _check_labels(subject: Subject, part: Features, name: str) -> None:
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= subject.classes:
        folder = subject.images.parts[name].folder
        raise DataError(
            f"{folder}: has labels from {low} to {high}, but {subject.classes} classes: "
            "unlabelled images cannot be classified"
        )


def _knn_columns(results: dict[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): f"{100 * p['top1']:.1f}" for name, p in results.items()}


def _linear_columns(results: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for kind, found in results.items():
        spread = f" ± {100 * found['top1_std']:.1f}" if "top1_std" in found else ""
        cells[kind.replace("_", " ")] = f"{100 * found['top1']:.1f}{spread}"
    return cells


def _ood_columns(results: dict[str, Any]) -> dict[str, str]:
    return {
        f"{part} {name.replace('_', ' ')}": f"{100 * found['auroc']:.1f}/{100 * found['fpr95']:.1f}"
        for part, by_score in results.items()
        for name, found in by_score.items()
    }


def _collapse_columns(results: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:.3g}" for name, value in results.items()}


TASKS: dict[str, Task] = {
    "knn": Task(knn, "k-NN top-1 %", _knn_columns),
    "linear": Task(linear, "linear top-1 %", _linear_columns),
    "ood": Task(ood, "AUROC/FPR95 %", _ood_columns),
    "collapse": Task(collapse, "features", _collapse_columns),
}
