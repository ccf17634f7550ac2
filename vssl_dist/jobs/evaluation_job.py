"""One evaluation of one export: whether it is pending, how often it was tried, and running it."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter

from vssl_dist import logs
from vssl_dist.config import OodConfig, RunConfig, TaskConfig, read_task
from vssl_dist.durable import refuse_link_out_of_folder, write_inside_folder
from vssl_dist.errors import ConfigError
from vssl_dist.exports.card import Card
from vssl_dist.exports.results import read_result
from vssl_dist.installed import print_any_path
from vssl_dist.jobs import machine, private
from vssl_dist.jobs.owner import JobId
from vssl_dist.jobs.resources import Device, load_launch
from vssl_dist.jobs.stop import REFUSED_EXIT_CODE
from vssl_dist.run_folder import ExportFolder, RunFolder, card_path_of, step_of_backbone

_log = logging.getLogger(__name__)
_MAX_ATTEMPTS_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class PendingEvaluation:
    """One evaluation of one export that has no result yet."""

    export: Path
    step: int
    task: TaskConfig

    @property
    def result_path(self) -> Path:
        """The file that the evaluation writes its result to."""
        return ExportFolder.of(self.export).result_path(self.task.stem, self.step)

    @property
    def attempts_path(self) -> Path:
        """The hidden file that counts the attempts at this evaluation."""
        return ExportFolder.of(self.export).attempts_path(self.task.stem, self.step)

    @property
    def card_path(self) -> Path:
        """The card beside the export, which the trainer writes after the weights."""
        return card_path_of(self.export)

    def is_done(self) -> bool:
        """Whether there is a result of the present weights and the density asked for."""
        return self._read_result() is not None

    def is_final(self) -> bool:
        """Whether a repetition would give the same result: none of the images was replaced."""
        result = self._read_result()
        return result is not None and result.get("substituted_images") == 0

    def _read_result(self) -> dict[str, Any] | None:
        try:
            result = read_result(self.result_path)
            # Other weights may have been exported at the same step since.
            is_current = bool(result["export_sha256"] == Card.read(self.card_path).sha256)
            if isinstance(self.task, OodConfig):
                is_current &= result.get("density", self.task.density) == self.task.density
        # Anybody's file may lie there, of any content: it is no result then.
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return result if is_current else None

    def read_attempts(self) -> Attempts:
        """Read how often this was tried; a file that cannot be read counts as no attempt."""
        try:
            text = private.read_text_file(self.attempts_path, _MAX_ATTEMPTS_FILE_BYTES)
            return TypeAdapter(Attempts).validate_json(text)
        except (OSError, ValueError):
            return Attempts()

    def record_attempt(self, attempts: Attempts) -> None:
        """Write the attempts down: before one begins, so that one that is killed counts too."""
        write_inside_folder(self.attempts_path, json.dumps(asdict(attempts)).encode())


@dataclass(frozen=True)
class Attempts:
    """How often an evaluation was tried, and by which SLURM job last."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    count: Annotated[int, Field(ge=0)] = 0
    job: JobId | None = None


def pending_evaluations(cfg: RunConfig, samples: int) -> Iterator[PendingEvaluation]:
    """Find every evaluation that should have a result and has none, newest export first.

    Args:
        cfg: The run; its exports lie in ``cfg.dir``.
        samples: Images of its training set.
    """
    for export in reversed(RunFolder(cfg.dir).export_folder.list_backbones()):
        step = step_of_backbone(export)
        if step is None:  # a file that the user has put there
            continue
        for task in cfg.evaluations_at(step, samples):
            evaluation = PendingEvaluation(export, step, task)
            # Without its card an export is not whole yet; whoever writes the card asks again.
            if evaluation.card_path.exists() and not evaluation.is_done():
                yield evaluation


@dataclass(frozen=True)
class EvalJob:
    """One evaluation as a SLURM job.

    Queued jobs are pickles: these fields keep their names, and hold text and paths alone.
    """

    run_dir: Path
    export: Path
    step: int
    task_json: str
    device: Device
    threads: int
    ranks: int = 1

    def __call__(self) -> None:
        """Evaluate, then send the metrics to MLflow; they stay in the spool where it is away."""
        print_any_path()
        logs.configure_log_output("evaluation")
        task_config = read_task(self.task_json)
        pending = PendingEvaluation(self.export, self.step, task_config)
        try:
            private.secure_run_folder(self.run_dir)
            evaluate_export(self.run_dir, pending, self.device, self.threads, self.ranks)
            tracking_uri = load_launch(self.run_dir).tracking_uri
        except ConfigError as error:
            _log.error("%s", error)
            sys.exit(REFUSED_EXIT_CODE)
        flush_to_mlflow(self.run_dir, tracking_uri)


