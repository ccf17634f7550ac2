"""What commands print of names of files, folders and classes never commands the terminal."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from data_prep import preview, shard, subset, verify
from tests.support.photos import tiny_dataset
from tests.support.shards import edit_manifest
from vssl_dist.commands import (
    keys,
    one_class,
    track,
)
from vssl_dist.console import tables
from vssl_dist.console.bars import show_sample_bar
from vssl_dist.preview.page import Tile, draw_page
from vssl_dist.text import say

EVIL = os.fsdecode(b"x\x1b[2J\x1b]0;owned\x07\r\xff") + "\u202e\n== forged [red]"
"""Clears the screen, renames the window, goes back, is no text, turns direction, forges a line."""
ODD = "\udcff\u202egnp[red]"
"""What a path may hold that is typed: command lines refuse control characters in one."""
Main = Callable[[Sequence[str]], int]


def harmless(text: str, *, lines: int | None = None) -> bool:
    """Whether a terminal shows a text as it is, of so many lines."""
    plain = all(c.isprintable() for c in text.replace("\n", ""))
    return plain and not text.startswith("== forged") and lines in (None, text.count("\n"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of classes and in a folder of that name, and a config of theirs."""
    place = tmp_path / EVIL
    for split, first in (("train", 0), ("val", 1000)):
        made = tiny_dataset(place, samples=64, classes=2, split=split, first=first)
        edit_manifest(made, classes=[EVIL, "other"])
    (tmp_path / "tiny.yaml").write_text(
        "method: {name: simsiam, backbone: resnet10_c16}\n"
        "data: {image_size: 32, views: [cifar, cifar], streams: 2, threads: 1,\n"
        "  backend: reference}\n"
        "optim: {base_lr: 0.1, global_batch: 16, max_steps: 1}\n"
    )
    return place


def code(main: Main, words: Sequence[str]) -> int:
    try:
        return main(words)
    except SystemExit as ending:
        return int(ending.code or 0)


def test_words_that_a_shell_typed_for_its_star_are_shown_and_never_obeyed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    unknown = f"--{EVIL}".replace(" ", "")  # what has spaces is no option
    for main, words in (
        (track.main, ["run", unknown]),
        (track.main, [EVIL]),
        (track.main, [f"/tmp/{ODD}/absent", "--to", f"sqlite:////tmp/{EVIL}/x.db"]),
        (one_class.main, ["none.yaml", unknown]),
        (one_class.main, [f"{EVIL}.yaml"]),
        (one_class.main, [f"{ODD}.yaml", f"name={EVIL}"]),
        (keys.main, [EVIL]),
        (keys.main, [unknown]),
        (shard.main, [EVIL, "--out", "o"]),
        (shard.main, ["cifar10", "--root", f"/tmp/{ODD}/absent", "--out", f"/tmp/{ODD}/o"]),
        (subset.main, [f"/tmp/{ODD}", "--classes", EVIL, "--out", "o"]),
        (subset.main, ["in", "--classes", "x", "--out", "o", EVIL]),
        (verify.main, [f"/tmp/{ODD}"]),
        (preview.main, [f"/tmp/{ODD}", "--out", "o"]),
        (preview.main, ["c", "--out", "o", unknown]),
    ):
        assert code(main, words) == 2
        captured = capsys.readouterr()
        assert not captured.out
        assert harmless(captured.err), (words, captured.err)
        assert "\\x1b" in captured.err or "\\udcff" in captured.err


def test_a_dataset_of_any_name_and_classes_is_verified_shown_and_cut(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "link"  # a path that is typed holds no such characters
    place.symlink_to(folder)
    wanted = [str(tmp_path / "tiny.yaml"), f"data.train={place}/train"]
    for main, words in (
        (verify.main, [str(place), "--workers", "1"]),
        (subset.main, [str(place / "train"), "--classes", "other", "--out", str(tmp_path / ODD)]),
        (preview.main, [*wanted, "--out", str(place / f"{ODD}.png")]),
    ):
        assert main(words) == 0
        captured = capsys.readouterr()
        assert harmless(captured.out), captured.out
        assert harmless(captured.err), captured.err
    assert (folder / f"{ODD}.png").stat().st_size
    (folder / "train").rename(folder / EVIL)
    assert verify.main([str(place), "--workers", "1"]) == 0
    captured = capsys.readouterr()
    assert "\\x1b[2J" in captured.out
    assert harmless(captured.out + captured.err)
    assert subset.main([str(place / "val"), "--classes", "x", "--out", str(place / "p")]) == 2
    assert harmless(capsys.readouterr().err, lines=1)
    min((folder / EVIL).glob("*.tar")).write_bytes(b"")
    assert verify.main([str(place), "--workers", "1"]) == 1
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)


def test_runs_of_any_name_are_told_of_in_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [tmp_path / f"{number}{EVIL}" for number in range(2)]
    for number, run in enumerate(runs):
        run.mkdir()
        (tmp_path / f"link{number}").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    assert track.main(["link0", "link1"]) == 2
    assert harmless(capsys.readouterr().err, lines=1)
    (runs[0] / "spool").mkdir()
    (runs[0] / "run.json").write_text('{"uuid": "\\u001b[2J"}')
    (tmp_path / "other.db").write_bytes(b"not a database")
    for place in (f"sqlite:///{runs[0]}/new/x.db", f"sqlite:///{tmp_path}/other.db"):
        assert track.main(["link0", "link1", "--to", place]) == 2
        assert harmless(capsys.readouterr().err, lines=1)


def test_classes_of_any_name_are_announced_in_a_line_and_reported_whole(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "data").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(one_class, "run_command", lambda *words: 3)
    words = ["tiny.yaml", "data.train=data/train", "data.val=data/val", "out=data"]
    assert one_class.main(words) == 3
    captured = capsys.readouterr()
    assert harmless(captured.out, lines=1)
    assert harmless(captured.err, lines=1)
    assert captured.out.startswith("== class 1 of 2: x\\x1b[2J")


def test_tables_and_bars_show_names_as_text() -> None:
    for width in (20, 100, 400):
        file = io.StringIO()
        console = Console(file=file, width=width, _environ={})
        tables.print_tables(EVIL, [(EVIL, {EVIL: EVIL}), ("[red]x", {"[/]": "1"})], console)
        shown = file.getvalue()
        assert harmless(shown)
        assert "[red]x" in shown
        assert "\\x1b[2J" in shown


def test_a_progress_bar_shows_its_title_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    with show_sample_bar(f"verify {EVIL}", 1) as advance:
        advance(1)
    shown = capsys.readouterr().err
    assert harmless(shown)
    assert "[red]" in shown.replace("\n", "")


def test_a_picture_is_captioned_with_any_name_however_long() -> None:
    from PIL import Image

    image = Image.new("RGB", (8, 8))
    caption = [EVIL, "a" * 10_000_000]
    assert draw_page((EVIL, EVIL), [(EVIL, EVIL)], [[Tile(image, caption, None, [])]]).size


def test_say_prints_each_of_its_lines_on_one(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\nb", EVIL)
    say("c", to_stderr=True)
    captured = capsys.readouterr()
    assert harmless(captured.out, lines=2)
    assert captured.err == "c\n"
