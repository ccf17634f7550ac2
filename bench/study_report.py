"""A study's page, from the result files of its runs."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bench.study_plan import BASE_POINT, Study
from vssl_dist.errors import ConfigError
from vssl_dist.exports.results import LIKELIHOOD_SCORES, RESULT_FORMAT
from vssl_dist.run_folder import ExportFolder

FigureByColumn = dict[str, float]
"""A run's figures by the names of their columns."""
Results = Mapping[str, object]
"""A result file's figures, nested: unchecked, whoever wrote it."""


@dataclass(frozen=True)
class RunOutcome:
    """How far a run has come: its figures and what they cost."""

    figures: FigureByColumn | None
    """Figures by column; None: not finished, or ``trouble`` says why it never will be."""
    trouble: str = ""
    seconds: float = 0.0
    whole: bool = True
    """Whether ``seconds`` is all that it took: what a kill took away is not known."""
    commit: str = ""
    place: str = ""
    """Machine and ranks."""


SettingKey = tuple[str, str, str]
"""Point, factor and value of the runs that differ in their seeds alone."""


def read_figures(study: Study, results: Results) -> FigureByColumn:
    """Read the study's columns of one run.

    Raises:
        ConfigError: A column names what no result has.
    """
    return {name: read_figure(name, path, results) for name, path in study.columns.items()}


def read_figure(column: str, path: Sequence[str], results: object) -> float:
    """Read one figure, times 100 where the column's name has a %.

    Args:
        column: Name of the column.
        path: Keys, from the outside in.
        results: Where to look.

    Raises:
        ConfigError: There is no such figure.
    """
    value = results
    for key in path:
        if not isinstance(value, dict) or key not in value:
            keys = ", ".join(value) if isinstance(value, dict) else repr(value)
            raise ConfigError(f"columns: {column}: no {key!r} in the result (has: {keys})")
        value = value[key]
    if not isinstance(value, (int, float)):
        raise ConfigError(f"columns: {column}: {value!r} is no number")
    return 100 * value if "%" in column else float(value)


def read_baselines(export_folder: Path, task: str) -> dict[str, object] | None:
    """Read a task's figures of raw pixels and the random network from a run's export folder.

    None: there are none, or those of an earlier version.
    """
    try:
        baselines = json.loads(ExportFolder(export_folder).baselines_path(task).read_text())
    except (OSError, ValueError):
        return None
    if baselines.get("format") != RESULT_FORMAT:
        return None
    results: dict[str, object] = baselines["results"]
    return results


def read_reference_rows(study: Study, export_folder: Path) -> dict[str, FigureByColumn]:
    """Read the figures that no run of the study gave, by row and column.

    Args:
        study: The study.
        export_folder: That of its first run, where those of raw pixels and the random network lie.
    """
    reference_rows: dict[str, FigureByColumn] = {}
    for column, path in study.columns.items():
        for network, results in (read_baselines(export_folder, path[0]) or {}).items():
            with suppress(ConfigError):  # such as that of a probe that learns beside a training
                row = reference_rows.setdefault(network.replace("_", " "), {})
                row[column] = read_figure(column, path[1:], results)
    for column, source in study.elsewhere.items():
        for row_name, (file_name, *keys) in source.rows.items():
            if Path(file_name).exists():
                row = reference_rows.setdefault(row_name, {})
                row[column] = read_figure(column, keys, json.loads(Path(file_name).read_text()))
    return reference_rows


def factor_table(
    study: Study, outcomes: Mapping[SettingKey, Sequence[RunOutcome]], factor: str, point: str
) -> str:
    """Write the rows of one factor of a point as Markdown."""
    cells = {
        name: _row_cells(study, seeds)
        for name, seeds in outcome_rows(study, outcomes, factor, point).items()
    }
    return _markdown_table([factor, *study.columns, "seconds"], cells)


def base_table(
    study: Study,
    outcomes: Mapping[SettingKey, Sequence[RunOutcome]],
    reference_rows: Mapping[str, FigureByColumn],
) -> str:
    """Write all points as Markdown, after what was not trained.

    Args:
        study: The study.
        outcomes: Outcomes of every run, one per seed.
        reference_rows: By row, figures of what was not trained and those of columns from elsewhere.
    """
    trained_rows = {
        name: _row_cells(study, seeds)
        for name, seeds in outcome_rows(study, outcomes, BASE_POINT, "").items()
    }
    empty_cells = [""] * (len(study.columns) + 1)
    cells = {}
    for name in dict.fromkeys([*reference_rows, *trained_rows]):
        row_figures = reference_rows.get(name, {})
        *column_cells, seconds = trained_rows.get(name, empty_cells)
        if name not in trained_rows:
            column_cells = [_figure_text(column, row_figures) for column in study.columns]
        elsewhere_cells = [_figure_text(column, row_figures) for column in study.elsewhere]
        cells[name] = [*column_cells, *elsewhere_cells, seconds]
    # What was not trained comes first.
    row_order = sorted(cells, key=lambda name: name in trained_rows)
    columns = ["", *study.columns, *study.elsewhere, "seconds"]
    return _markdown_table(columns, {name: cells[name] for name in row_order})


