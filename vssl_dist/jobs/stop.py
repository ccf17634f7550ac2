"""Being told to stop: remembered at once, acted on at a step boundary, by all ranks together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

STOPPED = 75
"""Exit code of a rank that saved and left because it was told to (sysexits: try again)."""
REFUSED = 2
"""Exit code of a rank that met something its user has to mend: it said so in one line."""
REFUSAL = "error: "
"""How that line begins, and so the failure file of a run whose first failure is a refusal."""


def leave(code: int) -> NoReturn:
    """End this process with an exit code that nothing can change any more.

    The interpreter's own ending is not waited for: while it takes modules apart, threads of a
    process group that still stands abort it now and then.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk; a closed stream
            stream.flush()
    os._exit(code)


class StopFlag:
    """Remember SIGUSR2 and SIGTERM instead of acting on them.

    submitit's own handler requeues from rank 0 in the middle of whatever runs, which may be a
    collective.  It is kept aside, every rank reaches the same step boundary and saves, and rank
    0 calls it then.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.final = False
        """Whether the job is not to come back: rank 0's `only_terminated`, known to all."""
        self.kept: Any = signal.getsignal(signal.SIGUSR2)
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen.add(number)

    def __call__(self) -> bool:
        """Whether this rank was told to stop."""
        return bool(self.seen)

    @property
    def only_terminated(self) -> bool:
        """SIGTERM alone: a user's scancel, or SLURM's own requeue.  Neither wants ours."""
        return self.seen == {signal.SIGTERM}

    def requeue(self) -> None:
        """Hand over to the handler that was there before; submitit's requeues and exits."""
        if not callable(self.kept):
            return
        try:
            self.kept(signal.SIGUSR2, None)
        except subprocess.CalledProcessError as error:
            if error.returncode >= 0:
                raise
            # The requeue works so fast that SLURM ends its messenger with the rest of the job.
