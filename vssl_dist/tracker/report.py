"""What is asked of the place where curves go, and what the answer says, a line for each finding."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from vssl_dist.installed import command_line
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable
from vssl_dist.tracker.identity import as_utf8, shell_word


@dataclass(frozen=True)
class TrackingReport:
    """Report on what keeps curves from arriving at an address: a line each, with the remedy."""

    problem: str | None = None
    """Obstacle that will not pass by itself."""
    passing_problem: str | None = None
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
        command = self._restore_command("experiments", f"--experiment-id {experiment_id}")
        return TrackingReport(
            f"MLflow's experiment {self.experiment} at {self.uri} is in the bin and takes no runs: "
            f"{command} brings it back"
        )

    def run_in_bin(self, run_id: object) -> TrackingReport:
        """Report that the run was deleted, which MLflow can undo."""
        command = self._restore_command("runs", f"--run-id {run_id}")
        return TrackingReport(
            f"the MLflow run of {as_utf8(str(self.run_dir))} at {self.uri} is in the bin and "
            f"takes no curves: {command} brings it back; or give this run another name"
        )

    def run_of_another(self) -> TrackingReport:
        """Report that the MLflow run which the folder names does not bear this run's mark."""
        return TrackingReport(
            note=f"MLflow run {self.run_id} at {self.uri}, which "
            f"{printable(str(RunFolder(self.run_dir).mlflow_record_path))} names, is another "
            "run's: this one gets one of its own, with all of its history"
        )

    def _restore_command(self, mlflow_group: str, option: str) -> str:
        return f"MLFLOW_TRACKING_URI={shlex.quote(self.uri)} mlflow {mlflow_group} restore {option}"

    def report_unreachable(self, reason: object) -> TrackingReport:
        """Report that the address cannot be reached now."""
        reason_text = " ".join(str(reason).split())[:200]
        spool_text = as_utf8(str(RunFolder(self.run_dir).spool_folder))
        return TrackingReport(
            passing_problem=f"MLflow at {self.uri} does not answer ({reason_text}): "
            f"curves wait in {spool_text}, and "
            f"`{command_line('launch/track.py')} {shell_word(self.run_dir)}` "
            "sends them once it does"
        )
