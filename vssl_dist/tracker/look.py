"""One bounded look at where curves are to go, before a run: without mlflow, and writing nothing."""

from __future__ import annotations

import os
import re
import shlex
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from vssl_dist.installed import command_line
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.address import EXPERIMENT, NOWHERE, sqlite_file
from vssl_dist.tracker.identity import as_utf8, shell_word, stored_identity
from vssl_dist.tracker.record import Record

_WITHIN_S = 5.0


@dataclass(frozen=True)
class TrackingReport:
    """Report on what keeps curves from arriving at an address: a line each, with the remedy."""

    problem: str | None = None
    """Obstacle that will not pass by itself."""
    doubt: str | None = None
    """Obstacle that may pass: until then curves wait in the spool."""
    note: str | None = None
    """Oddity that is no reason to wait."""


@dataclass(frozen=True)
class TrackingQuery:
    """Question to an address: has it the experiment, and the run if it was sent there before."""

    uri: str
    run_dir: Path
    experiment: str
    uuid: str
    run_id: str | None

    def experiment_in_bin(self, experiment_id: object) -> TrackingReport:
        """Report that the experiment was deleted, which MLflow can undo."""
        return TrackingReport(
            f"MLflow's experiment {self.experiment} at {self.uri} is in the bin and takes no runs: "
            f"{self._command('experiments', f'--experiment-id {experiment_id}')} brings it back"
        )

    def run_in_bin(self, run_id: object) -> TrackingReport:
        """Report that the run was deleted, which MLflow can undo."""
        return TrackingReport(
            f"the MLflow run of {as_utf8(str(self.run_dir))} at {self.uri} is in the bin and "
            f"takes no curves: {self._command('runs', f'--run-id {run_id}')} brings it back; or "
            "give this run another name"
        )

    def run_of_another(self) -> TrackingReport:
        """Report that the MLflow run which the folder names does not bear this run's mark."""
        return TrackingReport(
            note=f"MLflow run {self.run_id} at {self.uri}, which "
            f"{printable(str(RunFolder(self.run_dir).mlflow_record))} names, is another run's: "
            "this one gets one of its own, with all of its history"
        )

    def _command(self, group: str, option: str) -> str:
        return f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow {group} restore {option}"

    def away(self, reason: object) -> TrackingReport:
        """Report that the address cannot be reached now."""
        return TrackingReport(
            doubt=f"MLflow at {self.uri} does not answer ({' '.join(str(reason).split())[:200]}): "
            f"curves wait in {as_utf8(str(RunFolder(self.run_dir).spool))}, and "
            f"`{command_line('launch/track.py')} {shell_word(self.run_dir)}` "
            "sends them once it does"
        )


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
        from vssl_dist.tracker.files import look_at_database

        return look_at_database(file, question, timeout_s)
    if uri != NOWHERE and uri.partition(":")[0].lower() in ("http", "https"):
        from vssl_dist.tracker.server import look_at_server

        return look_at_server(question, timeout_s)
    return TrackingReport()


def schema_history() -> tuple[str, set[str]]:
    """Return the newest schema of the installed MLflow's databases, and all that went before.

    They stand in its migrations, one file each, as ``revision`` and ``down_revision``.
    """
    spec = find_spec("mlflow")
    if spec is None or spec.origin is None:
        return "", set()
    folder = Path(spec.origin).parent / "store" / "db_migrations" / "versions"
    revisions: set[str] = set()
    replaced: set[str] = set()
    for file in folder.glob("*.py"):
        text = file.read_text()
        for names, line in ((revisions, r"revision"), (replaced, r"down_revision")):
            if statement := re.search(rf"^{line}(?:\s*:[^=]+)?\s*=\s*(.+)$", text, re.M):
                names |= set(re.findall(r"[\"']([0-9a-f]+)[\"']", statement[1]))
    newest = revisions - replaced
    return (newest.pop(), revisions) if len(newest) == 1 else ("", revisions)


def nearest_folder(path: Path) -> Path:
    """Return the first of a path's parents that is there."""
    return next((parent for parent in path.parents if os.path.lexists(parent)), Path("/"))
