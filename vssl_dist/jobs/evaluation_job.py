"""One evaluation of one export: whether it is due, what was tried, and doing it."""

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
from vssl_dist.durable import publish_inside, refuse_way_out
from vssl_dist.errors import ConfigError
from vssl_dist.exports.card import Card
from vssl_dist.exports.results import read_result
from vssl_dist.installed import print_any_path
from vssl_dist.jobs import machine, private
from vssl_dist.jobs.owner import JobId
from vssl_dist.jobs.resources import Device, load_launch
from vssl_dist.jobs.stop import REFUSED
from vssl_dist.run_folder import ExportFolder, RunFolder, card_of, step_of

_log = logging.getLogger(__name__)
_MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class PendingEvaluation:
    """One evaluation of one export that has no result yet."""

    export: Path
    step: int
    task: TaskConfig

    @property
    def result(self) -> Path:
        """Where the evaluation leaves its result."""
        return ExportFolder.of(self.export).result(self.task.stem, self.step)

    @property
    def record(self) -> Path:
        """Where the attempts are counted."""
        return ExportFolder.of(self.export).attempts(self.task.stem, self.step)

    @property
    def card(self) -> Path:
        """What the trainer says of the export, written after it."""
        return card_of(self.export)

    def done(self) -> bool:
        """Whether there is a result, of the weights that lie there now and the density wanted."""
        return self._found() is not None

    def final(self) -> bool:
        """Whether doing it again would find the same: it is done, and no image was replaced."""
        found = self._found()
        return found is not None and found.get("substituted_images") == 0

    def _found(self) -> dict[str, Any] | None:
        try:
            result, card = read_result(self.result), Card.read(self.card)
            same = bool(result["export_sha256"] == card.sha256)
            if isinstance(self.task, OodConfig):
                same &= result.get("density", self.task.density) == self.task.density
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return result if same else None

    def attempts(self) -> Attempts:
        """What has been tried."""
        try:
            tried = private.read(self.record, _MAX_BYTES)
            return TypeAdapter(Attempts).validate_json(tried)
        except (OSError, ValueError):
            return Attempts()

    def record_attempt(self, attempts: Attempts) -> None:
        """Write down what has been tried, before it is, so that a kill counts too."""
        publish_inside(self.record, json.dumps(asdict(attempts)).encode())


@dataclass(frozen=True)
class Attempts:
    """How often an evaluation was tried, and by which SLURM job last."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    count: Annotated[int, Field(ge=0)] = 0
    job: JobId | None = None


def pending_evaluations(cfg: RunConfig, samples: int) -> Iterator[PendingEvaluation]:
    """Every evaluation that should have a result and has none, newest export first.

    Args:
        cfg: The run; its exports lie in ``cfg.dir``.
        samples: Images of its training set.
    """
    for export in reversed(RunFolder(cfg.dir).exports.backbones()):
        step = step_of(export)
        if step is None:  # somebody's own file
            continue
        for task in cfg.evaluations_at(step, samples):
            candidate = PendingEvaluation(export, step, task)
            # The card comes last, and whoever writes it asks again.
            if candidate.card.exists() and not candidate.done():
                yield candidate


@dataclass(frozen=True)
class EvalJob:
    """One evaluation as a SLURM job.  Picklable: text and paths."""

    run_dir: Path
    export: Path
    step: int
    task_json: str
    device: Device
    threads: int
    ranks: int = 1

    def __call__(self) -> None:
        """Evaluate and leave; the numbers are in MLflow, or in the spool if it is away."""
        print_any_path()
        logs.configure_log("evaluation")
        task = read_task(self.task_json)
        one = PendingEvaluation(self.export, self.step, task)
        try:
            private.secure(self.run_dir)
            evaluate_one(self.run_dir, one, self.device, self.threads, self.ranks)
            tracking_uri = load_launch(self.run_dir).tracking_uri
        except ConfigError as error:
            _log.error("%s", error)
            sys.exit(REFUSED)
        flush_to_mlflow(self.run_dir, tracking_uri)


def evaluate_one(
    run_dir: Path, one: PendingEvaluation, device: Device, threads: int, ranks: int = 1
) -> dict[str, Any]:
    """Evaluate one export of a run here and now; its metrics go to the step of the export,
    its pictures to the run's artifacts, once they are sent (`flush_to_mlflow`).

    Returns:
        What was written to ``one.result``.

    Raises:
        ConfigError: torch cannot use the GPUs that it is to be done on.
        OSError: The file of its curve is a link out of its folder.
    """
    import torch

    from vssl_dist.evaluation.run import EvalSettings, evaluate
    from vssl_dist.tracker import Spool, settle

    machine.check(device)
    writer = f"eval-{one.task.stem}-{one.step:08d}"
    settle(run_dir)
    refuse_way_out(RunFolder(run_dir).spool_file(writer))
    torch.set_num_threads(threads)
    result = evaluate(one.export, one.task, EvalSettings(device, threads, ranks=ranks))
    spool = Spool(run_dir, writer)
    spool.metrics(result["metrics"], one.step)
    for plot in result.get("plots", ()):
        spool.artifact(one.export.with_name(plot))
    spool.close()
    for name, value in [*result["metrics"].items()][:1]:
        _log.info("%s: %s %.4g", one.export.name, name, value)
    one.record.unlink(missing_ok=True)
    return result


def flush_to_mlflow(run_dir: Path, tracking_uri: str) -> None:
    """Bring what a run's processes have noted to MLflow, or say why not and what will.

    Args:
        run_dir: The run's folder; nothing is sent of one that no tracker was ever asked for.
        tracking_uri: Where curves go now, as the user says.
    """
    from vssl_dist.tracker import (
        NOWHERE,
        Record,
        check_tracking,
        flush_once,
        flushed,
        holder,
        peek,
        shortfall,
    )

    before = Record.load(run_dir, peek(run_dir))
    if not before.tracking_uri or tracking_uri == NOWHERE:
        return
    if problem := check_tracking(tracking_uri, hosts=1):
        _log.warning("%s is not sent: %s", run_dir, problem)
        return
    working = None if flushed(run_dir, tracking_uri) else holder(run_dir)
    if working is None or working.is_known:
        if working is not None and working.tracking_uri != tracking_uri:
            _log.info("waiting for the curves: %s", working.doing)
        flush_once(run_dir, tracking_uri)
    own, now = before.runs.get(tracking_uri), Record.load(run_dir, peek(run_dir)).run_id
    if line := shortfall(run_dir, tracking_uri):
        _log.warning("%s", line)
    elif before.tracking_uri != tracking_uri:
        _log.info("curves      %s (before: %s)", tracking_uri, before.tracking_uri)
    elif own not in (None, now):
        _log.info(
            "curves      MLflow run %s with all of the history (%s is none of this run's)", now, own
        )


def send_unasked(run_dir: Path, tracking_uri: str, *, whole: bool) -> None:
    """The same for a command that is not about sending: it leaves alone what may be another's.

    Args:
        run_dir: See `flush_to_mlflow`.
        tracking_uri: The user's own address.
        whole: The user has named the run and not a single export.
    """
    from vssl_dist.tracker import check_tracking, flushed, why_not_asked_for

    if check_tracking(tracking_uri, hosts=1) is None and (
        line := why_not_asked_for(run_dir, tracking_uri, whole=whole)
    ):
        _log.warning("%s", line)
    elif whole and not os.access(run_dir, os.W_OK | os.X_OK):
        if not flushed(run_dir, tracking_uri):
            _log.warning("curves of %s are not sent: nothing can be written there", run_dir)
    elif whole:
        flush_to_mlflow(run_dir, tracking_uri)
