"""How a command refuses: one line, whatever it warned of before."""

from __future__ import annotations


def refusal(stderr: str) -> str:
    """The one line of a command's standard error that is no warning: ``error: ...``."""
    told = [line for line in stderr.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 1, stderr
    assert told[0].startswith("error: "), stderr
    return told[0]
