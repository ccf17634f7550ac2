"""A progress bar shows its figures whole, on a screen of any width."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from vssl_dist.console.bars import WholeProgress, make_console, make_progress_bar

TITLE, COUNT = "features of a folder with a long name", "640000/1281167"


def drawn(width: int) -> str:
    """What a screen of so many columns shows at one moment."""
    file = io.StringIO()
    console = Console(file=file, width=width, _environ={})
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = WholeProgress(*columns, console=console)
    progress.add_task(TITLE, total=1_281_167, completed=640_000)
    console.print(progress.get_renderable())
    return file.getvalue()


def test_a_figure_longer_than_the_screen_is_there_to_its_last_digit() -> None:
    assert "".join(drawn(6).split()) == f"{TITLE} {COUNT}".replace(" ", "")


@pytest.mark.parametrize("width", [16, 20, 30, 50, 61, 70, 80, 200])
def test_the_bar_goes_before_a_figure_does(width: int) -> None:
    text = drawn(width)
    assert "…" not in text
    if width < len(f"{TITLE} {COUNT} ") + 10:
        assert "━" not in text
        assert text.split() == [*TITLE.split(), COUNT], "in its order, and no word is broken"
    else:
        assert f"{TITLE} ━" in text
        assert COUNT in text


def test_what_is_shown_while_features_are_computed_stays_out_of_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "0")
    with make_progress_bar() as progress:
        progress.advance(progress.add_task(TITLE, total=2))
    said = capsys.readouterr()
    assert said.out == ""
    assert "1/2" in said.err
    assert make_console().width == 80