def evaluate_export(
    run_dir: Path, pending: PendingEvaluation, device: Device, threads: int, ranks: int = 1
) -> dict[str, Any]:
    """Evaluate one export in this process, and note metrics and pictures in the run's spool.

    `flush_to_mlflow` then sends them: metrics to the export's step, pictures to the artifacts.

    Args:
        run_dir: The run's folder.
        pending: The export and the task.
        device: ``cuda`` or ``cpu``.
        threads: Threads of torch in each process.
        ranks: Processes that share a pass over the images.

    Returns:
        What was written to ``pending.result_path``.

    Raises:
        ConfigError: torch cannot use the GPUs that it is to be done on.
        OSError: The file of its curve is a link out of its folder.
    """
    import torch

    from vssl_dist.evaluation.run import EvalSettings, evaluate
    from vssl_dist.tracker import Spool, settle_identity

    machine.check_device(device)
    # A writer of its own for each evaluation: a spool file has one process that appends to it.
    spool_writer = f"eval-{pending.task.stem}-{pending.step:08d}"
    settle_identity(run_dir)
    refuse_link_out_of_folder(RunFolder(run_dir).spool_file_path(spool_writer))
    torch.set_num_threads(threads)
    result = evaluate(pending.export, pending.task, EvalSettings(device, threads, ranks=ranks))
    spool = Spool(run_dir, spool_writer)
    spool.metrics(result["metrics"], pending.step)
    for plot in result.get("plots", ()):
        spool.artifact(pending.export.with_name(plot))
    spool.close()
    for name, value in [*result["metrics"].items()][:1]:
        _log.info("%s: %s %.4g", pending.export.name, name, value)
    pending.attempts_path.unlink(missing_ok=True)
    return result


def flush_to_mlflow(run_dir: Path, tracking_uri: str) -> None:
    """Send what a run's processes have noted to MLflow, or log why not and which command will.

    Args:
        run_dir: The run's folder; nothing is sent of one that no tracker was ever asked for.
        tracking_uri: Where curves go now, as the user says.
    """
    from vssl_dist.tracker import (
        NO_TRACKING,
        TrackingRecord,
        check_tracking,
        flush_once,
        is_flushed,
        lease_holder,
        stored_identity,
        why_not_all_sent,
    )

    record = TrackingRecord.load(run_dir, stored_identity(run_dir))
    if not record.tracking_uri or tracking_uri == NO_TRACKING:
        return
    if problem := check_tracking(tracking_uri, num_hosts=1):
        _log.warning("%s is not sent: %s", run_dir, problem)
        return
    sender = None if is_flushed(run_dir, tracking_uri) else lease_holder(run_dir)
    if sender is None or sender.is_known:
        if sender is not None and sender.tracking_uri != tracking_uri:
            _log.info("waiting for the curves: %s", sender.activity)
        flush_once(run_dir, tracking_uri)
    old_run_id = record.runs.get(tracking_uri)
    run_id = TrackingRecord.load(run_dir, stored_identity(run_dir)).run_id
    if line := why_not_all_sent(run_dir, tracking_uri):
        _log.warning("%s", line)
    elif record.tracking_uri != tracking_uri:
        _log.info("curves      %s (before: %s)", tracking_uri, record.tracking_uri)
    elif old_run_id not in (None, run_id):
        _log.info(
            "curves      MLflow run %s with all of the history (%s is none of this run's)",
            run_id,
            old_run_id,
        )


def flush_own_run(run_dir: Path, tracking_uri: str, *, names_whole_run: bool) -> None:
    """Send a run's curves after a command that was not asked to: never those of another user.

    Args:
        run_dir: See `flush_to_mlflow`.
        tracking_uri: The user's own address.
        names_whole_run: The user has named the run and not a single export.
    """
    from vssl_dist.tracker import check_tracking, is_flushed, why_not_sent_unasked

    if check_tracking(tracking_uri, num_hosts=1) is None and (
        line := why_not_sent_unasked(run_dir, tracking_uri, names_whole_run=names_whole_run)
    ):
        _log.warning("%s", line)
    elif names_whole_run and not os.access(run_dir, os.W_OK | os.X_OK):
        if not is_flushed(run_dir, tracking_uri):
            _log.warning("curves of %s are not sent: nothing can be written there", run_dir)
    elif names_whole_run:
        flush_to_mlflow(run_dir, tracking_uri)
