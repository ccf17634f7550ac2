"""One bounded look at where curves are to go, before a run: without mlflow, and writing nothing."""

from __future__ import annotations

import threading
from pathlib import Path

from vssl_dist.tracker.address import EXPERIMENT, NOWHERE, sqlite_file
from vssl_dist.tracker.files import look_at_database
from vssl_dist.tracker.identity import stored_identity
from vssl_dist.tracker.record import Record
from vssl_dist.tracker.report import TrackingQuery, TrackingReport

_WITHIN_S = 5.0


def probe_tracking(
    uri: str, run_dir: Path, experiment: str = EXPERIMENT, timeout_s: float = _WITHIN_S
) -> TrackingReport:
    """Find out within ``timeout_s`` whether MLflow at ``uri`` will take the curves of a run.

    Args:
        uri: As `normal` makes it and `check_tracking` lets it pass.
        run_dir: The run's folder, which need not exist.
        experiment: Its name in MLflow.
        timeout_s: Storage and servers that hang get so long.
    """
    question = TrackingQuery(uri, run_dir, experiment, "", None)
    answers: list[TrackingReport] = []

    def ask() -> None:
        try:
            answers.append(_ask(uri, run_dir, experiment, timeout_s))
        except Exception as error:  # a look that goes wrong is no reason to refuse a run
            answers.append(question.away(f"{type(error).__name__}: {error}"))

    # Names are resolved and files are opened without any timeout of their own.
    thread = threading.Thread(target=ask, name="look", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers[0] if answers else question.away(f"nothing within {timeout_s:g} s")


def _ask(uri: str, run_dir: Path, experiment: str, timeout_s: float) -> TrackingReport:
    identity = stored_identity(run_dir)
    record = Record.load(run_dir, identity)
    question = TrackingQuery(uri, run_dir, experiment, record.uuid, record.runs.get(uri))
    file = sqlite_file(uri)
    if file is not None:
        return look_at_database(file, question, timeout_s)
    if uri != NOWHERE and uri.partition(":")[0].lower() in ("http", "https"):
        from vssl_dist.tracker.server import look_at_server  # requests, for servers alone

        return look_at_server(question, timeout_s)
    return TrackingReport()
