"""A study's page, from the result files of its runs."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.study_plan import BASE, Study
from vssl_dist.errors import ConfigError
from vssl_dist.exports.results import FORMAT, LIKELIHOODS
from vssl_dist.run_folder import ExportFolder

Figures = dict[str, float]
"""A run's figures by their columns."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    figures: Figures | None
    """None: not finished, or ``trouble`` says why it never will be."""
    trouble: str = ""
    seconds: float = 0.0
    whole: bool = True
    """Whether ``seconds`` is all that it took: what a kill took away is not known."""
    commit: str = ""
    place: str = ""
    """Machine and ranks."""


Key = tuple[str, str, str]
"""Point, factor, value."""


def figures(study: Study, results: Mapping[str, Any]) -> Figures:
    """The study's columns of one run.

    Raises:
        ConfigError: A column names what no result has.
    """
    return {name: figure(name, path, results) for name, path in study.columns.items()}


def figure(name: str, path: Sequence[str], results: Mapping[str, Any]) -> float:
    found: Any = results
    for key in path:
        if not isinstance(found, dict) or key not in found:
            has = ", ".join(found) if isinstance(found, dict) else repr(found)
            raise ConfigError(f"columns: {name}: no {key!r} in the result (has: {has})")
        found = found[key]
    if not isinstance(found, (int, float)):
        raise ConfigError(f"columns: {name}: {found!r} is no number")
    return 100 * found if "%" in name else float(found)


def baselines(export: Path, task: str) -> dict[str, Any] | None:
    """A task's figures of raw pixels and the random network, in a run's export folder.

    None: there are none, or what an earlier version found.
    """
    try:
        found = json.loads(ExportFolder(export).baselines(task).read_text())
    except (OSError, ValueError):
        return None
    results: dict[str, Any] | None = found["results"] if found.get("format") == FORMAT else None
    return results


def others(study: Study, first: Path) -> dict[str, Figures]:
    """Figures that no run of the study gave, by row and column.

    Args:
        study: The study.
        first: Export folder of its first run, where those of raw pixels and the random network lie.
    """
    found: dict[str, Figures] = {}
    for column, path in study.columns.items():
        for kind, result in (baselines(first, path[0]) or {}).items():
            with suppress(ConfigError):  # such as that of a probe that learns beside a training
                row = found.setdefault(kind.replace("_", " "), {})
                row[column] = figure(column, path[1:], result)
    for column, one in study.elsewhere.items():
        for row_name, (file_name, *keys) in one.rows.items():
            if Path(file_name).exists():
                row = found.setdefault(row_name, {})
                row[column] = figure(column, keys, json.loads(Path(file_name).read_text()))
    return found


def table(study: Study, outcomes: Mapping[Key, Sequence[Outcome]], factor: str, point: str) -> str:
    """The rows of one factor of a point as Markdown."""
    cells = {
        name: _cells(study, seeds) for name, seeds in rows(study, outcomes, factor, point).items()
    }
    return _markdown([factor, *study.columns, "seconds"], cells)


def base_table(
    study: Study,
    outcomes: Mapping[Key, Sequence[Outcome]],
    others: Mapping[str, Figures],
) -> str:
    """All points as Markdown, after what was not trained.

    Args:
        study: The study.
        outcomes: Of every run.
        others: By row, figures of what was not trained and those of columns from elsewhere.
    """
    trained = {
        name: _cells(study, seeds) for name, seeds in rows(study, outcomes, BASE, "").items()
    }
    empty = [""] * (len(study.columns) + 1)
    cells = {}
    for name in dict.fromkeys([*others, *trained]):
        found = others.get(name, {})
        own = trained.get(name, empty)
        first = own[:-1] if name in trained else [_shown(c, found) for c in study.columns]
        cells[name] = [*first, *(_shown(c, found) for c in study.elsewhere), own[-1]]
    # What was not trained comes first.
    order = sorted(cells, key=lambda name: name in trained)
    heads = ["", *study.columns, *study.elsewhere, "seconds"]
    return _markdown(heads, {name: cells[name] for name in order})


