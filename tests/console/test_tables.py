"""Tables show every name and figure whole, on a screen of any width, in a pipe and in a log."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from vssl_dist.console.tables import (
    TableLine,
    make_tables,
    print_tables,
)

FIGURES = {
    f"{part} {score}": f"{90 - number:.1f}/{number + 10:.1f}"
    for number, (part, score) in enumerate(
        (part, score)
        for part in ("svhn", "a_dataset_of_forty_characters_0123456789")
        for score in ("knn", "mahalanobis", "s2 cross view likelihood polar", "norm", "größe 漢字")
    )
}
CASES: dict[str, list[TableLine]] = {
    "one line of many long figures": [("step 200", FIGURES)],
    "few figures of many lines": [(f"step {200 * n}", {"k20 t0.07": f"{n}.5"}) for n in range(40)],
    "many of many": [
        (f"step {n}00", {k: f"{v}.{n}" for k, v in FIGURES.items()}) for n in range(1, 9)
    ],
    "a line that lacks figures": [("raw pixels", {"svhn knn": "34.6/99.7"}), ("step 3", FIGURES)],
    "brackets": [("[bold]x[/bold]", {"[red]y": "1.0", "[/]": "2.0"})],
}


def printed(lines: list[TableLine], width: int, terminal: bool) -> str:
    file = io.StringIO()
    print_tables(
        "AUROC %", lines, Console(file=file, width=width, force_terminal=terminal, _environ={})
    )
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("terminal", [True, False])
def test_no_name_and_no_figure_is_cut_at_any_width(case: str, terminal: bool) -> None:
    for width in (*range(20, 130, 3), 80, 100, 160, 200, 300):
        text = printed(CASES[case], width, terminal)
        assert "…" not in text
        for name, row in CASES[case]:
            assert name in text, width
            for figure, value in row.items():
                assert figure in text, width
                assert value in text, width
        if any("│" in line for line in text.splitlines()):
            assert make_tables("AUROC %", CASES[case], width)


def test_a_table_is_shown_where_a_launcher_leaves_no_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "0")
    print_tables("AUROC %", CASES["one line of many long figures"])
    said = capsys.readouterr().out
    assert [text for pair in FIGURES.items() for text in pair if text not in said] == []


def cells(table: Table) -> dict[tuple[str, str], str]:
    """Each value by the head of its column and the name of its row."""
    names, *columns = table.columns
    return {
        (str(column.header), str(name)): str(cell)
        for column in columns
        for name, cell in zip(names.cells, column.cells, strict=True)
    }


def pairs(lines: list[TableLine]) -> Mapping[frozenset[str], str]:
    figures = list(dict.fromkeys(figure for _, row in lines for figure in row))
    return {frozenset((n, f)): row.get(f, "-") for n, row in lines for f in figures}


@pytest.mark.parametrize("case", CASES)
def test_tables_that_are_broken_or_turned_hold_each_figure_once_in_its_place(case: str) -> None:
    broken = 0
    for width in range(20, 301, 20):
        parts = make_tables("AUROC %", CASES[case], width)
        broken += len(parts) > 1
        found = [(frozenset(key), value) for one in parts for key, value in cells(one).items()]
        assert dict(found) == (pairs(CASES[case]) if parts else {})
        assert len(found) == len(dict(found))
        file = io.StringIO()
        for part in parts:
            Console(file=file, width=width, _environ={}).print(part)
        assert max(map(cell_len, file.getvalue().splitlines()), default=0) <= width
    assert broken or case != "many of many"


def test_what_is_wide_is_turned_only_where_that_helps() -> None:
    few = [("step 1", {"a": "1", "b": "2"}), ("step 2", {"a": "3", "b": "4"})]
    (upright,) = make_tables("x", few, 80)
    assert [str(column.header) for column in upright.columns] == ["x", "a", "b"]
    long = [("s", {f"figure {n} of a long name": "1.0" for n in range(5)})]
    (turned,) = make_tables("x", long, 80)
    assert [str(column.header) for column in turned.columns] == ["x", "s"]
    (wide,) = make_tables("x", long, 200)
    assert len(wide.columns) == 6
    assert make_tables("x", long, 20) == []
