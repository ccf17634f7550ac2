from __future__ import annotations

from pathlib import Path

from bench.house import checkout_figures

CODE = '''"""Read a file."""

from typing import Any


def read(place: Any) -> Any:
    """The same as `open`."""
    found = place  # what the caller holds must stay as it is
    return found  # type: ignore[no-any-return]
'''


def test_figures_count_what_a_reader_meets(tmp_path: Path) -> None:
    for room in ("vssl_dist", "data_prep", "launch"):
        (tmp_path / room).mkdir()
    (tmp_path / "vssl_dist" / "a.py").write_text(CODE)
    (tmp_path / "data_prep" / "b.py").write_text(CODE.replace("found", "content"))
    counted = checkout_figures(tmp_path)
    assert (counted["files"], counted["lines"], counted["folders"]) == ("2", "18", "2")
    assert counted["comment lines per 100"] == f"{100 * 2 / 18:.1f}"
    assert counted["uses of Any"] == "4"
    assert counted["names that say how a value came"] == "3"
    assert counted["the most frequent of them"].startswith("place 2, found 1")
    assert (counted["docstrings"], counted["docstrings that lean on another"]) == ("4", "2")
    assert counted["public names defined twice or more"] == "1"
