"""The trainer's end of the flusher: start it, and close it within a bound."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType

from vssl_dist.durable import open_append, refuse_link_out_of_folder
from vssl_dist.environment import outside_jobs, slurm_job
from vssl_dist.installed import command_line, own_code_only
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.address import NO_TRACKING, sqlite_file
from vssl_dist.tracker.cursor import is_flushed, load_spool_cursor
from vssl_dist.tracker.identity import as_utf8, settle_identity, shell_word
from vssl_dist.tracker.record import Sender, TrackingRecord, lease_holder

_SENDER_ENVIRONMENT = {
    # mlflow's own defaults block a call to a dead server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
_EXIT_WAIT_S = 10.0
_MAX_NAMED_REFUSALS = 8


class Flusher:
    """A process that replays the run's spool into its MLflow run while the trainer lives.

    At most one of a run's flushers works, the one that holds the lease ``spool/flusher.lock``;
    the others wait and take over when it ends, however it ends.  The caller is never blocked:
    `start` spawns, `close` waits no longer than it is told to.  When the trainer dies the process
    sees its standard input end, drains for a few seconds and leaves.  Whatever could not be sent
    stays in the spool for the next flusher of this run.

    Args:
        run_dir: The run's folder.
        experiment: MLflow's name for the group of runs; created if need be.
        tracking_uri: See `default_tracking_uri`.
        retry_refused: Try once more what MLflow did not take before.
        only_sends: The caller is not the trainer, whose death would be the end of the run.
        system_every_s: Seconds between samples of processor, memory, disk, network and GPUs of
            this machine, written to the spool as ``system/...``; ``None`` for none.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: str,
        tracking_uri: str,
        *,
        retry_refused: bool = False,
        only_sends: bool = False,
        system_every_s: float | None = None,
    ) -> None:
        self.run_dir = run_dir.absolute()
        self.experiment = experiment
        self.tracking_uri = tracking_uri
        self.afresh = retry_refused
        self.only_sends = only_sends
        self.system_every_s = system_every_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Spawn the process; returns in milliseconds.

        Raises:
            OSError: A file that it would write is a link out of its folder.
        """
        identity = settle_identity(
            self.run_dir
        )  # first: a copy's links to the original's become files
        run = RunFolder(self.run_dir)
        for path in (run.mlflow_record_path, run.cursor_path, run.sender_path, run.sender_log_path):
            refuse_link_out_of_folder(path)
        if not run.mlflow_record_path.exists():
            # So that it counts as tracked, however soon this is killed; later addresses are
            # written down by who has the lease.
            TrackingRecord(identity.uuid, self.experiment, self.tracking_uri).save(self.run_dir)
        arguments = [str(self.run_dir), "--to", self.tracking_uri, "--experiment", self.experiment]
        arguments += ["--afresh"] * self.afresh + ["--only-sends"] * self.only_sends
        if job := slurm_job():
            arguments += ["--job", job]
        if self.system_every_s is not None:
            arguments += ["--system", str(self.system_every_s)]
        sender_environment = dict(_SENDER_ENVIRONMENT)
        if sqlite_file(self.tracking_uri) is not None:
            # A connection that stays open goes on writing into a file that was removed.
            sender_environment["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
        with open_append(run.sender_log_path) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "vssl_dist.tracker", *arguments],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=sender_environment | outside_jobs(os.environ) | own_code_only(os.environ),
                # Signals meant for the trainer (a preemption, Ctrl-C) are not for this one.
                start_new_session=True,
            )

    def close(self, timeout_s: float = 30.0) -> bool:
        """Send what is left and end the process, within ``timeout_s`` seconds.

        Returns:
            Whether everything in the spool has reached MLflow.
        """
        deadline = time.monotonic() + timeout_s
        exit_code = self._end_process(deadline)
        if exit_code is not None and exit_code < 0 and time.monotonic() < deadline:
            # Somebody killed it (out of memory, say); one more may have better luck.
            self.start()
            exit_code = self._end_process(deadline)
        return exit_code == 0

    def _end_process(self, deadline: float) -> int | None:
        """End the process; return its exit code, ``None`` if it did not run or end in time."""
        process, self._process = self._process, None
        if process is None:
            return None
        seconds = max(0.0, deadline - time.monotonic())
        try:
            process.communicate(f"close {seconds}\n".encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            # Replays are idempotent: it may be stopped anywhere.
            process.kill()
            process.communicate()
            return None
        return process.returncode

    def __enter__(self) -> Flusher:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(_EXIT_WAIT_S)


def flush_once(run_dir: Path, tracking_uri: str, timeout_s: float = 600.0) -> bool:
    """Bring a run's spool to MLflow, for an evaluation that ends after the trainer.

    If another flusher holds the lease this waits until that one has sent everything where it
    sends.  A machine that is merely busy has all of the time; a server that is away is given up
    after half a minute, one that says no at once.

    Args:
        run_dir: The run's folder.
        tracking_uri: Where curves go now, as the user says: what the folder says may be another's
            word, and whoever sends there signs with the user's own password.
        timeout_s: Wait no longer.

    Returns:
        Whether nothing is left to send; true also of a run that never had a tracker.
    """
    if not RunFolder(run_dir).mlflow_record_path.exists():
        return True
    record = TrackingRecord.load(run_dir, settle_identity(run_dir))
    if tracking_uri == NO_TRACKING or is_flushed(run_dir, tracking_uri):
        return True
    flusher = Flusher(run_dir, record.experiment, tracking_uri, only_sends=True)
    flusher.start()
    return flusher.close(timeout_s)


def why_not_all_sent(
    run_dir: Path, tracking_uri: str, writer_names: Collection[str] = ()
) -> str | None:
    """Say in one line what of a run MLflow lacks, why, and the remedy; ``None`` if it has all.

    Args:
        run_dir: The run's folder.
        tracking_uri: Where curves go now.
        writer_names: Ask for what these have written only; that somebody is sending it is as good
            as sent then.  By default everybody's, and who is sending is named.
    """
    command = f"{command_line('launch/track.py')} {shell_word(run_dir)}"
    if tracking_uri == NO_TRACKING:
        return (
            f"curves are in the spool only (MLFLOW_TRACKING_URI={NO_TRACKING}): {command} --to URI"
        )
    if is_flushed(run_dir, tracking_uri, writer_names):
        refusal_reasons = load_spool_cursor(run_dir, tracking_uri).refusal_reasons
        if not refusal_reasons:
            return None
        refused_names = [*refusal_reasons][:_MAX_NAMED_REFUSALS] + [
            f"{len(refusal_reasons) - _MAX_NAMED_REFUSALS} more"
        ] * (len(refusal_reasons) > _MAX_NAMED_REFUSALS)
        return (
            f"MLflow does not take {printable(', '.join(refused_names))} "
            f"({printable(next(iter(refusal_reasons.values())))}); all else has arrived, and "
            f"{command} tries again"
        )
    sender = Sender.load(run_dir)
    lease_owner = lease_holder(run_dir)
    if lease_owner is not None and lease_owner.tracking_uri == tracking_uri and writer_names:
        if lease_owner.problem is None:
            return None
        reason = printable(lease_owner.problem)
    elif lease_owner is not None:
        reason = lease_owner.activity
    elif sender is None or sender.tracking_uri != tracking_uri:
        reason = "nobody has sent them there"
    else:
        reason = printable(sender.problem or "there was not enough time")
    return (
        f"not all curves have reached MLflow at {tracking_uri} ({reason}); they are in "
        f"{as_utf8(str(RunFolder(run_dir).spool_folder))}: {command} sends them"
    )
