"""One bounded look at where curves are to go, before a run: without mlflow, and writing nothing."""

from __future__ import annotations

import threading
from pathlib import Path

from vssl_dist.tracker.address import EXPERIMENT_NAME, NO_TRACKING, sqlite_file
from vssl_dist.tracker.files import look_at_database
from vssl_dist.tracker.identity import stored_identity
from vssl_dist.tracker.record import TrackingRecord
from vssl_dist.tracker.report import TrackingQuery, TrackingReport

_PROBE_TIMEOUT_S = 5.0


def probe_tracking(
    uri: str, run_dir: Path, experiment: str = EXPERIMENT_NAME, timeout_s: float = _PROBE_TIMEOUT_S
) -> TrackingReport:
    """Find out within ``timeout_s`` whether MLflow at ``uri`` will take the curves of a run.

    Args:
        uri: As `normalised_uri` makes it and `check_tracking` lets it pass.
        run_dir: The run's folder, which need not exist.
        experiment: Its name in MLflow.
        timeout_s: Storage and servers that hang get so long.
    """
    tracking_query = TrackingQuery(uri, run_dir, experiment, "", None)
    reports: list[TrackingReport] = []

    def collect_report() -> None:
        try:
            reports.append(_probe_address(uri, run_dir, experiment, timeout_s))
        except Exception as error:  # a look that goes wrong is no reason to refuse a run
            reports.append(tracking_query.report_unreachable(f"{type(error).__name__}: {error}"))

    # Names are resolved and files are opened without any timeout of their own.
    thread = threading.Thread(target=collect_report, name="look", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return (
        reports[0]
        if reports
        else tracking_query.report_unreachable(f"nothing within {timeout_s:g} s")
    )


def _probe_address(uri: str, run_dir: Path, experiment: str, timeout_s: float) -> TrackingReport:
    identity = stored_identity(run_dir)
    record = TrackingRecord.load(run_dir, identity)
    tracking_query = TrackingQuery(uri, run_dir, experiment, record.uuid, record.runs.get(uri))
    database_path = sqlite_file(uri)
    if database_path is not None:
        return look_at_database(database_path, tracking_query, timeout_s)
    if uri != NO_TRACKING and uri.partition(":")[0].lower() in ("http", "https"):
        from vssl_dist.tracker.server import look_at_server  # requests, for servers alone

        return look_at_server(tracking_query, timeout_s)
    return TrackingReport()
