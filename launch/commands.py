"""Commands that are made of others."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]


def call(program: str, *words: str) -> int:
    """Run one of the project's own commands as a user would; returns its exit code.

    Ctrl-C reaches it from the terminal, so here one only waits for what it makes of it.

    Args:
        program: Such as ``launch/submit.py``.
        words: What a user types after it.
    """
    process = subprocess.Popen([sys.executable, str(ROOT / program), *words])

    def stay(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            process.terminate()

    kept = {n: signal.signal(n, stay) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code
