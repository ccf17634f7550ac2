"""Send the curves of runs to where tracking points now, wherever they went before.

    python launch/track.py runs/cifar10_vje
    python launch/track.py runs/* --to http://mlflow1:5000
    MLFLOW_TRACKING_URI=sqlite:////scratch/me/mlflow.db python launch/track.py runs/*

Without --to that is MLFLOW_TRACKING_URI, or mlflow.db in this folder.  A server that has not seen a
run gets all of its history; nothing arrives twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from vssl_dist.cli.program import arguments as typed
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.durable import forbid_writing_by_others
from vssl_dist.errors import ConfigError, Refusal
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say
from vssl_dist.tracker import (
    NO_TRACKING,
    Flusher,
    TrackingRecord,
    check_tracking,
    default_tracking_uri,
    lease_holder,
    normalised_uri,
    probe_tracking,
    settle_identity,
    why_not_all_sent,
)

_LEASE_WAIT_S = 5.0
_SEND_TIMEOUT_S = 3600.0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("track", argv)


class ServerAwayError(Refusal):
    """The tracking server does not answer at the moment; one line with the remedy."""

    exit_code = 1


def find_unsendable_runs(run_folders: Sequence[Path], uri: str) -> dict[Path, str]:
    """Find out which runs cannot be sent, before any of them is.

    Returns:
        By folder, why it is not sent: it is no run's, or its MLflow run is in the bin.

    Raises:
        ConfigError: One line that names what is wrong with all of them, and the remedy.
        ServerAwayError: The server does not answer.
    """
    for run in run_folders:
        if not run.exists():
            raise ConfigError(f"{run}: no such folder")
    if uri == NO_TRACKING:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={NO_TRACKING} is no place to send to: --to URI names one"
        )
    if problem := check_tracking(uri, num_hosts=1):
        raise ConfigError(problem)
    problems = {}
    for run in run_folders:
        if not RunFolder(run).spool_folder.is_dir():
            problems[run] = "has no spool, so it is no run's folder"
            continue
        tracking_report = probe_tracking(uri, run)
        if tracking_report.problem:
            problems[run] = tracking_report.problem
        if tracking_report.note:
            say(f"warning: {tracking_report.note}", to_stderr=True)
        if tracking_report.passing_problem:
            raise ServerAwayError(tracking_report.passing_problem)
    if len(problems) == len(run_folders):
        run, problem = next(iter(problems.items()))
        raise ConfigError(f"{run}: {problem}")
    return problems


def send_run(run: Path, uri: str) -> bool:
    """Send the curves of one run and say in a line how that went; returns whether all are there."""
    identity = settle_identity(run)  # first: a copy's lease may be the original's
    sender = lease_holder(run, _LEASE_WAIT_S)
    if sender is None:
        record = TrackingRecord.load(run, identity)
        flusher = Flusher(run, record.experiment, uri, retry_refused=True, only_sends=True)
        flusher.start()
        flusher.close(_SEND_TIMEOUT_S)
    elif sender.tracking_uri != uri:
        say(f"{run}: {sender.activity}: wait for its end, or stop it")
        return False
    line = why_not_all_sent(run, uri)
    say(f"{run}: {line or f'all of it is at {uri}'}")
    return line is None


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0 (all sent), 1 (not all), 2 (refused), or 130 after Ctrl-C."""
    args = arguments(argv)
    forbid_writing_by_others()
    with end_in_one_line(
        interrupted_message="stopped: the same command sends what is missing"
    ) as ending:
        if args.to is not None and not args.to.strip():
            raise ConfigError("--to: is empty; without --to curves go to MLFLOW_TRACKING_URI")
        uri = normalised_uri(args.to) if args.to else default_tracking_uri()
        run_folders = [run.resolve() for run in args.runs]
        problems = find_unsendable_runs(run_folders, uri)
        for run, problem in problems.items():
            say(f"error: {run}: {problem}", to_stderr=True)
        are_sent = [run not in problems and send_run(run, uri) for run in run_folders]
        ending.exit_code = 0 if all(are_sent) else 1
    return ending.exit_code
