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
    CalibrationErrors,
    PredictionOutcomes,
    bin_by_confidence,
    compute_calibration,
    judge_probe_predictions,
)
from vssl_dist.evaluation.scores.logistic import choose_l2_penalty, choose_lr, fit_logistic_probes
from vssl_dist.evaluation.scores.probe import ProbeData, draw_class_share, probe_accuracy
from vssl_dist.evaluation.scores.sgd_probes import train_sgd_probes
from vssl_dist.evaluation.scores.table import LabelledFeatures, TopAccuracy
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import EvaluationTask, TaskFigures, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def measure_linear(frozen_features: FrozenFeatures, task_config: LinearConfig) -> TaskResult:
    """Measure the accuracy of linear classifiers of frozen features.

    They are ``sgd`` or ``lars``, ``logistic``, ``logistic_SHARE`` and ``online``.
    Each has ``top1``, ``top5``, what was chosen on held-out training images and, over the seeds,
    the standard deviation ``top1_std``.  Those of all training images also have ``ece``,
    ``adaptive_ece``, ``brier`` and ``nll`` (means over the seeds) and the bins of all seeds'
    ``reliability``; these are None where a training diverged.  ``online`` is the probe that learnt
    beside the method, as it was at the export; where a teacher is exported it is given the
    teacher's features, though it learnt from the student's.
    """
    bank = frozen_features.split_features("bank")
    queries = frozen_features.split_features("queries")
    check_labels(frozen_features, bank, "bank")
    check_labels(frozen_features, queries, "queries")
    if int(bank.labels.min()) == int(bank.labels.max()):
        raise DataError(
            f"{frozen_features.task_images.dataset_by_split['bank'].folder}: its images are of "
            "one class, there is nothing for a linear probe to tell apart"
        )
    probe_data = ProbeData(
        bank, torch.arange(len(bank.labels)), frozen_features.num_classes, frozen_features.device
    )
    results: TaskFigures = {
        task_config.optimizer: _measure_sgd_probes(probe_data, queries, task_config)
    }
    results["logistic"] = _measure_logistic_probe(probe_data, queries, task_config)
    if (
        online_probe := frozen_features.network.load_online_probe()
    ) is not None and _is_comparable_probe(online_probe, frozen_features):
        results["online"] = probe_accuracy(online_probe, queries)._asdict() | _mean_calibration(
            [online_probe], queries
        )
    for share in task_config.shares:
        results[f"logistic_{share:g}"] = _measure_low_shot(probe_data, queries, task_config, share)
    logged_figures = ("top1", "top5", "top1_std", *CalibrationErrors._fields)
    metrics: dict[str, float] = {}
    for probe_name, figures in results.items():
        prefix = "" if probe_name == task_config.optimizer else f"{probe_name}_"
        names = [name for name in logged_figures if figures.get(name) is not None]
        metrics |= {f"linear/{prefix}{name}": figures[name] for name in names}
    plot_by_name = {
        "choice": lambda: _plot_held_out_choices(results),
        "reliability": lambda: _plot_reliability(results),
    }
    return TaskResult(results, metrics, plot_by_name)


def _is_comparable_probe(online_probe: Probe, frozen_features: FrozenFeatures) -> bool:
    """Whether the online probe learnt the classes of these images.

    Foreign data may have other classes, as many.

    Raises:
        DataError: It is not of this network's features.
    """
    feature_width = frozen_features.split_features("queries").features.shape[1]
    if online_probe.weight.shape[0] != feature_width:
        raise DataError(
            f"the online probe is of {online_probe.weight.shape[0]} features, the backbone has "
            f"{feature_width}: the export is damaged, use another one"
        )
    return (
        not frozen_features.task_images.result_suffix
        and online_probe.weight.shape[1] == frozen_features.num_classes
    )


def _measure_sgd_probes(
    probe_data: ProbeData, queries: LabelledFeatures, task_config: LinearConfig
) -> TaskFigures:
    lr_choice = choose_lr(
        probe_data,
        task_config.lr,
        task_config.held_out,
        epochs=task_config.epochs,
        batch_size=task_config.sgd_batch,
        optimizer=task_config.optimizer,
    )
    probe_by_seed = train_sgd_probes(
        probe_data,
        [lr_choice["lr"]],
        range(task_config.seeds),
        epochs=task_config.epochs,
        batch_size=task_config.sgd_batch,
        optimizer=task_config.optimizer,
    )
    probes = list(probe_by_seed.values())
    accuracies = _mean_accuracy_over_seeds([probe_accuracy(probe, queries) for probe in probes])
    return {**lr_choice, **accuracies, **_mean_calibration(probes, queries)}


def _measure_logistic_probe(
    probe_data: ProbeData, queries: LabelledFeatures, task_config: LinearConfig
) -> TaskFigures:
    l2_choice = choose_l2_penalty(probe_data, task_config.l2, task_config.held_out, seed=0)
    # One fit and no seeds: the objective is convex, only which images are held out is drawn.
    (probe,) = fit_logistic_probes(probe_data, [l2_choice["l2"]]).values()
    return {
        **l2_choice,
        **probe_accuracy(probe, queries)._asdict(),
        **_mean_calibration([probe], queries),
    }


