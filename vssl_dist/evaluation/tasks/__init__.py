"""Every task, by the name a config uses.  To add one: write its module, add the line."""

from __future__ import annotations

from vssl_dist.evaluation.tasks.base import DrawPlot, EvaluationTask, TaskResult
from vssl_dist.evaluation.tasks.collapse import COLLAPSE
from vssl_dist.evaluation.tasks.finetune import FINETUNE
from vssl_dist.evaluation.tasks.knn import KNN
from vssl_dist.evaluation.tasks.linear import LINEAR
from vssl_dist.evaluation.tasks.ood import OOD
from vssl_dist.evaluation.tasks.uncertainty import UNCERTAINTY

__all__ = ["TASKS", "DrawPlot", "EvaluationTask", "TaskResult"]

TASKS: dict[str, EvaluationTask] = {
    "knn": KNN,
    "linear": LINEAR,
    "ood": OOD,
    "collapse": COLLAPSE,
    "uncertainty": UNCERTAINTY,
    "finetune": FINETUNE,
}
