"""What every task is: a function of what is evaluated, and how its results are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.subject import FrozenFeatures

Plot = Callable[[], Figure]
"""Draws when it is called: a picture that nobody writes costs nothing."""


class TaskResult(NamedTuple):
    """What a task finds out."""

    results: dict[str, Any]
    """As JSON values."""
    metrics: dict[str, float]
    """The same by their names on the run's curves, the most telling one first."""
    plots: Mapping[str, Plot] = {}
    """Pictures by name; each becomes ``TASK-STEP-NAME.png`` beside the results."""


class Task(NamedTuple):
    """One task: a function of what is evaluated, and how its results are shown."""

    measure: Callable[[FrozenFeatures, Any], TaskResult]
    title: str
    columns: Callable[[dict[str, Any]], dict[str, str]]
    """The cells of a table's row by the names of their columns."""


def check_labels(subject: FrozenFeatures, part: Features, name: str) -> None:
    """Refuse a part with images that belong to none of the classes.

    Raises:
        DataError: One line with the folder.
    """
    low, high = int(part.labels.min()), int(part.labels.max())
    if low < 0 or high >= subject.classes:
        folder = subject.images.parts[name].folder
        raise DataError(
            f"{folder}: has labels from {low} to {high}, but {subject.classes} classes: "
            "unlabelled images cannot be classified"
        )