def _markdown_table(columns: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def _figure_text(column: str, figures: FigureByColumn) -> str:
    return f"{figures[column]:.{_num_decimals(column)}f}" if column in figures else ""


def _num_decimals(column: str) -> int:
    return 1 if "%" in column else 3


def outcome_rows(
    study: Study, outcomes: Mapping[SettingKey, Sequence[RunOutcome]], factor: str, point: str
) -> dict[str, Sequence[RunOutcome]]:
    """Arrange the outcomes of one table by the names of its rows."""
    if factor == BASE_POINT:
        return {name: outcomes[name, BASE_POINT, "base"] for name in study.points}
    (changed_factor,) = (f for f in study.factors if (f.name, f.point) == (factor, point))
    # A value without overrides is the base point itself, whose runs are not done twice.
    return {
        value if overrides else f"**{value}** (base)": outcomes[
            (point, factor, value) if overrides else (point, BASE_POINT, "base")
        ]
        for value, overrides in changed_factor.values.items()
    }


def _row_cells(study: Study, seed_outcomes: Sequence[RunOutcome]) -> list[str]:
    finished_outcomes = [outcome for outcome in seed_outcomes if outcome.figures is not None]
    trouble = sorted({outcome.trouble for outcome in seed_outcomes if outcome.trouble})
    if not finished_outcomes:
        return [", ".join(trouble) or "not yet", *[""] * len(study.columns)]
    cells = []
    for column in study.columns:
        values = [
            outcome.figures[column] for outcome in finished_outcomes if outcome.figures is not None
        ]
        digits = _num_decimals(column)
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
    if len(finished_outcomes) < len(seed_outcomes):
        cells[0] += (
            f" ({len(finished_outcomes)} of {len(seed_outcomes)} "
            f"seeds{''.join(f', {t}' for t in trouble)})"
        )
    # What a kill took away is missing from the time: the figure is a lower bound.
    lower_bound_mark = "" if all(outcome.whole for outcome in finished_outcomes) else "> "
    return [
        *cells,
        f"{lower_bound_mark}"
        f"{statistics.fmean(outcome.seconds for outcome in finished_outcomes):.0f}",
    ]


def markdown_page(
    study: Study,
    outcomes: Mapping[SettingKey, Sequence[RunOutcome]],
    reference_rows: Mapping[str, FigureByColumn],
    facts: Mapping[str, str],
) -> str:
    """Write the whole page as Markdown.

    Args:
        study: The study.
        outcomes: Outcomes of every run, by point, factor and value: one per seed.
        reference_rows: By row, figures of what was not trained and those of columns from elsewhere.
        facts: ``command``, ``picture``, ``place`` of runs that did not note theirs and, where there
            are likelihoods of task ood, their ``densities``.
    """
    planned = [outcome for seeds in outcomes.values() for outcome in seeds]
    ended_outcomes = [
        outcome for outcome in planned if outcome.figures is not None or outcome.trouble
    ]
    commits = sorted({outcome.commit for outcome in ended_outcomes if outcome.commit})
    lower_bound_text = "" if all(outcome.whole for outcome in ended_outcomes) else "more than "
    sections = [
        f"# {study.title}",
        study.about.strip(),
        f"```\n{study.data}\n{facts['command']}\n```",
        f"{len(ended_outcomes)} of {len(planned)} runs; {lower_bound_text}"
        f"{sum(outcome.seconds for outcome in ended_outcomes) / 3600:.2f} hours in all, "
        "evaluations included, "
        f"each run on {_machines_text(ended_outcomes) or facts['place']}; seeds "
        f"{', '.join(map(str, study.seeds))}; commit {', '.join(commits) or 'none yet'}. "
        f"{_spread_note(study)}Every run's configuration: "
        + "; ".join(_point_origin(name, study) for name in study.points)
        + (f"; common to all: {_as_code(study.common)}." if study.common else "."),
        "## Base points",
        base_table(study, outcomes, reference_rows),
        *(f"{column}: `{source.command}`" for column, source in study.elsewhere.items()),
        _density_note(study, facts),
    ]
    for factor in study.factors:
        sections += [
            f"## {factor.point}: {factor.name}",
            factor_table(study, outcomes, factor.name, factor.point),
        ]
    sections.append(f"![{study.title}]({facts['picture']})")
    if study.conclusion:
        sections += ["## What it says", study.conclusion.strip()]
    return "\n\n".join(section for section in sections if section) + "\n"


def _machines_text(ran: Sequence[RunOutcome]) -> str:
    places = Counter(outcome.place for outcome in ran if outcome.place).most_common()
    if len(places) == 1:
        return places[0][0]
    return " or ".join(f"{place} ({times} of them)" for place, times in places)


def _density_note(study: Study, facts: Mapping[str, str]) -> str:
    """Say what VJE's likelihoods are densities of, if the table has some."""
    if not any(set(LIKELIHOOD_SCORES) & set(path) for path in study.columns.values()):
        return ""
    return f"Likelihoods of VJE: `density: {facts['densities']}`." if "densities" in facts else ""


def _spread_note(study: Study) -> str:
    return "Mean ± standard deviation over the seeds. " if len(study.seeds) > 1 else ""


def _point_origin(name: str, study: Study) -> str:
    point = study.points[name]
    overrides = f" with {_as_code(point.overrides)}" if point.overrides else ""
    return f"{name} is `{point.config}`{overrides}"


def _as_code(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
