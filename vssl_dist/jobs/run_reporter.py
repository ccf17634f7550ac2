"""What rank 0 reports of a run: curves to the spool, progress to the log, exports to evaluate."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from vssl_dist import curves, dist
from vssl_dist.config import RunConfig, dump
from vssl_dist.data.store.manifest import Manifest
from vssl_dist.data.store.opening import read_manifest_watched
from vssl_dist.jobs.evaluation_queue import EvaluationSpawner
from vssl_dist.jobs.progress import ProgressReporter
from vssl_dist.jobs.resources import Launch
from vssl_dist.preview.sheet import write_augmentation_sheet
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker import (
    EXPERIMENT_NAME,
    NO_TRACKING,
    TRAINER_WRITERS,
    Flusher,
    Spool,
    Status,
    is_flushed,
    run_tags,
    why_not_all_sent,
)

_log = logging.getLogger(__name__)
_SYSTEM_SAMPLE_EVERY_S = 10.0
_RANK_NAME = "rank 0"


class NullReporter:
    """Reports nothing: what every rank but 0 has in place of a `RunReporter`."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Drop the metrics, which are the same on rank 0."""

    def on_export(self, path: Path, step: int) -> None:
        """Do nothing: exports are announced on rank 0 alone."""

    def close(self, status: Status, timeout_s: float) -> None:
        """Do nothing: nothing is open."""


def open_reporter(cfg: RunConfig, launch: Launch) -> RunReporter | NullReporter:
    """Open the reporter of this rank; every rank of the process group calls this."""
    hostnames = sorted(set(dist.gather(socket.gethostname())))
    return RunReporter(cfg, launch, hostnames) if dist.rank() == 0 else NullReporter()


class RunReporter:
    """Tracks one run while it trains, logs its progress and has its exports evaluated.

    None of it may end or delay a training: the spool does not raise, the flusher and the
    evaluations are processes of their own.  A dataset that cannot be opened ends it here as it
    would in the next moment.
    """

    def __init__(self, cfg: RunConfig, launch: Launch, hostnames: Sequence[str]) -> None:
        manifest = read_manifest_watched(
            cfg.data.train, timeout_s=cfg.data.timeout_s, who=_RANK_NAME
        )
        self.progress_reporter = ProgressReporter(cfg.total_steps(manifest.samples))
        self.has_evaluations = bool(cfg.evaluations)
        self.evaluation_spawner = EvaluationSpawner(cfg.dir, launch.cluster)
        self.spool = Spool(cfg.dir, "train")
        self.flusher = Flusher(
            cfg.dir, EXPERIMENT_NAME, launch.tracking_uri, system_every_s=_SYSTEM_SAMPLE_EVERY_S
        )
        self.spool.status("RUNNING")
        self.spool.tags(run_tags(world_size=launch.world_size, hosts=hostnames))
        self.spool.params(yaml.safe_load(dump(cfg)))
        self.spool.artifact(RunFolder(cfg.dir).config_path)
        self.flusher.start()
        self._note_augmentation_sheet(cfg, manifest)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the metrics of a step to the run's curves, and log them."""
        self.spool.metrics(curves.training_curves(metrics), step)
        _log.info("%s", self.progress_reporter.report(metrics, step))
        if collapse_line := self.progress_reporter.collapse_warning(metrics, step):
            _log.warning("%s", collapse_line)
            self.spool.tags({"vssl_dist.collapsed": f"step {step}"})

    def on_export(self, path: Path, step: int) -> None:
        """Start the evaluation of an export in a process that training does not wait for."""
        _log.info("exported %s", path)
        if self.has_evaluations:
            self.evaluation_spawner.start()

    def close(self, status: Status, timeout_s: float) -> None:
        """Note how the run ended and send what is left, within ``timeout_s`` for each part."""
        if status == "KILLED":
            _log.info("told to stop: the same command goes on from the last checkpoint")
        self.spool.status(status)
        self.spool.close()
        self.evaluation_spawner.close(timeout_s)
        run_dir, uri = self.flusher.run_dir, self.flusher.tracking_uri
        if not is_flushed(run_dir, uri, TRAINER_WRITERS):
            _log.info("up to %g s for the last curves to reach MLflow", timeout_s)
        self.flusher.close(timeout_s)
        if (
            uri != NO_TRACKING
            and (line := why_not_all_sent(run_dir, uri, TRAINER_WRITERS)) is not None
        ):
            _log.warning("%s", line)

    def _note_augmentation_sheet(self, cfg: RunConfig, manifest: Manifest) -> None:
        path = RunFolder(cfg.dir).augmentations_path
        if path.exists():
            return
        try:
            sheet_path = write_augmentation_sheet(cfg, path, who=_RANK_NAME, manifest=manifest)
            self.spool.artifact(sheet_path)
        except Exception as error:  # a picture for people is no reason to lose a run
            _log.warning("no augmentation sheet: %s", error)
