"""Task ``finetune``: accuracy and calibration once the backbone is trained on the labels, too."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vssl_dist.config import FinetuneConfig
from vssl_dist.evaluation.features.extract import extract
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.finetune import FinetuneRun, LabelledImages, choose_lr, finetune
from vssl_dist.evaluation.scores.calibration import (
    Calibration,
    calibration,
    outcomes,
)
from vssl_dist.evaluation.scores.probe import accuracy
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Task, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def tuned(subject: FrozenFeatures, settings: FinetuneConfig) -> TaskResult:
    """``top1``, ``top5`` and calibration, means over the seeds, with ``top1_std``.

    ``lr`` is what was chosen on held-out training images, ``held_out`` how it did there.
    """
    images, parts = subject.images, {}
    for part in ("bank", "queries"):
        ids = np.arange(images.count(part))
        parts[part] = LabelledImages(images.parts[part], ids, subject.classes, images.reading)
        labels = torch.from_numpy(parts[part].labels)
        check_labels(subject, Features(torch.empty(len(labels), 0), labels), part)
    data, queries = parts["bank"], parts["queries"]
    chosen = choose_lr(subject.network.load(), data, settings)
    found: list[dict[str, float]] = []
    curves = {}
    for seed in range(settings.seeds):
        plan = FinetuneRun(chosen["lr"], settings.epochs, seed)
        model, losses = finetune(subject.network.load(), data, settings, plan)
        logits = extract(model, queries.dataset, images.reading, ids=queries.ids)
        found.append(_judged(Features(logits.features.float(), logits.labels), subject.classes))
        curves[f"seed {seed}"] = (range(1, len(losses) + 1), losses)
    results: dict[str, Any] = {
        name: statistics.fmean(one[name] for one in found) for name in found[0]
    }
    top1 = [one["top1"] for one in found]
    results["top1_std"] = statistics.stdev(top1) if len(top1) > 1 else 0.0
    named = {f"finetune/{name}": value for name, value in results.items()}
    results |= chosen | {
        "top1_of_seeds": top1,
        "losses": [losses for _, losses in curves.values()],
    }
    return TaskResult(results, named, {"loss": lambda: _plot(curves)})


def _judged(logits: Features, classes: int) -> dict[str, float]:
    # Logits are features whose classifier is the identity.
    same = Probe(torch.eye(classes), torch.zeros(classes))
    return accuracy(same, logits)._asdict() | calibration(outcomes(*logits))._asdict()


def _plot(curves: dict[str, Any]) -> Figure:
    figure, (axes,) = plots.page("fine-tuning")
    plots.lines(axes, curves, x="epoch", y="cross-entropy of training images")
    return figure


def _columns(results: dict[str, Any]) -> dict[str, str]:
    cells = {"top-1": f"{100 * results['top1']:.1f} ± {100 * results['top1_std']:.1f}"}
    cells["lr"] = f"{results['lr']:g}"
    cells["top-5"] = f"{100 * results['top5']:.1f}"
    return cells | {name: f"{results[name]:.3g}" for name in Calibration._fields}


FINETUNE = Task(tuned, "fine-tuned %", _columns)
