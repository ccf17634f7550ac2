"""Whether a run's curves are this user's own to send without being asked to."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from vssl_dist.confidential import redact_secrets
from vssl_dist.durable import user_name
from vssl_dist.installed import command_line
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.address import NO_TRACKING
from vssl_dist.tracker.cursor import is_flushed
from vssl_dist.tracker.identity import shell_word, stored_identity
from vssl_dist.tracker.record import TrackingRecord


def why_not_sent_unasked(
    run_dir: Path, tracking_uri: str, *, names_whole_run: bool = True
) -> str | None:
    """Say in one line why curves are not sent unless asked for; ``None`` if they may be.

    A folder that somebody else has made, or that names another address than the user's own, may
    hold anything: it reaches a server when the user says so.

    Args:
        run_dir: A run's folder, or any other; it is only read.
        tracking_uri: The user's own address.
        names_whole_run: The user has named the run and not a single export of it.
    """
    stored_uri = TrackingRecord.load(run_dir, stored_identity(run_dir)).tracking_uri
    if not stored_uri or tracking_uri == NO_TRACKING:
        return None
    reason = ""
    for path in (run_dir.resolve(), *sorted(_evidence_paths(run_dir))):
        with suppress(OSError):
            if (owner_uid := path.lstat().st_uid) not in (os.geteuid(), 0):
                reason = f"{path} belongs to {user_name(owner_uid)}"
                break
    if not reason and stored_uri != tracking_uri:
        reason = f"its curves went to {stored_uri}, your address is {tracking_uri}"
    if not reason and not names_whole_run and not is_flushed(run_dir, tracking_uri):
        reason = "an export was named, and not its run"
    if not reason:
        return None
    command = (
        f"{command_line('launch/track.py')} {shell_word(run_dir)} --to {shlex.quote(tracking_uri)}"
    )
    refusal_text = printable(redact_secrets(f"curves of {run_dir} are not sent ({reason})"))
    return f"{refusal_text}: {command} sends them"


def _evidence_paths(run_dir: Path) -> Iterator[Path]:
    """Yield the files that say where curves go and what they are."""
    run = RunFolder(run_dir)
    yield from (run.mlflow_record_path, run.identity_path, run.spool_folder)
    with suppress(OSError):
        yield from run.spool_folder.iterdir()
