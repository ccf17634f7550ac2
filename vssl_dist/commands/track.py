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
from vssl_dist.text import print_printable
from vssl_dist.tracker import (
    NOWHERE,
    Flusher,
    Record,
    check_tracking,
    default_tracking_uri,
    lease_holder,
    normalised_uri,
    probe_tracking,
    settle_identity,
    shortfall,
)

_WAIT_S = 5.0
_WITHIN_S = 3600.0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("track", argv)


class AwayError(Refusal):
    """The tracking server does not answer at the moment; one line with the remedy."""

    exit_code = 1


def check(runs: Sequence[Path], uri: str) -> dict[Path, str]:
    """Find out which runs cannot be sent, before any of them is.

    Returns:
        By folder, why it is not sent: it is no run's, or its MLflow run is in the bin.

    Raises:
        ConfigError: One line that names what is wrong with all of them, and the remedy.
        AwayError: The server does not answer.
    """
    for run in runs:
        if not run.exists():
            raise ConfigError(f"{run}: no such folder")
    if uri == NOWHERE:
        raise ConfigError(
            f"MLFLOW_TRACKING_URI={NOWHERE} is no place to send to: --to URI names one"
        )
    if problem := check_tracking(uri, hosts=1):
        raise ConfigError(problem)
    problems = {}
    for run in runs:
        if not RunFolder(run).spool_folder.is_dir():
            problems[run] = "has no spool, so it is no run's folder"
            continue
        answer = probe_tracking(uri, run)
        if answer.problem:
            problems[run] = answer.problem
        if answer.note:
            print_printable(f"warning: {answer.note}", to_stderr=True)
        if answer.doubt:
            raise AwayError(answer.doubt)
    if len(problems) == len(runs):
        run, problem = next(iter(problems.items()))
        raise ConfigError(f"{run}: {problem}")
    return problems


def send(run: Path, uri: str) -> bool:
    """Send the curves of one run and say in a line how that went; returns whether all are there."""
    identity = settle_identity(run)  # first: a copy's lease may be the original's
    sender = lease_holder(run, _WAIT_S)
    if sender is None:
        record = Record.load(run, identity)
        flusher = Flusher(run, record.experiment, uri, afresh=True, only_sends=True)
        flusher.start()
        flusher.close(_WITHIN_S)
    elif sender.tracking_uri != uri:
        print_printable(f"{run}: {sender.doing}: wait for its end, or stop it")
        return False
    line = shortfall(run, uri)
    print_printable(f"{run}: {line or f'all of it is at {uri}'}")
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
        runs = [run.resolve() for run in args.runs]
        problems = check(runs, uri)
        for run, problem in problems.items():
            print_printable(f"error: {run}: {problem}", to_stderr=True)
        sent = [run not in problems and send(run, uri) for run in runs]
        ending.exit_code = 0 if all(sent) else 1
    return ending.exit_code
