"""Stop requests: remembered when the signal comes, obeyed by all ranks at the same step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

STOPPED_EXIT_CODE = 75
"""Exit code of a rank that has saved and left on request (EX_TEMPFAIL of sysexits: try again)."""
REFUSED_EXIT_CODE = 2
"""Exit code of a rank that met something its user has to mend, after one line that says so."""
REFUSAL_PREFIX = "error: "
"""How the line of a refusal begins, on a terminal and in the failure file of a run.

The launcher tells refusals from crashes by it.
"""
SignalHandler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
"""What `signal.signal` gives and takes."""


def exit_now(code: int) -> NoReturn:
    """End this process with an exit code that nothing can change any more.

    The interpreter's own ending is not waited for: while it takes modules apart, threads of a
    process group that still stands abort it now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk; a closed stream
            stream.flush()
    os._exit(code)


class StopFlag:
    """Remembers SIGUSR2 and SIGTERM instead of acting on them.

    submitit's own handler requeues from rank 0 in the middle of whatever runs, which may be a
    collective.  It is set aside, every rank reaches the same step boundary and saves, and rank
    0 calls it then.
    """

    def __init__(self) -> None:
        self.received_signals: set[int] = set()
        self.is_final = False
        """Whether the job is not to be requeued: rank 0's `only_sigterm`, on all ranks."""
        self.previous_handler: SignalHandler = signal.getsignal(signal.SIGUSR2)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._remember_signal)

    def _remember_signal(self, number: int, frame: FrameType | None) -> None:
        self.received_signals.add(number)

    def __call__(self) -> bool:
        """Whether this rank has been asked to stop."""
        return bool(self.received_signals)

    @property
    def only_sigterm(self) -> bool:
        """Whether SIGTERM came alone, from scancel or SLURM's own requeue: requeue nothing then."""
        return self.received_signals == {signal.SIGTERM}

    def requeue(self) -> None:
        """Call the handler that was there before; submitit's requeues the job and exits."""
        if not callable(self.previous_handler):
            return
        try:
            self.previous_handler(signal.SIGUSR2, None)
        except subprocess.CalledProcessError as error:
            if error.returncode >= 0:
                raise
            # The requeue works so fast that SLURM ends its messenger with the rest of the job.
