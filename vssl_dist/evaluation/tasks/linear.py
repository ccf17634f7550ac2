"""Task ``linear``: classifiers of frozen features by SGD and logistic regression, and low-shot.

Accuracy, and for the first two calibration.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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
    probe_outcomes,
    reliability,
)
from vssl_dist.evaluation.scores.logistic import choose_l2, choose_lr, fit_logistic
from vssl_dist.evaluation.scores.probe import ProbeData, accuracy, subset
from vssl_dist.evaluation.scores.sgd_probes import train_sgd_probes
from vssl_dist.evaluation.scores.table import Accuracy, Features
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Results, Task, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def measure_linear(frozen: FrozenFeatures, task: LinearConfig) -> TaskResult:
    """Measure the accuracy of linear classifiers of frozen features.

    They are ``sgd`` or ``lars``, ``logistic``, ``logistic_SHARE`` and ``online``.
    Each has ``top1``, ``top5``, what was chosen on held-out training images and, over the seeds,
    the standard deviation ``top1_std``.  Those of all training images also have ``ece``,
    ``adaptive_ece``, ``brier`` and ``nll`` (means over the seeds) and the bins of all seeds'
    ``reliability``; these are None where a training diverged.  ``online`` is the probe that learnt
    beside the method, as it was at the export; where a teacher is exported it is given the
    teacher's features, though it learnt from the student's.
    """
    bank = frozen.features("bank")
    queries = frozen.features("queries")
    check_labels(frozen, bank, "bank")
    check_labels(frozen, queries, "queries")
    if int(bank.labels.min()) == int(bank.labels.max()):
        raise DataError(
            f"{frozen.images.splits['bank'].folder}: its images are of one class, "
            "there is nothing for a linear probe to tell apart"
        )
    data = ProbeData(bank, torch.arange(len(bank.labels)), frozen.classes, frozen.device)
    results: Results = {task.optimizer: _sgd(data, queries, task)}
    results["logistic"] = _logistic(data, queries, task)
    if (online := frozen.network.online()) is not None and _is_comparable(online, frozen):
        results["online"] = accuracy(online, queries)._asdict() | _calibration([online], queries)
    for share in task.shares:
        results[f"logistic_{share:g}"] = _low_shot(data, queries, task, share)
    logged = ("top1", "top5", "top1_std", *Calibration._fields)
    metrics: dict[str, float] = {}
    for probe_name, figures in results.items():
        prefix = "" if probe_name == task.optimizer else f"{probe_name}_"
        names = [name for name in logged if figures.get(name) is not None]
        metrics |= {f"linear/{prefix}{name}": figures[name] for name in names}
    drawn = {
        "choice": lambda: _plot_choice(results),
        "reliability": lambda: _plot_reliability(results),
    }
    return TaskResult(results, metrics, drawn)


def _is_comparable(online: Probe, frozen: FrozenFeatures) -> bool:
    """Whether the classes are those that it learnt: foreign data may have as many others.

    Raises:
        DataError: It is not of this network's features.
    """
    width = frozen.features("queries").features.shape[1]
    if online.weight.shape[0] != width:
        raise DataError(
            f"the online probe is of {online.weight.shape[0]} features, the backbone has {width}: "
            "the export is damaged, use another one"
        )
    return not frozen.images.suffix and online.weight.shape[1] == frozen.classes


def _sgd(data: ProbeData, queries: Features, task: LinearConfig) -> Results:
    choice = choose_lr(
        data,
        task.lr,
        task.held_out,
        epochs=task.epochs,
        batch=task.sgd_batch,
        optimizer=task.optimizer,
    )
    by_seed = train_sgd_probes(
        data,
        [choice["lr"]],
        range(task.seeds),
        epochs=task.epochs,
        batch=task.sgd_batch,
        optimizer=task.optimizer,
    )
    probes = list(by_seed.values())
    accuracies = _over_seeds([accuracy(probe, queries) for probe in probes])
    return {**choice, **accuracies, **_calibration(probes, queries)}


def _logistic(data: ProbeData, queries: Features, task: LinearConfig) -> Results:
    choice = choose_l2(data, task.l2, task.held_out, seed=0)
    # One fit and no seeds: the objective is convex, only which images are held out is drawn.
    (probe,) = fit_logistic(data, [choice["l2"]]).values()
    return {**choice, **accuracy(probe, queries)._asdict(), **_calibration([probe], queries)}


def _low_shot(data: ProbeData, queries: Features, task: LinearConfig, share: float) -> Results:
    choices = []
    accuracies = []
    for seed in range(task.seeds):
        few = data.with_rows(subset(data.features.labels, share, seed))
        choices.append(choose_l2(few, task.l2, task.held_out, seed))
        (probe,) = fit_logistic(few, [choices[-1]["l2"]]).values()
        accuracies.append(accuracy(probe, queries))
    return {
        "images": len(few.rows),
        "l2": [choice["l2"] for choice in choices],
        "held_out_images": choices[0]["held_out_images"],
    } | _over_seeds(accuracies)


def _over_seeds(accuracies: Sequence[Accuracy]) -> Results:
    top1 = [seed.top1 for seed in accuracies]
    top5 = [seed.top5 for seed in accuracies]
    spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
    means = {"top1": statistics.fmean(top1), "top5": statistics.fmean(top5)}
    return means | {"top1_std": spread, "top1_of_seeds": top1}


def _calibration(probes: Sequence[Probe], queries: Features) -> Results:
    if not all(probe.is_finite for probe in probes):
        return dict.fromkeys((*Calibration._fields, "reliability"))
    outcomes = [probe_outcomes(probe, queries) for probe in probes]
    by_figure = zip(*(calibration(of_seed) for of_seed in outcomes), strict=True)
    means = dict(zip(Calibration._fields, map(statistics.fmean, by_figure), strict=True))
    # The bins of one diagram are of all seeds' predictions: each seed alone has few per bin.
    pooled = Outcomes(*(np.concatenate(column) for column in zip(*outcomes, strict=True)))
    bins = reliability(pooled)._asdict()
    return means | {"reliability": {name: values.tolist() for name, values in bins.items()}}


def _plot_reliability(results: Results) -> Figure:
    """Draw accuracy over confidence; points are as large as the bins are full."""
    names = _calibrated_probes(results)
    figure, panels = plots.empty_figure("reliability", len(names))
    for axes, name in zip(panels, names, strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        bins = results[name]["reliability"]
        ece = results[name]["ece"]
        if bins is not None:
            sizes = [200 * math.sqrt(n / sum(bins["predictions"])) for n in bins["predictions"]]
            axes.plot(bins["confidence"], bins["accuracy"], linewidth=1)
            axes.scatter(bins["confidence"], bins["accuracy"], sizes)
        title = f"{name}: diverged" if bins is None else f"{name}: ECE {100 * ece:.1f} %"
        axes.set(
            xlabel="confidence",
            ylabel="accuracy",
            title=plots.literal(title),
            xlim=(0, 1),
            ylim=(0, 1),
        )
    return figure


def _calibrated_probes(results: Results) -> list[str]:
    return [name for name, figures in results.items() if "ece" in figures]


def _plot_choice(results: Results) -> Figure:
    """Draw what was chosen on held-out images, and accuracy over the share of the images."""
    figure, (lr_axes, l2_axes, share_axes) = plots.empty_figure("linear probes", 3)
    optimizer = "sgd" if "sgd" in results else "lars"
    for axes, probe_name, x in (
        (lr_axes, optimizer, "learning rate"),
        (l2_axes, "logistic", "l2"),
    ):
        top1_by_value = results[probe_name]["held_out"]
        curve = (
            [float(value) for value in top1_by_value],
            [100 * top1 for top1 in top1_by_value.values()],
        )
        plots.draw_lines(axes, {probe_name: curve}, x=x, y="held-out top-1 %", log=True)
    by_share = {
        float(name.partition("_")[2]): figures
        for name, figures in results.items()
        if name.startswith("logistic_")
    }
    by_share[1.0] = results["logistic"]
    shares = sorted(by_share)
    share_axes.errorbar(
        shares,
        [100 * by_share[share]["top1"] for share in shares],
        [100 * by_share[share].get("top1_std", 0.0) for share in shares],
        marker="o",
        capsize=3,
    )
    share_axes.set(xscale="log", xlabel="share of the training images", ylabel="top-1 %")
    plots.set_ticks(share_axes, shares)
    return figure


def _columns(results: Results) -> dict[str, str]:
    cells = {}
    for name, figures in results.items():
        spread = f" ± {100 * figures['top1_std']:.1f}" if "top1_std" in figures else ""
        cells[name.replace("_", " ")] = f"{100 * figures['top1']:.1f}{spread}"
    for name in _calibrated_probes(results):
        ece = results[name]["ece"]
        cells[f"{name} ECE"] = "diverged" if ece is None else f"{100 * ece:.1f}"
    return cells


LINEAR = Task(measure_linear, "linear top-1 %, ECE %", _columns)
