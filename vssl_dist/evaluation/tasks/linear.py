"""Task ``linear``: classifiers of frozen features by SGD and logistic regression, and low-shot.

Accuracy, and for the first two calibration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vssl_dist.config import LinearConfig
from vssl_dist.errors import DataError
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.scores.calibration import (
    Calibration,
    Outcomes,
    calibration,
    outcomes_of,
    reliability,
)
from vssl_dist.evaluation.scores.logistic import (
    best_l2,
    best_lr,
    logistic,
)
from vssl_dist.evaluation.scores.probe import Training, accuracy, subset
from vssl_dist.evaluation.scores.sgd_probes import descend
from vssl_dist.evaluation.scores.table import Accuracy, Features
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Task, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def linear(subject: FrozenFeatures, settings: LinearConfig) -> TaskResult:
    """Accuracy of linear classifiers: ``sgd`` or ``lars``, ``logistic``, ``logistic_SHARE`` and
    ``online``.

    Each has ``top1``, ``top5``, what was chosen on held-out training images and, over the seeds,
    the standard deviation ``top1_std``.  Those of all training images also have ``ece``,
    ``adaptive_ece``, ``brier`` and ``nll`` (means over the seeds) and the bins of all seeds'
    ``reliability``; these are None where a training diverged.  ``online`` is the probe that learnt
    beside the method, as it was at the export; where a teacher is exported it is given the
    teacher's features, though it learnt from the student's.
    """
    bank, queries = subject.features("bank"), subject.features("queries")
    check_labels(subject, bank, "bank")
    check_labels(subject, queries, "queries")
    if int(bank.labels.min()) == int(bank.labels.max()):
        raise DataError(
            f"{subject.images.parts['bank'].folder}: its images are of one class, "
            "there is nothing for a linear probe to tell apart"
        )
    data = Training(bank, torch.arange(len(bank.labels)), subject.classes, subject.device)
    results: dict[str, Any] = {settings.optimizer: _descent(data, queries, settings)}
    results["logistic"] = _logistic(data, queries, settings)
    if (online := subject.network.online()) is not None and _fits(online, subject):
        results["online"] = accuracy(online, queries)._asdict() | _calibrated([online], queries)
    for share in settings.shares:
        results[f"logistic_{share:g}"] = _low_shot(data, queries, settings, share)
    shown = ("top1", "top5", "top1_std", *Calibration._fields)
    named: dict[str, float] = {}
    for kind, found in results.items():
        prefix = "" if kind == settings.optimizer else f"{kind}_"
        known = [name for name in shown if found.get(name) is not None]
        named |= {f"linear/{prefix}{name}": found[name] for name in known}
    pictures = {"choice": lambda: _choice(results), "reliability": lambda: _reliability(results)}
    return TaskResult(results, named, pictures)


def _fits(online: Probe, subject: FrozenFeatures) -> bool:
    """Whether the classes are those that it learnt: foreign data may have as many others.

    Raises:
        DataError: It is not of this network's features.
    """
    width = subject.features("queries").features.shape[1]
    if online.weight.shape[0] != width:
        raise DataError(
            f"the online probe is of {online.weight.shape[0]} features, the backbone has {width}: "
            "the export is damaged, use another one"
        )
    return not subject.images.suffix and online.weight.shape[1] == subject.classes


def _descent(data: Training, queries: Features, settings: LinearConfig) -> dict[str, Any]:
    descent: dict[str, Any] = {
        "epochs": settings.epochs,
        "batch": settings.sgd_batch,
        "optimizer": settings.optimizer,
    }
    chosen = best_lr(data, settings.lr, settings.held_out, **descent)
    seeds = range(settings.seeds)
    probes = descend(data, [chosen["lr"]], seeds, **descent)
    found = _over_seeds([accuracy(probe, queries) for probe in probes.values()])
    return chosen | found | _calibrated(list(probes.values()), queries)


def _logistic(data: Training, queries: Features, settings: LinearConfig) -> dict[str, Any]:
    chosen = best_l2(data, settings.l2, settings.held_out, seed=0)
    (probe,) = logistic(data, [chosen["l2"]]).values()
    return chosen | accuracy(probe, queries)._asdict() | _calibrated([probe], queries)


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


def _calibrated(probes: Sequence[Probe], queries: Features) -> dict[str, Any]:
    if not all(probe.finite for probe in probes):
        return dict.fromkeys((*Calibration._fields, "reliability"))
    found = [outcomes_of(probe, queries) for probe in probes]
    each = zip(*(calibration(one) for one in found), strict=True)
    means = dict(zip(Calibration._fields, (statistics.fmean(one) for one in each), strict=True))
    together = Outcomes(*(np.concatenate(values) for values in zip(*found, strict=True)))
    bins = reliability(together)._asdict()
    return means | {"reliability": {name: values.tolist() for name, values in bins.items()}}


def _reliability(results: dict[str, Any]) -> Figure:
    """Accuracy over confidence; points are as large as the bins are full."""
    kinds = _calibrated_kinds(results)
    figure, panels = plots.page("reliability", len(kinds))
    for axes, kind in zip(panels, kinds, strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        bins, error = results[kind]["reliability"], results[kind]["ece"]
        if bins is not None:
            sizes = [200 * math.sqrt(n / sum(bins["predictions"])) for n in bins["predictions"]]
            axes.plot(bins["confidence"], bins["accuracy"], linewidth=1)
            axes.scatter(bins["confidence"], bins["accuracy"], sizes)
        title = f"{kind}: diverged" if bins is None else f"{kind}: ECE {100 * error:.1f} %"
        axes.set(
            xlabel="confidence",
            ylabel="accuracy",
            title=plots.literal(title),
            xlim=(0, 1),
            ylim=(0, 1),
        )
    return figure


def _calibrated_kinds(results: dict[str, Any]) -> list[str]:
    return [kind for kind, found in results.items() if "ece" in found]


def _choice(results: dict[str, Any]) -> Figure:
    """What was chosen among, on held-out training images, and accuracy over the share of them."""
    figure, (rates, penalties, shares) = plots.page("linear probes", 3)
    descent = "sgd" if "sgd" in results else "lars"
    for axes, kind, name in ((rates, descent, "learning rate"), (penalties, "logistic", "l2")):
        tried = results[kind]["held_out"]
        points = [float(value) for value in tried], [100 * one for one in tried.values()]
        plots.lines(axes, {kind: points}, x=name, y="held-out top-1 %", log=True)
    few = {float(k.partition("_")[2]): v for k, v in results.items() if k.startswith("logistic_")}
    few[1.0] = results["logistic"]
    order = sorted(few)
    shares.errorbar(
        order,
        [100 * few[share]["top1"] for share in order],
        [100 * few[share].get("top1_std", 0.0) for share in order],
        marker="o",
        capsize=3,
    )
    shares.set(xscale="log", xlabel="share of the training images", ylabel="top-1 %")
    plots.ticks(shares, order)
    return figure


def _columns(results: dict[str, Any]) -> dict[str, str]:
    cells = {}
    for kind, found in results.items():
        spread = f" ± {100 * found['top1_std']:.1f}" if "top1_std" in found else ""
        cells[kind.replace("_", " ")] = f"{100 * found['top1']:.1f}{spread}"
    for kind in _calibrated_kinds(results):
        error = results[kind]["ece"]
        cells[f"{kind} ECE"] = "diverged" if error is None else f"{100 * error:.1f}"
    return cells


LINEAR = Task(linear, "linear top-1 %, ECE %", _columns)
