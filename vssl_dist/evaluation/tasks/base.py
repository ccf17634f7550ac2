"""What every task is: a function of what is evaluated, and how its results are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.subject import FrozenFeatures

TaskFigures = dict[str, Any]
"""Figures of a task as JSON values, nested as the task likes.

They are read back from files that anybody may have written: whoever shows them must expect errors.
"""
DrawPlot = Callable[[], Figure]
"""Draws when it is called: a picture that nobody writes costs nothing."""


class TaskResult(NamedTuple):
    """What a task measured, ready to be written, logged and drawn."""

    results: TaskFigures
    """Figures as the result file holds them."""
    metrics: dict[str, float]
    """Figures by their names on the run's curves, the most telling one first."""
    plot_by_name: Mapping[str, DrawPlot] = {}
    """Pictures by name; each becomes ``TASK-STEP-NAME.png`` beside the results."""


class EvaluationTask(NamedTuple):
    """One task: a function of what is evaluated, and how its results are shown."""

    measure: Callable[[FrozenFeatures, Any], TaskResult]
    """Computes the figures; the second argument is the task's own config."""
    table_title: str
    """What a table of its results is called."""
    table_columns: Callable[[TaskFigures], dict[str, str]]
    """The cells of a table's row by the names of their columns."""


def check_labels(
    frozen_features: FrozenFeatures, labelled_features: LabelledFeatures, split_name: str
) -> None:
    """Refuse a split with images that belong to none of the classes.

    Raises:
        DataError: One line with the folder.
    """
    lowest_label = int(labelled_features.labels.min())
    highest_label = int(labelled_features.labels.max())
    if lowest_label < 0 or highest_label >= frozen_features.num_classes:
        folder = frozen_features.task_images.dataset_by_split[split_name].folder
        raise DataError(
            f"{folder}: has labels from {lowest_label} to {highest_label}, but "
            f"{frozen_features.num_classes} classes: "
            "unlabelled images cannot be classified"
        )
