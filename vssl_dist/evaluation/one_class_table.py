"""One-class anomaly detection in one table: the ``ood`` results of many trainings, averaged.

Each class is normal in turn: a network learns from its training images alone, and its scores
tell its held-out images from those of all other classes.  The figure that papers compare is the
mean over the classes of the area under the ROC curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from vssl_dist import text
from vssl_dist.evaluation.figures.plots import literal
from vssl_dist.exports.results import shown

OTHERS = "others"
"""Name of the held-out images of the other classes in an ``ood`` result."""
MEAN = "mean"
"""Name of the row, or the group of bars, that averages all classes."""

Scores = Mapping[str, float]
"""AUROC by score."""


@dataclass(frozen=True)
class ClassResult:
    """How well the network trained on one class tells it from the others."""

    class_name: str
    result: dict[str, Any]
    """The result that task ``ood`` wrote, as it was read."""
    baselines: dict[str, Any] = field(default_factory=dict)
    """The task's ``results`` for raw pixels and the untrained network, if they were computed."""
    seconds: float = 0.0
    """Time that training and evaluation took."""

    def auroc(self, baseline: str | None = None) -> dict[str, float]:
        """AUROC of each score, of the trained network or of a baseline."""
        results = self.baselines[baseline] if baseline else shown(self.result)
        return {score: figures["auroc"] for score, figures in results[OTHERS].items()}


def mean_auroc(rows: Sequence[Scores]) -> dict[str, float]:
    """Average each score that all rows have, in the order of the first row.

    >>> mean_auroc([{"knn": 0.5, "s1": 0.9}, {"knn": 0.7}])
    {'knn': 0.6}
    """
    # Means over different classes could not be compared.
    shared = [score for score in rows[0] if all(score in row for row in rows)]
    return {score: statistics.fmean(row[score] for row in rows) for score in shared}


def summarise(method: str, class_results: Sequence[ClassResult]) -> dict[str, dict[str, float]]:
    """Average AUROC by score: of each baseline, then of the method."""
    by_network = {
        baseline: [one_class.auroc(baseline) for one_class in class_results]
        for baseline in _shared_baselines(class_results)
    }
    by_network[method] = _auroc_rows(class_results)
    return {network: mean_auroc(rows) for network, rows in by_network.items()}


def markdown_table(method: str, class_results: Sequence[ClassResult], footnote: str) -> str:
    """Write two tables: the means, and each class.

    Args:
        method: What to call the trained networks.
        class_results: One per class.
        footnote: Where the figures come from.
    """
    return (
        f"AUROC %, mean over {len(class_results)} one-class trainings\n\n"
        f"{_table('features', summarise(method, class_results))}\n"
        f"{method}, by the class that is normal\n\n"
        f"{_table('class', _by_class(class_results))}\n{footnote}\n"
    )


def bar_chart(method: str, class_results: Sequence[ClassResult]) -> Figure:
    """Draw a group of bars per class and one for the mean, a bar per score."""
    groups = _by_class(class_results)
    scores = _score_names(groups.values())
    # Bounded, because there may be a thousand classes.
    width = min(40.0, max(8.0, 2 + 0.18 * len(groups) * (len(scores) + 1)))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bar_width = 0.85 / len(scores)
    for index, score in enumerate(scores):
        points = [(x, row[score]) for x, row in enumerate(groups.values()) if score in row]
        centres = [x + (index - (len(scores) - 1) / 2) * bar_width for x, _ in points]
        heights = [100 * value for _, value in points]
        axes.bar(centres, heights, bar_width, label=literal(_words(score)))
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":")
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)
    axes.set_xticks(range(len(groups)), list(map(literal, groups)), rotation=30, ha="right")
    axes.set(
        ylim=(0, 100), ylabel="AUROC %", title=literal(f"{method}: one class against all others")
    )
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    return figure


def _auroc_rows(class_results: Sequence[ClassResult]) -> list[dict[str, float]]:
    return [one_class.auroc() for one_class in class_results]


def _by_class(class_results: Sequence[ClassResult]) -> dict[str, dict[str, float]]:
    """AUROC by score of each class, and in the last row their mean."""
    rows = {one_class.class_name: one_class.auroc() for one_class in class_results}
    return rows | {MEAN: mean_auroc(_auroc_rows(class_results))}


def _shared_baselines(class_results: Sequence[ClassResult]) -> list[str]:
    """Names of the baselines that every class has."""
    return [
        name
        for name in class_results[0].baselines
        if all(name in one_class.baselines for one_class in class_results)
    ]


def _score_names(rows: Iterable[Scores]) -> list[str]:
    """Every score that some row has, in the order of the rows."""
    return list(dict.fromkeys(score for row in rows for score in row))


def _table(title: str, rows: Mapping[str, Scores]) -> str:
    columns = _score_names(rows.values())
    lines = [
        f"| {title} | {' | '.join(map(_markdown_cell, columns))} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = (f"{100 * row[score]:.1f}" if score in row else "" for score in columns)
        lines.append(f"| {_markdown_cell(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_cell(name: str) -> str:
    """Escape a name for a cell of Markdown: a class may be called anything."""
    return text.markdown(" ".join(_words(name).split()))


def _words(name: str) -> str:
    return name.replace("_", " ")
