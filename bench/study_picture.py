"""A study's picture, from the result files of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.study_plan import BASE, Study
from bench.study_report import Key, Outcome, rows


def picture(study: Study, outcomes: Mapping[Key, Sequence[Outcome]]) -> Figure:
    """One panel per factor (and one of the base points): every seed's percentages."""
    panels = [(factor.name, factor.point) for factor in study.factors]
    if len(study.points) > 1 or not panels:
        panels = [(BASE, ""), *panels]
    across = min(len(panels), 4)
    down = -(-len(panels) // across)
    page = Figure(figsize=(3.4 * across, 3.0 * down), layout="constrained")
    page.suptitle(study.title)
    shared: Axes | None = None
    for number, (factor, point) in enumerate(panels):
        # One scale for all: else a point of difference looks like ten.
        axes = shared = page.add_subplot(down, across, number + 1, sharey=shared)
        shown = rows(study, outcomes, factor, point)
        for column in study.drawn or [name for name in study.columns if "%" in name]:
            spots = [
                (place, one.figures[column])
                for place, seeds in enumerate(shown.values())
                for one in seeds
                if one.figures is not None
            ]
            axes.plot([s[0] for s in spots], [s[1] for s in spots], "o", ms=4, label=column)
        names = [name.replace("**", "").replace(" (base)", "*") for name in shown]
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="small")
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_title(f"{point}: {factor}" if point else factor, fontsize="medium")
        if number == 0:
            axes.legend(frameon=False, fontsize="small")
    return page
