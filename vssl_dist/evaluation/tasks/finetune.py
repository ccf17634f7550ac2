"""Task ``finetune``: accuracy and calibration once the backbone is trained on the labels, too."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from vssl_dist.config import FinetuneConfig
from vssl_dist.evaluation import plots
from vssl_dist.evaluation.calibration import Calibration, calibration, outcomes
from vssl_dist.evaluation.features import extract
from vssl_dist.evaluation.finetune import Labelled, finetune
from vssl_dist.evaluation.knn import Features
from vssl_dist.evaluation.probe import Probe, accuracy
from vssl_dist.evaluation.subject import Subject
from vssl_dist.evaluation.tasks.base import Figures, Task, check_labels


def tuned(subject: Subject, settings: FinetuneConfig) -> Figures:
    """``top1``, ``top5`` and calibration, means over the seeds, with ``top1_std``."""
    images = subject.images
    dataset, queries = images.parts["bank"], images.parts["queries"]
    for part in ("bank", "queries"):
        rows = images.parts[part].rows(np.arange(images.count(part)))
        labels = torch.from_numpy(rows["label"].astype(np.int64))
        check_labels(subject, Features(torch.empty(len(labels), 0), labels), part)
    data = Labelled(dataset, images.count("bank"), subject.classes, images.reading)
    found: list[dict[str, float]] = []
    curves = {}
    for seed in range(settings.seeds):
        model, losses = finetune(subject.network.load(), data, settings, seed)
        logits = extract(model, queries, images.reading, limit=images.limits["queries"])
        found.append(_judged(Features(logits.features.float(), logits.labels), subject.classes))
        curves[f"seed {seed}"] = (range(1, len(losses) + 1), losses)
    results: dict[str, Any] = {
        name: statistics.fmean(one[name] for one in found) for name in found[0]
    }
    top1 = [one["top1"] for one in found]
    results["top1_std"] = statistics.stdev(top1) if len(top1) > 1 else 0.0
    named = {f"finetune/{name}": value for name, value in results.items()}
    results |= {"top1_of_seeds": top1, "losses": [losses for _, losses in curves.values()]}
    return Figures(results, named, {"loss": lambda: _plot(curves)})


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
    cells["top-5"] = f"{100 * results['top5']:.1f}"
    return cells | {name: f"{results[name]:.3g}" for name in Calibration._fields}


FINETUNE = Task(tuned, "fine-tuned %", _columns)
