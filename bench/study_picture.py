"""A study's picture, from the result files of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.study_plan import BASE, Study
from bench.study_report import Figures, Key, Outcome, rows
from vssl_dist.evaluation.figures.plots import literal


def picture(
    study: Study, outcomes: Mapping[Key, Sequence[Outcome]], others: Mapping[str, Figures]
) -> Figure:
    """One panel per factor (and one of the base points): every seed's percentages.

    Args:
        study: The study.
        outcomes: Of every run.
        others: By row, figures that no run gave; they stand beside the base points.
    """
    panels = [(factor.name, factor.point) for factor in study.factors]
    if len(study.points) > 1 or not panels:
        panels = [(BASE, ""), *panels]
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    size = (3.4 * across, 3.0 * down) if len(panels) > 1 else (6.8, 4.4)
    page = Figure(figsize=size, layout="constrained")
    page.suptitle(literal(study.title), wrap=True)
    shared: Axes | None = None
    for number, (factor, point) in enumerate(panels):
        # One scale for all: else a point of difference looks like ten.
        axes = shared = page.add_subplot(down, across, number + 1, sharey=shared)
        shown = rows(study, outcomes, factor, point)
        beside = others if factor == BASE else {}
        _draw(axes, study, shown, beside)
        title = literal(f"{point}: {factor}" if point else factor)
        axes.set_title(title, fontsize="medium")
        if number == 0:
            labels = axes.get_legend_handles_labels()
            page.legend(*labels, loc="outside lower center", ncols=3, frameon=False)
    return page


def _draw(
    axes: Axes,
    study: Study,
    shown: Mapping[str, Sequence[Outcome]],
    others: Mapping[str, Figures],
) -> None:
    # What was not trained comes first.
    names = [*(name for name in others if name not in shown), *shown]
    columns = study.drawn or [name for name in study.columns if "%" in name]
    for column in [*columns, *(name for name in study.elsewhere if "%" in name)]:
        spots = []
        for place, name in enumerate(names):
            found = [one.figures for one in shown.get(name, ()) if one.figures is not None]
            found = [*found, others.get(name, {})]
            spots += [(place, figures[column]) for figures in found if column in figures]
        if spots:
            axes.plot(*zip(*spots, strict=True), "o", ms=4, label=literal(column))
    words = [literal(name.replace("**", "").replace(" (base)", "*")) for name in names]
    axes.set_xticks(range(len(words)), words, rotation=30, ha="right", fontsize="small")
    axes.set_xlim(-0.5, len(words) - 0.5)
