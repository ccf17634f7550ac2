"""Task ``finetune``: accuracy and calibration once the backbone is trained on the labels, too."""

from __future__ import annotations

import statistics

import numpy as np
import torch
from matplotlib.figure import Figure

from vssl_dist.config import FinetuneConfig
from vssl_dist.evaluation.features.extract import extract
from vssl_dist.evaluation.figures import plots
from vssl_dist.evaluation.finetune import FinetuneRun, LabelledImages, choose_lr, finetune
from vssl_dist.evaluation.scores.calibration import Calibration, calibration, outcomes
from vssl_dist.evaluation.scores.probe import accuracy
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.subject import FrozenFeatures
from vssl_dist.evaluation.tasks.base import Results, Task, TaskResult, check_labels
from vssl_dist.models.linear_probe import Probe


def measure_finetune(frozen: FrozenFeatures, task: FinetuneConfig) -> TaskResult:
    """Measure ``top1``, ``top5`` and calibration, means over the seeds, with ``top1_std``.

    ``lr`` is what was chosen on held-out training images, ``held_out`` how it did there.
    """
    images = frozen.images
    labelled = {}
    for split in ("bank", "queries"):
        ids = np.arange(images.count(split))
        labelled[split] = LabelledImages(images.splits[split], ids, frozen.classes, images.reading)
        labels = torch.from_numpy(labelled[split].labels)
        check_labels(frozen, Features(torch.empty(len(labels), 0), labels), split)
    bank = labelled["bank"]
    queries = labelled["queries"]
    choice = choose_lr(frozen.network.load(), bank, task)
    by_seed: list[dict[str, float]] = []
    losses_by_seed = []
    for seed in range(task.seeds):
        run = FinetuneRun(choice["lr"], task.epochs, seed)
        model, losses = finetune(frozen.network.load(), bank, task, run)
        logits = extract(model, queries.dataset, images.reading, ids=queries.ids)
        by_seed.append(_judge(Features(logits.features.float(), logits.labels), frozen.classes))
        losses_by_seed.append(losses)
    results: Results = {
        name: statistics.fmean(figures[name] for figures in by_seed) for name in by_seed[0]
    }
    top1 = [figures["top1"] for figures in by_seed]
    results["top1_std"] = statistics.stdev(top1) if len(top1) > 1 else 0.0
    metrics = {f"finetune/{name}": value for name, value in results.items()}
    results |= choice | {"top1_of_seeds": top1, "losses": losses_by_seed}
    return TaskResult(results, metrics, {"loss": lambda: _plot(losses_by_seed)})


def _judge(logits: Features, classes: int) -> dict[str, float]:
    # Logits are features whose classifier is the identity.
    identity = Probe(torch.eye(classes), torch.zeros(classes))
    return accuracy(identity, logits)._asdict() | calibration(outcomes(*logits))._asdict()


def _plot(losses_by_seed: list[list[float]]) -> Figure:
    figure, (axes,) = plots.empty_figure("fine-tuning")
    curves: dict[str, plots.Curve] = {
        f"seed {seed}": (range(1, len(losses) + 1), losses)
        for seed, losses in enumerate(losses_by_seed)
    }
    plots.draw_lines(axes, curves, x="epoch", y="cross-entropy of training images")
    return figure


def _columns(results: Results) -> dict[str, str]:
    cells = {"top-1": f"{100 * results['top1']:.1f} ± {100 * results['top1_std']:.1f}"}
    cells["lr"] = f"{results['lr']:g}"
    cells["top-5"] = f"{100 * results['top5']:.1f}"
    return cells | {name: f"{results[name]:.3g}" for name in Calibration._fields}


FINETUNE = Task(measure_finetune, "fine-tuned %", _columns)