def _measure_low_shot(
    probe_data: ProbeData, queries: LabelledFeatures, task_config: LinearConfig, share: float
) -> TaskFigures:
    l2_choices = []
    accuracies = []
    for seed in range(task_config.seeds):
        few_images_data = probe_data.with_rows(
            draw_class_share(probe_data.features.labels, share, seed)
        )
        l2_choices.append(
            choose_l2_penalty(few_images_data, task_config.l2, task_config.held_out, seed)
        )
        (probe,) = fit_logistic_probes(few_images_data, [l2_choices[-1]["l2"]]).values()
        accuracies.append(probe_accuracy(probe, queries))
    return {
        "images": len(few_images_data.row_numbers),
        "l2": [l2_choice["l2"] for l2_choice in l2_choices],
        "held_out_images": l2_choices[0]["held_out_images"],
    } | _mean_accuracy_over_seeds(accuracies)


def _mean_accuracy_over_seeds(accuracies: Sequence[TopAccuracy]) -> TaskFigures:
    top1 = [accuracy.top1 for accuracy in accuracies]
    top5 = [accuracy.top5 for accuracy in accuracies]
    top1_std = statistics.stdev(top1) if len(top1) > 1 else 0.0
    means = {"top1": statistics.fmean(top1), "top5": statistics.fmean(top5)}
    return means | {"top1_std": top1_std, "top1_of_seeds": top1}


def _mean_calibration(probes: Sequence[Probe], queries: LabelledFeatures) -> TaskFigures:
    if not all(probe.is_finite for probe in probes):
        return dict.fromkeys((*CalibrationErrors._fields, "reliability"))
    outcomes_by_seed = [judge_probe_predictions(probe, queries) for probe in probes]
    values_by_figure = zip(
        *(compute_calibration(seed_outcomes) for seed_outcomes in outcomes_by_seed), strict=True
    )
    means = dict(
        zip(CalibrationErrors._fields, map(statistics.fmean, values_by_figure), strict=True)
    )
    # The bins of one diagram are of all seeds' predictions: each seed alone has few per bin.
    pooled_outcomes = PredictionOutcomes(
        *(np.concatenate(values_by_seed) for values_by_seed in zip(*outcomes_by_seed, strict=True))
    )
    reliability_bins = bin_by_confidence(pooled_outcomes)._asdict()
    return means | {
        "reliability": {name: values.tolist() for name, values in reliability_bins.items()}
    }


def _plot_reliability(results: TaskFigures) -> Figure:
    """Draw accuracy over confidence; points are as large as the bins are full."""
    names = _calibrated_probe_names(results)
    figure, panels = plots.make_empty_figure("reliability", len(names))
    for axes, name in zip(panels, names, strict=True):
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        reliability_bins = results[name]["reliability"]
        ece = results[name]["ece"]
        if reliability_bins is not None:
            marker_sizes = [
                200 * math.sqrt(bin_predictions / sum(reliability_bins["predictions"]))
                for bin_predictions in reliability_bins["predictions"]
            ]
            axes.plot(reliability_bins["confidence"], reliability_bins["accuracy"], linewidth=1)
            axes.scatter(reliability_bins["confidence"], reliability_bins["accuracy"], marker_sizes)
        title = (
            f"{name}: diverged" if reliability_bins is None else f"{name}: ECE {100 * ece:.1f} %"
        )
        axes.set(
            xlabel="confidence",
            ylabel="accuracy",
            title=plots.escape_mathtext(title),
            xlim=(0, 1),
            ylim=(0, 1),
        )
    return figure


def _calibrated_probe_names(results: TaskFigures) -> list[str]:
    return [name for name, figures in results.items() if "ece" in figures]


def _plot_held_out_choices(results: TaskFigures) -> Figure:
    """Draw what was chosen on held-out images, and accuracy over the share of the images."""
    figure, (lr_axes, l2_axes, share_axes) = plots.make_empty_figure("linear probes", 3)
    optimizer = "sgd" if "sgd" in results else "lars"
    for axes, probe_name, x_label in (
        (lr_axes, optimizer, "learning rate"),
        (l2_axes, "logistic", "l2"),
    ):
        top1_by_value = results[probe_name]["held_out"]
        curve = (
            [float(value) for value in top1_by_value],
            [100 * top1 for top1 in top1_by_value.values()],
        )
        plots.draw_lines(
            axes, {probe_name: curve}, x_label=x_label, y_label="held-out top-1 %", log_x=True
        )
    figures_by_share = {
        float(name.partition("_")[2]): figures
        for name, figures in results.items()
        if name.startswith("logistic_")
    }
    figures_by_share[1.0] = results["logistic"]
    shares = sorted(figures_by_share)
    share_axes.errorbar(
        shares,
        [100 * figures_by_share[share]["top1"] for share in shares],
        [100 * figures_by_share[share].get("top1_std", 0.0) for share in shares],
        marker="o",
        capsize=3,
    )
    share_axes.set(xscale="log", xlabel="share of the training images", ylabel="top-1 %")
    plots.set_x_ticks(share_axes, shares)
    return figure


def _table_columns(results: TaskFigures) -> dict[str, str]:
    cell_by_column = {}
    for name, figures in results.items():
        spread = f" ± {100 * figures['top1_std']:.1f}" if "top1_std" in figures else ""
        cell_by_column[name.replace("_", " ")] = f"{100 * figures['top1']:.1f}{spread}"
    for name in _calibrated_probe_names(results):
        ece = results[name]["ece"]
        cell_by_column[f"{name} ECE"] = "diverged" if ece is None else f"{100 * ece:.1f}"
    return cell_by_column


LINEAR = EvaluationTask(measure_linear, "linear top-1 %, ECE %", _table_columns)
