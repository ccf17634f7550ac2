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
from vssl_dist.evaluation.figures.plots import escape_mathtext
from vssl_dist.exports.results import results_named_by_density

OTHER_CLASSES_SPLIT = "others"
"""Name of the held-out images of the other classes in an ``ood`` result."""
MEAN_ROW_NAME = "mean"
"""Name of the row, or the group of bars, that averages all classes."""

AurocByScore = Mapping[str, float]
"""AUROC by score."""


@dataclass(frozen=True)
class ClassResult:
    """How well the network trained on one class tells it from the others."""

    class_name: str
    ood_result: dict[str, Any]
    """The result that task ``ood`` wrote, as it was read."""
    baseline_results: dict[str, Any] = field(default_factory=dict)
    """The task's ``results`` for raw pixels and the untrained network, if they were computed."""
    total_s: float = 0.0
    """Time that training and evaluation took."""

    def auroc_by_score(self, baseline_name: str | None = None) -> dict[str, float]:
        """AUROC of each score, of the trained network or of a baseline."""
        figures_by_split = (
            self.baseline_results[baseline_name]
            if baseline_name
            else results_named_by_density(self.ood_result)
        )
        return {
            score: score_figures["auroc"]
            for score, score_figures in figures_by_split[OTHER_CLASSES_SPLIT].items()
        }


def mean_auroc(auroc_rows: Sequence[AurocByScore]) -> dict[str, float]:
    """Average each score that all rows have, in the order of the first row.

    >>> mean_auroc([{"knn": 0.5, "s1": 0.9}, {"knn": 0.7}])
    {'knn': 0.6}
    """
    # Means over different classes could not be compared.
    shared_scores = [score for score in auroc_rows[0] if all(score in row for row in auroc_rows)]
    return {score: statistics.fmean(row[score] for row in auroc_rows) for score in shared_scores}


def mean_auroc_by_network(
    method_name: str, class_results: Sequence[ClassResult]
) -> dict[str, dict[str, float]]:
    """Average AUROC by score: of each baseline, then of the method."""
    auroc_rows_by_network = {
        baseline: [one_class.auroc_by_score(baseline) for one_class in class_results]
        for baseline in _shared_baselines(class_results)
    }
    auroc_rows_by_network[method_name] = _auroc_of_each_class(class_results)
    return {
        network: mean_auroc(auroc_rows) for network, auroc_rows in auroc_rows_by_network.items()
    }


def markdown_table(method: str, class_results: Sequence[ClassResult], footnote: str) -> str:
    """Write two tables: the means, and each class.

    Args:
        method: What to call the trained networks.
        class_results: One per class.
        footnote: Where the figures come from.
    """
    return (
        f"AUROC %, mean over {len(class_results)} one-class trainings\n\n"
        f"{_auroc_table('features', mean_auroc_by_network(method, class_results))}\n"
        f"{method}, by the class that is normal\n\n"
        f"{_auroc_table('class', _auroc_by_class(class_results))}\n{footnote}\n"
    )


def draw_auroc_bars(method: str, class_results: Sequence[ClassResult]) -> Figure:
    """Draw a group of bars per class and one for the mean, a bar per score."""
    auroc_by_class = _auroc_by_class(class_results)
    scores = _all_score_names(auroc_by_class.values())
    # Bounded, because there may be a thousand classes.
    figure_width = min(40.0, max(8.0, 2 + 0.18 * len(auroc_by_class) * (len(scores) + 1)))
    figure = Figure(figsize=(figure_width, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bar_width = 0.85 / len(scores)
    for score_index, score in enumerate(scores):
        class_aurocs = [
            (x, row[score]) for x, row in enumerate(auroc_by_class.values()) if score in row
        ]
        bar_centres = [
            x + (score_index - (len(scores) - 1) / 2) * bar_width for x, _ in class_aurocs
        ]
        bar_heights = [100 * auroc for _, auroc in class_aurocs]
        axes.bar(
            bar_centres, bar_heights, bar_width, label=escape_mathtext(_without_underscores(score))
        )
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":")
    axes.axvline(len(auroc_by_class) - 1.5, color="0.8", linewidth=1)
    axes.set_xticks(
        range(len(auroc_by_class)),
        list(map(escape_mathtext, auroc_by_class)),
        rotation=30,
        ha="right",
    )
    axes.set(
        ylim=(0, 100),
        ylabel="AUROC %",
        title=escape_mathtext(f"{method}: one class against all others"),
    )
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    return figure


def _auroc_of_each_class(class_results: Sequence[ClassResult]) -> list[dict[str, float]]:
    return [one_class.auroc_by_score() for one_class in class_results]


def _auroc_by_class(class_results: Sequence[ClassResult]) -> dict[str, dict[str, float]]:
    """AUROC by score of each class, and in the last row their mean."""
    auroc_by_class = {
        one_class.class_name: one_class.auroc_by_score() for one_class in class_results
    }
    return auroc_by_class | {MEAN_ROW_NAME: mean_auroc(_auroc_of_each_class(class_results))}


def _shared_baselines(class_results: Sequence[ClassResult]) -> list[str]:
    """Names of the baselines that every class has."""
    return [
        name
        for name in class_results[0].baseline_results
        if all(name in one_class.baseline_results for one_class in class_results)
    ]


def _all_score_names(auroc_rows: Iterable[AurocByScore]) -> list[str]:
    """Every score that some row has, in the order of the rows."""
    return list(dict.fromkeys(score for auroc_by_score in auroc_rows for score in auroc_by_score))


def _auroc_table(name_column_title: str, auroc_by_row: Mapping[str, AurocByScore]) -> str:
    score_names = _all_score_names(auroc_by_row.values())
    lines = [
        f"| {name_column_title} | {' | '.join(map(_markdown_cell, score_names))} |",
        "|---" * (len(score_names) + 1) + "|",
    ]
    for name, auroc_by_score in auroc_by_row.items():
        cells = (
            f"{100 * auroc_by_score[score]:.1f}" if score in auroc_by_score else ""
            for score in score_names
        )
        lines.append(f"| {_markdown_cell(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _markdown_cell(name: str) -> str:
    """Escape a name for a cell of Markdown: a class may be called anything."""
    return text.escape_markdown(" ".join(_without_underscores(name).split()))


def _without_underscores(name: str) -> str:
    return name.replace("_", " ")
