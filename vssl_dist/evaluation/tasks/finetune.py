"""Task ``finetune``: accuracy and calibration once the backbone is trained on the labels, too."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from matplotlib.figure import Figure

from vssl_dist.config import FinetuneConfig
from vssl_dist.evaluation.features.extract import extract_features
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.finetune import FinetuneRun, LabelledImages, choose_lr, finetune
from vssl_dist.evaluation.scores.calibration import (
    CalibrationErrors,
    compute_calibration,
    judge_predictions,
)
from vssl_dist.evaluation.scores.probe import probe_accuracy
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import EvaluationTask, TaskFigures, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def measure_finetune(frozen_features: FrozenFeatures, task_config: FinetuneConfig) -> TaskResult:
    """Measure ``top1``, ``top5`` and calibration, means over the seeds, with ``top1_std``.

    ``lr`` is what was chosen on held-out training images, ``held_out`` how it did there.
    """
    images = frozen_features.task_images
    labelled_by_split = {}
    for split_name in ("bank", "queries"):
        ids = np.arange(images.image_count(split_name))
        labelled_by_split[split_name] = LabelledImages(
            images.dataset_by_split[split_name], ids, frozen_features.num_classes, images.reading
        )
        labels = torch.from_numpy(labelled_by_split[split_name].labels)
        check_labels(
            frozen_features, LabelledFeatures(torch.empty(len(labels), 0), labels), split_name
        )
    bank = labelled_by_split["bank"]
    queries = labelled_by_split["queries"]
    choice = choose_lr(frozen_features.network.load_network(), bank, task_config)
    figures_by_seed: list[dict[str, float]] = []
    losses_by_seed = []
    for seed in range(task_config.seeds):
        training_run = FinetuneRun(choice["lr"], task_config.epochs, seed)
        classifier, mean_losses = finetune(
            frozen_features.network.load_network(), bank, task_config, training_run
        )
        logits = extract_features(classifier, queries.dataset, images.reading, ids=queries.ids)
        figures_by_seed.append(
            _accuracy_and_calibration(
                LabelledFeatures(logits.features.float(), logits.labels),
                frozen_features.num_classes,
            )
        )
        losses_by_seed.append(mean_losses)
    results: TaskFigures = {
        name: statistics.fmean(figures[name] for figures in figures_by_seed)
        for name in figures_by_seed[0]
    }
    top1_by_seed = [figures["top1"] for figures in figures_by_seed]
    results["top1_std"] = statistics.stdev(top1_by_seed) if len(top1_by_seed) > 1 else 0.0
    metrics = {f"finetune/{name}": value for name, value in results.items()}
    results |= choice | {"top1_of_seeds": top1_by_seed, "losses": losses_by_seed}
    return TaskResult(results, metrics, {"loss": lambda: _plot_losses(losses_by_seed)})


def _accuracy_and_calibration(logits: LabelledFeatures, class_count: int) -> dict[str, float]:
    # Logits are features whose classifier is the identity.
    identity_probe = Probe(torch.eye(class_count), torch.zeros(class_count))
    return (
        probe_accuracy(identity_probe, logits)._asdict()
        | compute_calibration(judge_predictions(*logits))._asdict()
    )


def _plot_losses(losses_by_seed: list[list[float]]) -> Figure:
    figure, (axes,) = plots.make_empty_figure("fine-tuning")
    curves: dict[str, plots.Curve] = {
        f"seed {seed}": (range(1, len(losses) + 1), losses)
        for seed, losses in enumerate(losses_by_seed)
    }
    plots.draw_lines(axes, curves, x_label="epoch", y_label="cross-entropy of training images")
    return figure


def _table_columns(results: TaskFigures) -> dict[str, str]:
    cell_by_column = {"top-1": f"{100 * results['top1']:.1f} ± {100 * results['top1_std']:.1f}"}
    cell_by_column["lr"] = f"{results['lr']:g}"
    cell_by_column["top-5"] = f"{100 * results['top5']:.1f}"
    return cell_by_column | {name: f"{results[name]:.3g}" for name in CalibrationErrors._fields}


FINETUNE = EvaluationTask(measure_finetune, "fine-tuned %", _table_columns)
