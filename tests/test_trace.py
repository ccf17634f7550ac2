"""A trace goes on where a resumed run does, whatever has become of its file."""

from __future__ import annotations

from pathlib import Path

from vssl_dist.trace import TraceWriter


def test_lines_that_no_run_has_written_are_dropped_at_a_resume(tmp_path: Path) -> None:
    lines = ['{"step": 1}', "[]", "7", '{"step": [1]}', '{"step": null}', '{"st', '{"step": 2}']
    path = tmp_path / "trace.rank0.jsonl"
    nested, infinite = "[" * 100_000, f'{{"step": {"9" * 400}}}'
    path.write_bytes("\n".join([*lines, nested, infinite]).encode() + b"\n\xff\n")
    TraceWriter(tmp_path, restored_step=1)
    assert path.read_text() == '{"step": 1}\n'
