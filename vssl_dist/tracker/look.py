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
from vssl_dist.tracker.address import EXPERIMENT, NOWHERE, database
from vssl_dist.tracker.identity import in_shell, peek, readable
from vssl_dist.tracker.record import Record

_WITHIN_S = 5.0


@dataclass(frozen=True)
class Answer:
    """What keeps curves from arriving there, in one line each, with the remedy."""

    problem: str | None = None
    """Will not pass by itself."""
    doubt: str | None = None
    """May pass: until then curves wait in the spool."""
    note: str | None = None
    """Is as it should not be, and no reason to wait."""


@dataclass(frozen=True)
class Question:
    """What is looked for: the experiment, and the run if it has been there before."""

    uri: str
    run_dir: Path
    experiment: str
    uuid: str
    run_id: str | None

    def experiment_in_bin(self, experiment_id: object) -> Answer:
        """The experiment was deleted, which MLflow can undo."""
        return Answer(
            f"MLflow's experiment {self.experiment} at {self.uri} is in the bin and takes no runs: "
            f"{self._command('experiments', f'--experiment-id {experiment_id}')} brings it back"
        )

    def run_in_bin(self, run_id: object) -> Answer:
        """The run was deleted, which MLflow can undo."""
        return Answer(
            f"the MLflow run of {readable(str(self.run_dir))} at {self.uri} is in the bin and "
            f"takes no curves: {self._command('runs', f'--run-id {run_id}')} brings it back; or "
            "give this run another name"
        )

    def run_of_another(self) -> Answer:
        """The MLflow run that is written down in the folder does not bear this run's mark."""
        return Answer(
            note=f"MLflow run {self.run_id} at {self.uri}, which "
            f"{printable(str(RunFolder(self.run_dir).mlflow_record))} names, is another run's: "
            "this one gets one of its own, with all of its history"
        )

    def _command(self, what: str, which: str) -> str:
        return f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow {what} restore {which}"

    def away(self, reason: object) -> Answer:
        """It cannot be reached now."""
        return Answer(
            doubt=f"MLflow at {self.uri} does not answer ({' '.join(str(reason).split())[:200]}): "
            f"curves wait in {readable(str(RunFolder(self.run_dir).spool))}, and "
            f"`{command_line('launch/track.py')} {in_shell(self.run_dir)}` "
            "sends them once it does"
        )


def look(
    uri: str, run_dir: Path, experiment: str = EXPERIMENT, timeout_s: float = _WITHIN_S
) -> Answer:
    """Whether MLflow at ``uri`` will take the curves of a run, found out within ``timeout_s``.

    Args:
        uri: As `normal` makes it and `check_tracking` lets it pass.
        run_dir: The run's folder, which need not exist.
        experiment: Its name in MLflow.
        timeout_s: Storage and servers that hang get so long.
    """
    question = Question(uri, run_dir, experiment, "", None)
    answers: list[Answer] = []

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


def _ask(uri: str, run_dir: Path, experiment: str, timeout_s: float) -> Answer:
    identity = peek(run_dir)
    record = Record.load(run_dir, identity)
    question = Question(uri, run_dir, experiment, record.uuid, record.runs.get(uri))
    file = database(uri)
    if file is not None:
        from vssl_dist.tracker.files import look_at_database

        return look_at_database(file, question, timeout_s)
    if uri != NOWHERE and uri.partition(":")[0].lower() in ("http", "https"):
        from vssl_dist.tracker.server import look_at_server

        return look_at_server(question, timeout_s)
    return Answer()


def schema_history() -> tuple[str, set[str]]:
    """The newest schema of the installed MLflow's databases, and all that went before.

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
    """The first of a path's parents that is there."""
    return next((parent for parent in path.parents if os.path.lexists(parent)), Path("/"))
