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
from vssl_dist.tracker.address import NO_TRACKING
from vssl_dist.tracker.cursor import is_flushed
from vssl_dist.tracker.identity import settle_identity
from vssl_dist.tracker.record import Sender, TrackingRecord, sending_lock
from vssl_dist.tracker.refusals import error_line, is_transient
from vssl_dist.tracker.spool import mark_unfinished_failed

if TYPE_CHECKING:
    from vssl_dist.tracker.replay import Replayer
    from vssl_dist.tracker.system import SystemSampler

_SEND_EVERY_S = 2.0
_CLOSING_SEND_EVERY_S = 0.5
_MAX_RETRY_PAUSE_S = 15.0
_ORPHAN_GRACE_S = 10.0
_MAX_OUTAGE_S = 30.0
_log = logging.getLogger("vssl_dist.tracker")


class _TrainerOrders:
    """Requests of the trainer: to close by a time, or, by its death, to drain and leave."""

    def __init__(self) -> None:
        self._parent_pid = os.getppid()
        self.deadline: float | None = None
        self._close_asked_at = math.inf
        self.is_orphaned = False

    def wait_for_order(self, timeout_s: float) -> None:
        """Listen to the trainer for at most so many seconds."""
        if self.deadline is not None:
            time.sleep(timeout_s)
            return
        readable_files, _, _ = select.select([sys.stdin], [], [], timeout_s)
        if readable_files:
            words = sys.stdin.readline().split()
            self.is_orphaned = not words
            self._set_deadline(float(words[1]) if words else _ORPHAN_GRACE_S)
        elif os.getppid() != self._parent_pid:
            # A child that the trainer forked can hold standard input open after its death.
            self.is_orphaned = True
            self._set_deadline(_ORPHAN_GRACE_S)

    def _set_deadline(self, grace_s: float) -> None:
        self._close_asked_at = time.monotonic()
        self.deadline = self._close_asked_at + grace_s

    @property
    def since_close_asked_s(self) -> float:
        """Seconds since the trainer asked to close; negative before."""
        return time.monotonic() - self._close_asked_at

    @property
    def is_expired(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


class _RedactingFormatter(logging.Formatter):
    """Formatter of log lines that hides the secrets of the environment."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record without secrets."""
        return redact_secrets(super().format(record))


def _sampler(run_dir: Path, every_s: float) -> SystemSampler:
    from vssl_dist.tracker.system import SystemSampler

    sampler = SystemSampler(run_dir, every_s)
    sampler.start()
    return sampler


class _SendingLoop:
    """The loop: replay whenever there is something, as long as this process has the lease."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._run_dir: Path = args.run_dir
        self._uri, self._experiment, self._tries_refused_again = (
            args.to,
            args.experiment,
            args.afresh,
        )
        self._job: str | None = args.job
        self._only_sends: bool = args.only_sends
        self._has_nothing_to_send = False
        self._lease = sending_lock(self._run_dir)
        self._sampler = None if args.system is None else _sampler(self._run_dir, args.system)
        self._replayer: Replayer | None = None
        self._another_holds_lease = False
        self._failing_since: float | None = None
        self._is_refused = False
        self._last_problem: str | None = None
        self._began_at = time.time()

    def serve(self, orders: _TrainerOrders) -> bool:
        """Work until told to close and everything is sent, or until the time for it is over.

        Once it is to close it also leaves when nothing could be sent for half a minute, and at
        once when MLflow says no.
        """
        pause_s, has_tried = 0.0, False
        while not orders.is_expired:
            orders.wait_for_order(pause_s)
            if orders.deadline is not None:
                if self._sampler is not None:
                    self._sampler.stop()
                if orders.is_orphaned:
                    if not self._only_sends:
                        mark_unfinished_failed(self._run_dir, self._began_at)
                    orders.is_orphaned = False
                if self._is_all_sent():
                    return True
                if has_tried and self._is_refused:
                    return False
                if min(self._outage_s(), orders.since_close_asked_s) > _MAX_OUTAGE_S:
                    return False
            self._try_sending()
            has_tried = orders.deadline is not None
            pause_s = (
                min(2 * max(pause_s, 1.0), _MAX_RETRY_PAUSE_S)
                if self._outage_s()
                else _SEND_EVERY_S
            )
            if orders.deadline is not None:
                pause_s = min(pause_s, _CLOSING_SEND_EVERY_S)
        return False

    def _is_all_sent(self) -> bool:
        """Where another process has the lease, curves go where that one sends them."""
        if self._uri == NO_TRACKING:
            return True
        if self._lease.is_locked:
            return is_flushed(self._run_dir, self._uri)
        return self._another_holds_lease and is_flushed(self._run_dir)

    def _try_sending(self) -> None:
        if self._has_nothing_to_send:
            return
        try:
            if not self._lease.is_locked:
                self._lease.acquire(timeout=0)
                self._another_holds_lease = False
            self._send_new()
            self._log_change(None)
            if self._uri == NO_TRACKING:
                # There is nothing to send: whoever wants to send it elsewhere may.
                self._lease.release()
                self._has_nothing_to_send = True
        except Timeout:
            self._another_holds_lease = True
        except Exception as error:
            # Whatever it is (server away, disk full, database locked), it may pass.
            self._replayer = None
            self._log_change(error)

    def _send_new(self) -> None:
        if self._replayer is None:
            identity = settle_identity(self._run_dir)
            record = TrackingRecord.load(self._run_dir, identity)
            record.tracking_uri, record.experiment = self._uri, self._experiment
            record.save(self._run_dir)
            if self._failing_since is None:
                Sender(self._uri, job=self._job).save(self._run_dir)
            if self._uri == NO_TRACKING:
                return
            # mlflow takes seconds to import: not before signals are out of the way, and not at
            # all when another flusher has the lease.
            from vssl_dist.tracker.replay import Replayer

            self._replayer = Replayer(
                self._run_dir, identity, record, retry_refused=self._tries_refused_again
            )
            self._tries_refused_again = False
        self._replayer.flush()

    def _log_change(self, error: Exception | None) -> None:
        """Log when sending begins to fail and when it works again, not every time between."""
        is_refused = error is not None and not is_transient(error)
        if error is not None and (self._failing_since is None or is_refused > self._is_refused):
            failure_text = "MLflow refuses" if is_refused else "cannot send"
            _log.warning("%s (will retry): %s", failure_text, error_line(error))
            self._failing_since = self._failing_since or time.monotonic()
        elif error is None and self._failing_since is not None:
            _log.warning("sending again")
            self._failing_since = None
        self._is_refused = is_refused
        problem = None if error is None else error_line(error)
        if problem != self._last_problem:
            self._last_problem = problem
            with suppress(OSError):  # the disk may be what fails
                Sender(self._uri, job=self._job, problem=problem).save(self._run_dir)

    def _outage_s(self) -> float:
        """Return the seconds since sending began to fail; 0 while it works."""
        failing_since = self._failing_since
        return 0.0 if failing_since is None else max(time.monotonic() - failing_since, 1e-9)


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
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler])
    # It would report every retry of every outage.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return 0 if _SendingLoop(args).serve(_TrainerOrders()) else 1


if __name__ == "__main__":
    sys.exit(main())
