"""A study's picture, from the result files of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.study_plan import BASE_POINT, Study
from bench.study_report import FigureByColumn, RunOutcome, SettingKey, outcome_rows
from vssl_dist.evaluation.figures.plots import escape_mathtext


def draw_picture(
    study: Study,
    outcomes: Mapping[SettingKey, Sequence[RunOutcome]],
    reference_rows: Mapping[str, FigureByColumn],
) -> Figure:
    """Draw a panel per factor (and one of the base points) with every seed's percentages.

    Args:
        study: The study.
        outcomes: Outcomes of every run, one per seed.
        reference_rows: By row, figures that no run gave; they stand beside the base points.
    """
    panels = [(factor.name, factor.point) for factor in study.factors]
    if len(study.points) > 1 or not panels:
        panels = [(BASE_POINT, ""), *panels]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    size = (3.4 * columns, 3.0 * rows) if len(panels) > 1 else (6.8, 4.4)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(escape_mathtext(study.title), wrap=True)
    first_axes: Axes | None = None
    for index, (factor, point) in enumerate(panels):
        # One scale for all: else a point of difference looks like ten.
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first_axes)
        first_axes = first_axes or axes
        by_row = outcome_rows(study, outcomes, factor, point)
        _draw_panel(axes, study, by_row, reference_rows if factor == BASE_POINT else {})
        title = escape_mathtext(f"{point}: {factor}" if point else factor)
        axes.set_title(title, fontsize="medium")
        if index == 0:
            labels = axes.get_legend_handles_labels()
            figure.legend(*labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _draw_panel(
    axes: Axes,
    study: Study,
    by_row: Mapping[str, Sequence[RunOutcome]],
    reference_rows: Mapping[str, FigureByColumn],
) -> None:
    # What was not trained comes first.
    names = [*(name for name in reference_rows if name not in by_row), *by_row]
    columns = study.drawn or [name for name in study.columns if "%" in name]
    for column in [*columns, *(name for name in study.elsewhere if "%" in name)]:
        points = []
        for x, name in enumerate(names):
            seed_figures = [outcome.figures for outcome in by_row.get(name, ()) if outcome.figures]
            seed_figures.append(reference_rows.get(name, {}))
            points += [(x, figures[column]) for figures in seed_figures if column in figures]
        if points:
            axes.plot(*zip(*points, strict=True), "o", ms=4, label=escape_mathtext(column))
    labels = [escape_mathtext(name.replace("**", "").replace(" (base)", "*")) for name in names]
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize="small")
    axes.set_xlim(-0.5, len(labels) - 0.5)