def _markdown(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    return "\n".join(lines)


def _shown(column: str, found: Figures) -> str:
    return f"{found[column]:.{_digits(column)}f}" if column in found else ""


def _digits(column: str) -> int:
    return 1 if "%" in column else 3


def rows(
    study: Study, outcomes: Mapping[Key, Sequence[Outcome]], factor: str, point: str
) -> dict[str, Sequence[Outcome]]:
    """The outcomes of a table's rows by their names."""
    if factor == BASE:
        return {name: outcomes[name, BASE, "base"] for name in study.points}
    (found,) = (f for f in study.factors if (f.name, f.point) == (factor, point))
    return {
        value if overrides else f"**{value}** (base)": outcomes[
            (point, factor, value) if overrides else (point, BASE, "base")
        ]
        for value, overrides in found.values.items()
    }


def _cells(study: Study, seeds: Sequence[Outcome]) -> list[str]:
    done = [one for one in seeds if one.figures is not None]
    trouble = sorted({one.trouble for one in seeds if one.trouble})
    if not done:
        return [", ".join(trouble) or "not yet", *[""] * len(study.columns)]
    cells = []
    for column in study.columns:
        values = [one.figures[column] for one in done if one.figures is not None]
        digits = _digits(column)
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.fmean(values):.{digits}f}{spread}")
    if len(done) < len(seeds):
        cells[0] += f" ({len(done)} of {len(seeds)} seeds{''.join(f', {t}' for t in trouble)})"
    more = "" if all(one.whole for one in done) else "> "
    return [*cells, f"{more}{statistics.fmean(one.seconds for one in done):.0f}"]


def document(
    study: Study,
    outcomes: Mapping[Key, Sequence[Outcome]],
    others: Mapping[str, Figures],
    facts: Mapping[str, str],
) -> str:
    """The whole page as Markdown.

    Args:
        study: The study.
        outcomes: Of every run, by point, factor and value: one per seed.
        others: By row, figures of what was not trained and those of columns from elsewhere.
        facts: ``command``, ``picture``, ``place`` of runs that did not note theirs and, where there
            are likelihoods of task ood, their ``densities``.
    """
    planned = [one for seeds in outcomes.values() for one in seeds]
    ran = [one for one in planned if one.figures is not None or one.trouble]
    commits = sorted({one.commit for one in ran if one.commit})
    more = "" if all(one.whole for one in ran) else "more than "
    parts = [
        f"# {study.title}",
        study.about.strip(),
        f"```\n{study.data}\n{facts['command']}\n```",
        f"{len(ran)} of {len(planned)} runs; {more}"
        f"{sum(one.seconds for one in ran) / 3600:.2f} hours in all, evaluations included, each "
        f"run on {_places(ran) or facts['place']}; seeds "
        f"{', '.join(map(str, study.seeds))}; commit {', '.join(commits) or 'none yet'}. "
        f"{_spread(study)}Every run's configuration: "
        + "; ".join(_origin(name, study) for name in study.points)
        + (f"; common to all: {_code(study.common)}." if study.common else "."),
        "## Base points",
        base_table(study, outcomes, others),
        *(f"{column}: `{one.command}`" for column, one in study.elsewhere.items()),
        _densities(study, facts),
    ]
    for factor in study.factors:
        parts += [
            f"## {factor.point}: {factor.name}",
            table(study, outcomes, factor.name, factor.point),
        ]
    parts.append(f"![{study.title}]({facts['picture']})")
    if study.conclusion:
        parts += ["## What it says", study.conclusion.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _places(ran: Sequence[Outcome]) -> str:
    places = Counter(one.place for one in ran if one.place).most_common()
    if len(places) == 1:
        return places[0][0]
    return " or ".join(f"{place} ({times} of them)" for place, times in places)


def _densities(study: Study, facts: Mapping[str, str]) -> str:
    """What VJE's likelihoods are densities of, if the table has some."""
    if not any(set(LIKELIHOODS) & set(path) for path in study.columns.values()):
        return ""
    return f"Likelihoods of VJE: `density: {facts['densities']}`." if "densities" in facts else ""


def _spread(study: Study) -> str:
    return "Mean ± standard deviation over the seeds. " if len(study.seeds) > 1 else ""


def _origin(name: str, study: Study) -> str:
    point = study.points[name]
    own = f" with {_code(point.overrides)}" if point.overrides else ""
    return f"{name} is `{point.config}`{own}"


def _code(words: Sequence[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)
