"""One-class anomaly detection in one table: what many trainings' ``ood`` results come to.

Each class is normal in turn: a network learns from its training images alone, and its scores
tell its held-out images from those of all other classes.  The figure that papers compare is the
mean over the classes of the area under the ROC curve.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from vssl_dist import text
from vssl_dist.evaluation.figures.plots import literal
from vssl_dist.exports.results import table_results

OTHERS = "others"
"""What the held-out images of the other classes are called in an ``ood`` result."""
MEAN = "mean"

Scores = Mapping[str, float]
"""AUROC by score."""


@dataclass(frozen=True)
class Trained:
    """The training of one class, evaluated."""

    name: str
    """Of the class."""
    result: dict[str, Any]
    """What task ``ood`` wrote."""
    baselines: dict[str, Any] = field(default_factory=dict)
    """Its ``results`` for raw pixels and the untrained network, if they were wanted."""
    seconds: float = 0.0

    def scores(self, baseline: str | None = None) -> dict[str, float]:
        """AUROC of each score, of the trained network or of a baseline."""
        results = self.baselines[baseline] if baseline else table_results(self.result)
        return {score: found["auroc"] for score, found in results[OTHERS].items()}


def means(rows: Sequence[Scores]) -> dict[str, float]:
    """Of each score that all rows have, its mean; in the order of the first row.

    >>> means([{"knn": 0.5, "s1": 0.9}, {"knn": 0.7}])
    {'knn': 0.6}
    """
    shared = [score for score in rows[0] if all(score in row for row in rows)]
    return {score: statistics.fmean(row[score] for row in rows) for score in shared}


def summary(method: str, trained: Sequence[Trained]) -> dict[str, dict[str, float]]:
    """Mean AUROC by score: of each baseline, then of the method."""
    named = {base: [t.scores(base) for t in trained] for base in _baselines(trained)}
    return {name: means(rows) for name, rows in (named | {method: _rows(trained)}).items()}


def markdown(method: str, trained: Sequence[Trained], footnote: str) -> str:
    """Two tables: the means, and each class.

    Args:
        method: What to call the trained networks.
        trained: One per class.
        footnote: Where the figures come from.
    """
    count = len(trained)
    classes = {t.name: t.scores() for t in trained} | {MEAN: means(_rows(trained))}
    return (
        f"AUROC %, mean over {count} one-class trainings\n\n"
        f"{_table('features', summary(method, trained))}\n"
        f"{method}, by the class that is normal\n\n{_table('class', classes)}\n{footnote}\n"
    )


def bars(method: str, trained: Sequence[Trained]) -> Figure:
    """A group of bars per class and one for the mean, a bar per score."""
    groups = {t.name: t.scores() for t in trained} | {MEAN: means(_rows(trained))}
    scores = _columns(groups.values())
    width = min(40.0, max(8.0, 2 + 0.18 * len(groups) * (len(scores) + 1)))
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    axes = figure.add_subplot()
    each = 0.85 / len(scores)
    for number, score in enumerate(scores):
        held = [(at, row[score]) for at, row in enumerate(groups.values()) if score in row]
        places = [at + (number - (len(scores) - 1) / 2) * each for at, _ in held]
        axes.bar(places, [100 * value for _, value in held], each, label=literal(_words(score)))
    axes.axhline(50, color="0.4", linewidth=1, linestyle=":")
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=1)
    axes.set_xticks(range(len(groups)), list(map(literal, groups)), rotation=30, ha="right")
    axes.set(
        ylim=(0, 100), ylabel="AUROC %", title=literal(f"{method}: one class against all others")
    )
    figure.legend(fontsize="small", ncols=4, loc="outside lower center")
    return figure


def _rows(trained: Sequence[Trained]) -> list[dict[str, float]]:
    return [one.scores() for one in trained]


def _baselines(trained: Sequence[Trained]) -> list[str]:
    """Those that every class has."""
    return [name for name in trained[0].baselines if all(name in t.baselines for t in trained)]


def _columns(rows: Any) -> list[str]:
    """Every score that a row has, as they come."""
    return list(dict.fromkeys(score for row in rows for score in row))


def _table(title: str, rows: Mapping[str, Scores]) -> str:
    columns = _columns(rows.values())
    lines = [
        f"| {title} | {' | '.join(map(_one_cell, columns))} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = (f"{100 * row[score]:.1f}" if score in row else "" for score in columns)
        lines.append(f"| {_one_cell(name)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _one_cell(name: str) -> str:
    """A name as a cell of Markdown: a class may be called anything."""
    return text.markdown(" ".join(_words(name).split()))


def _words(name: str) -> str:
    return name.replace("_", " ")
