"""Running one command from another, as a user would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

from vssl_dist.installed import own_code_only


def run_command(command: str, *words: str) -> int:
    """Run a command of `vssl` as a user would; returns its exit code.

    Args:
        command: Such as ``submit``.
        words: What a user types after it.
    """
    program_and_command = [sys.executable, "-P", "-m", "vssl_dist.cli", command]
    return run_in_foreground([*program_and_command, *words], os.environ | own_code_only(os.environ))


def run_in_foreground(program_words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a program to its end; returns its exit code.

    Ctrl-C reaches it from the terminal, so this process only waits; SIGTERM is passed on.
    """
    process = subprocess.Popen(program_words, env=environment)

    def pass_sigterm_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            process.terminate()

    previous_handlers = {
        n: signal.signal(n, pass_sigterm_on) for n in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        exit_code = process.wait()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    return 128 - exit_code if exit_code < 0 else exit_code
