"""Rank 0's eyes: curves to the spool, progress to the log, exports to evaluations."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from vssl_dist import curves, dist
from vssl_dist.config import RunConfig, dump
from vssl_dist.data.store.opening import open_watched
from vssl_dist.jobs.evaluation_queue import EvaluationSpawner
from vssl_dist.jobs.progress import Reporter
from vssl_dist.jobs.resources import Launch
from vssl_dist.preview.sheet import augmentation_sheet
from vssl_dist.run_folder import RunFolder
from vssl_dist.tracker import (
    EXPERIMENT,
    NOWHERE,
    TRAINER,
    Flusher,
    Spool,
    Status,
    flushed,
    run_tags,
    shortfall,
)

_log = logging.getLogger(__name__)
_SYSTEM_EVERY_S = 10.0
_RANK = "rank 0"


class NullReporter:
    """What every rank but 0 holds, so that nobody asks who it is."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Rank 0 has the same numbers."""

    def on_export(self, path: Path, step: int) -> None:
        """Rank 0 exports."""

    def close(self, status: Status, timeout_s: float) -> None:
        """Nothing is open."""


def observe(cfg: RunConfig, launch: Launch) -> RunReporter | NullReporter:
    """What this rank holds; every rank of the process group calls this."""
    hosts = sorted(set(dist.gather(socket.gethostname())))
    return RunReporter(cfg, launch, hosts) if dist.rank() == 0 else NullReporter()


class RunReporter:
    """Tracks, reports and evaluates one run while it trains.

    None of it may end or delay a training: the spool does not raise, the flusher and the
    evaluations are processes of their own.  A dataset that cannot be opened ends it here as it
    would in the next moment.
    """

    def __init__(self, cfg: RunConfig, launch: Launch, hosts: Sequence[str]) -> None:
        train = open_watched(cfg.data.train, timeout_s=cfg.data.timeout_s, who=_RANK)
        self.reporter = Reporter(cfg.total_steps(train.samples))
        self.evaluator = EvaluationSpawner(cfg.dir, launch.cluster)
        self.spool = Spool(cfg.dir, "train")
        self.flusher = Flusher(
            cfg.dir, EXPERIMENT, launch.tracking_uri, system_every_s=_SYSTEM_EVERY_S
        )
        self.spool.status("RUNNING")
        self.spool.tags(run_tags(world_size=launch.world_size, hosts=hosts))
        self.spool.params(yaml.safe_load(dump(cfg)))
        self.spool.artifact(RunFolder(cfg.dir).config)
        self.flusher.start()
        self._sheet(cfg)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Note the metrics of a step as the training's curves."""
        self.spool.metrics(curves.training_curves(metrics), step)
        _log.info("%s", self.reporter.report(metrics, step))
        if alarm := self.reporter.alarm(metrics, step):
            _log.warning("%s", alarm)
            self.spool.tags({"vssl_dist.collapsed": f"step {step}"})

    def on_export(self, path: Path, step: int) -> None:
        """Have the export evaluated, elsewhere and later."""
        _log.info("exported %s", path)
        self.evaluator.start()

    def close(self, status: Status, timeout_s: float) -> None:
        """Say how it ended and send what is left, within a bound."""
        if status == "KILLED":
            _log.info("told to stop: the same command goes on from the last checkpoint")
        self.spool.status(status)
        self.spool.close()
        self.evaluator.close(timeout_s)
        run_dir, uri = self.flusher.run_dir, self.flusher.tracking_uri
        if not flushed(run_dir, uri, TRAINER):
            _log.info("up to %g s for the last curves to reach MLflow", timeout_s)
        self.flusher.close(timeout_s)
        if uri != NOWHERE and (line := shortfall(run_dir, uri, TRAINER)) is not None:
            _log.warning("%s", line)

    def _sheet(self, cfg: RunConfig) -> None:
        path = RunFolder(cfg.dir).augmentations
        if path.exists():
            return
        try:
            self.spool.artifact(augmentation_sheet(cfg, path, who=_RANK))
        except Exception as error:  # a picture for people is no reason to lose a run
            _log.warning("no augmentation sheet: %s", error)
