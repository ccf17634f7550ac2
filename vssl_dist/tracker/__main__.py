"""The flusher's process: hold the lease, replay, leave when told to or when the trainer is gone.

Started by ``Flusher``; one line on standard input, ``close SECONDS``, ends it.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import Timeout

from vssl_dist.confidential import redact_secrets
from vssl_dist.durable import forbid_writing_by_others
from vssl_dist.tracker.address import NOWHERE
from vssl_dist.tracker.cursor import is_flushed
from vssl_dist.tracker.identity import settle_identity
from vssl_dist.tracker.record import Record, Sender, lease
from vssl_dist.tracker.refusals import error_line, is_transient
from vssl_dist.tracker.spool import mark_unfinished_failed

if TYPE_CHECKING:
    from vssl_dist.tracker.replay import Replayer
    from vssl_dist.tracker.system import Sampler

_EVERY_S = 2.0
_CLOSING_S = 0.5
_SLOWEST_S = 15.0
_ORPHAN_S = 10.0
_OUTAGE_S = 30.0
_log = logging.getLogger("vssl_dist.tracker")


class _Orders:
    """Requests of the trainer: to close by a time, or, by its death, to drain and leave."""

    def __init__(self) -> None:
        self._parent = os.getppid()
        self.deadline: float | None = None
        self._told = math.inf
        self.orphaned = False

    def wait(self, seconds: float) -> None:
        """Listen to the trainer for at most so many seconds."""
        if self.deadline is not None:
            time.sleep(seconds)
            return
        ready, _, _ = select.select([sys.stdin], [], [], seconds)
        if ready:
            words = sys.stdin.readline().split()
            self.orphaned = not words
            self._close(float(words[1]) if words else _ORPHAN_S)
        elif os.getppid() != self._parent:
            # A child that the trainer forked can hold standard input open after its death.
            self.orphaned = True
            self._close(_ORPHAN_S)

    def _close(self, seconds: float) -> None:
        self._told = time.monotonic()
        self.deadline = self._told + seconds

    @property
    def closing_s(self) -> float:
        """Seconds since the trainer asked to close; negative before."""
        return time.monotonic() - self._told

    @property
    def expired(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


class _Lines(logging.Formatter):
    """Formatter of log lines that hides the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record without secrets."""
        return redact_secrets(super().format(record))


def _sampler(run_dir: Path, every_s: float) -> Sampler:
    from vssl_dist.tracker.system import Sampler

    sampler = Sampler(run_dir, every_s)
    sampler.start()
    return sampler


class _Server:
    """The loop: replay whenever there is something, as long as this process has the lease."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._run_dir: Path = args.run_dir
        self._uri, self._experiment, self._afresh = args.to, args.experiment, args.afresh
        self._job: str | None = args.job
        self._only_sends: bool = args.only_sends
        self._is_settled = False
        self._lease = lease(self._run_dir)
        self._sampler = None if args.system is None else _sampler(self._run_dir, args.system)
        self._replayer: Replayer | None = None
        self._elsewhere = False
        self._failing_since: float | None = None
        self._refused = False
        self._problem: str | None = None
        self._began = time.time()

    def serve(self, orders: _Orders) -> bool:
        """Work until told to close and everything is sent, or until the time for it is over.

        Once it is to close it also leaves when nothing could be sent for half a minute, and at
        once when MLflow says no.
        """
        pause, tried = 0.0, False
        while not orders.expired:
            orders.wait(pause)
            if orders.deadline is not None:
                if self._sampler is not None:
                    self._sampler.stop()
                if orders.orphaned:
                    if not self._only_sends:
                        mark_unfinished_failed(self._run_dir, self._began)
                    orders.orphaned = False
                if self._flushed():
                    return True
                if tried and self._refused:
                    return False
                if min(self._outage(), orders.closing_s) > _OUTAGE_S:
                    return False
            self._try()
            tried = orders.deadline is not None
            pause = min(2 * max(pause, 1.0), _SLOWEST_S) if self._outage() else _EVERY_S
            if orders.deadline is not None:
                pause = min(pause, _CLOSING_S)
        return False

    def _flushed(self) -> bool:
        """Where another process has the lease, curves go where that one sends them."""
        if self._uri == NOWHERE:
            return True
        if self._lease.is_locked:
            return is_flushed(self._run_dir, self._uri)
        return self._elsewhere and is_flushed(self._run_dir)

    def _try(self) -> None:
        if self._is_settled:
            return
        try:
            if not self._lease.is_locked:
                self._lease.acquire(timeout=0)
                self._elsewhere = False
            self._replay()
            self._report(None)
            if self._uri == NOWHERE:
                # There is nothing to send: whoever wants to send it elsewhere may.
                self._lease.release()
                self._is_settled = True
        except Timeout:
            self._elsewhere = True
        except Exception as error:
            # Whatever it is (server away, disk full, database locked), it may pass.
            self._replayer = None
            self._report(error)

    def _replay(self) -> None:
        if self._replayer is None:
            identity = settle_identity(self._run_dir)
            record = Record.load(self._run_dir, identity)
            record.tracking_uri, record.experiment = self._uri, self._experiment
            record.save(self._run_dir)
            if self._failing_since is None:
                Sender(self._uri, job=self._job).save(self._run_dir)
            if self._uri == NOWHERE:
                return
            # mlflow takes seconds to import: not before signals are out of the way, and not at
            # all when another flusher has the lease.
            from vssl_dist.tracker.replay import Replayer

            self._replayer = Replayer(self._run_dir, identity, record, afresh=self._afresh)
            self._afresh = False
        self._replayer.flush()

    def _report(self, error: Exception | None) -> None:
        """Log when sending begins to fail and when it works again, not every time between."""
        refused = error is not None and not is_transient(error)
        if error is not None and (self._failing_since is None or refused > self._refused):
            how = "MLflow refuses" if refused else "cannot send"
            _log.warning("%s (will retry): %s", how, error_line(error))
            self._failing_since = self._failing_since or time.monotonic()
        elif error is None and self._failing_since is not None:
            _log.warning("sending again")
            self._failing_since = None
        self._refused = refused
        problem = None if error is None else error_line(error)
        if problem != self._problem:
            self._problem = problem
            with suppress(OSError):  # the disk may be what fails
                Sender(self._uri, job=self._job, problem=problem).save(self._run_dir)

    def _outage(self) -> float:
        """Return the seconds since sending began to fail; 0 while it works."""
        since = self._failing_since
        return 0.0 if since is None else max(time.monotonic() - since, 1e-9)


def main() -> int:
    """Run the flusher; return 0 when everything in the spool has been sent, else 1."""
    parser = argparse.ArgumentParser(prog="python -m vssl_dist.tracker", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--to", required=True, metavar="URI")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--afresh", action="store_true")
    parser.add_argument("--only-sends", action="store_true", help="for others than the trainer")
    parser.add_argument("--job", help="of SLURM, that this process is part of")
    parser.add_argument("--system", type=float, metavar="SECONDS")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        # Schedulers signal every process of a job; this one leaves when its trainer does.
        signal.signal(number, signal.SIG_IGN)
    forbid_writing_by_others()
    # Training comes first on a machine with few cores.
    os.nice(5)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    # It would report every retry of every outage.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return 0 if _Server(args).serve(_Orders()) else 1


if __name__ == "__main__":
    sys.exit(main())
