"""What every task is: a function of what is evaluated, and how its results are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from vssl_dist.errors import DataError
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.evaluation.subject import FrozenFeatures

Results = dict[str, Any]
"""Figures of a task as JSON values, nested as the task likes.

They are read back from files that anybody may have written: whoever shows them must expect errors.
"""
Plot = Callable[[], Figure]
"""Draws when it is called: a picture that nobody writes costs nothing."""


class TaskResult(NamedTuple):
    """What a task measured, ready to be written, logged and drawn."""

    results: Results
    """Figures as the result file holds them."""
    metrics: dict[str, float]
    """Figures by their names on the run's curves, the most telling one first."""
    plots: Mapping[str, Plot] = {}
    """Pictures by name; each becomes ``TASK-STEP-NAME.png`` beside the results."""


class Task(NamedTuple):
    """One task: a function of what is evaluated, and how its results are shown."""

    measure: Callable[[FrozenFeatures, Any], TaskResult]
    """Computes the figures; the second argument is the task's own config."""
    title: str
    """What a table of its results is called."""
    columns: Callable[[Results], dict[str, str]]
    """The cells of a table's row by the names of their columns."""


def check_labels(frozen: FrozenFeatures, table: Features, split: str) -> None:
    """Refuse a split with images that belong to none of the classes.

    Raises:
        DataError: One line with the folder.
    """
    low = int(table.labels.min())
    high = int(table.labels.max())
    if low < 0 or high >= frozen.classes:
        folder = frozen.images.splits[split].folder
        raise DataError(
            f"{folder}: has labels from {low} to {high}, but {frozen.classes} classes: "
            "unlabelled images cannot be classified"
        )
