"""The training loop.  Read this file first.

It knows neither MLflow nor SLURM: whoever starts it hands in three callables.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch

from vssl_dist import dist
from vssl_dist.config import RunConfig
from vssl_dist.curves import EPOCH
from vssl_dist.data.loader import Batch, Loader, build_loader
from vssl_dist.engine import Engine
from vssl_dist.errors import CheckpointError
from vssl_dist.exports.card import ExportDescription, WeightsOrigin
from vssl_dist.methods import LossOutput, build_method, monitors
from vssl_dist.models.determinism import select_kernels
from vssl_dist.online_probe import (
    NoOnlineProbe,
    OnlineProbe,
    build_online_probe,
)
from vssl_dist.resume import CheckpointSaver
from vssl_dist.run_folder import RunFolder
from vssl_dist.trace import TraceWriter

_log = logging.getLogger(__name__)


class Preempted(Exception):
    """Raised on every rank, after the same step, once the checkpoint is on disk."""


def train(
    cfg: RunConfig,
    *,
    device: str,
    should_stop: Callable[[], bool],
    on_export: Callable[[Path, int], None],
    log: Callable[[Mapping[str, float], int], None],
) -> None:
    """Train until the last step, from the newest checkpoint if there is one.

    Args:
        cfg: The run, the same on every rank; all is written to ``cfg.dir``.
        device: ``"cpu"`` or ``"cuda"``.
        should_stop: Asked every ``vote_every`` steps; one rank's yes stops all.
        on_export: Called on rank 0 with each exported backbone and its step.
        log: Called on every rank with metrics averaged over the ranks, and their step; what their
            curves are called is for `vssl_dist.curves` to say.

    Raises:
        Preempted: Some rank was asked to stop; all is saved, the same call continues.
        Refusal: The run on disk is another experiment, or none of its checkpoints is whole.
    """
    loader, engine, probe = build(cfg, device)
    saver = CheckpointSaver(cfg, engine, loader, probe)
    saver.restore()
    trace = TraceWriter(cfg.dir, engine.step) if cfg.trace else None
    meter = ThroughputMeter(cfg.optim.global_batch, engine.step)
    curves = CurveSchedule(cfg.log_every, engine.total_steps)
    batches = iter(loader)
    while engine.step < engine.total_steps:
        step_batches = meter.next_batches(batches, cfg.optim.accumulate)
        step = engine.step + 1
        is_last_step = step == engine.total_steps
        is_milestone = is_last_step or bool(cfg.evaluations_at(step, loader.samples))
        step_output = engine.train_step(
            step_batches,
            by_part=curves.is_due(step),
            with_metrics=curves.needs_metrics(step, is_milestone),
        )
        probe.step(step_output.embedding, step_batches[-1].labels, engine.step)
        if trace:
            trace.write_step(engine.step, loader.position, step_output.loss, step_batches)
        if metrics := curves.metrics_if_due(step_output, engine.step, is_milestone):
            metrics |= probe.pop_metrics()
            epoch_metric = {EPOCH: engine.step / engine.steps_per_epoch}
            log(
                metrics | meter.rates(engine.step) | saver.record_substitutions() | epoch_metric,
                engine.step,
            )
            # It raises where too many images are damaged: the curves have to show them first.
            saver.substitution_log.check()
        if is_milestone:
            export(cfg, engine, probe, saver.weights_origin(), metrics, on_export)
        must_stop = engine.step % cfg.vote_every == 0 and dist.any_rank(should_stop())
        if is_last_step or must_stop or saver.is_due():
            saver.save()
        if must_stop and not is_last_step:
            raise Preempted
    if trace:
        trace.write_final(engine.digests())


def build(cfg: RunConfig, device: str) -> tuple[Loader, Engine, OnlineProbe | NoOnlineProbe]:
    """Build the data loader, the student-teacher engine and the online probe of a run at step 0."""
    torch.manual_seed(cfg.seed)
    select_kernels(cfg.engine.deterministic, device)
    loader = build_loader(cfg, rank=dist.rank(), world_size=dist.world_size(), device=device)
    engine = Engine(
        cfg,
        build_method(cfg.method, cfg.data.image_size, cfg.data.sides),
        total_steps=cfg.total_steps(loader.samples),
        steps_per_epoch=loader.samples / cfg.optim.global_batch,
        device=device,
    )
    return loader, engine, build_online_probe(cfg.online, loader.classes, engine.total_steps)


class CurveSchedule:
    """Decides which steps are logged, and averages their metrics over the ranks.

    Those are every ``log_every`` steps, exports, and the step at which the collapse alarm goes off.
    """

    def __init__(self, log_every: int, total_steps: int) -> None:
        self.log_every = log_every
        self.total_steps = total_steps
        self.alarm = monitors.CollapseAlarm()

    def is_due(self, step: int) -> bool:
        """Whether ``step`` is logged whatever its metrics are."""
        return step == self.total_steps or step % self.log_every == 0

    def needs_metrics(self, step: int, is_milestone: bool) -> bool:
        """Whether `metrics_if_due` will look at the metrics of ``step``."""
        return is_milestone or self.is_due(step) or step % monitors.CHECK_EVERY == 0

    def metrics_if_due(
        self, step_output: LossOutput, step: int, is_milestone: bool
    ) -> dict[str, float]:
        """Average the metrics of ``step`` over all ranks, each of which calls this.

        Args:
            step_output: What the step gave on this rank.
            step: Steps done.
            is_milestone: Whether the step is exported, and so logged.

        Returns:
            The metrics; empty where the step is not logged.
        """
        if not self.needs_metrics(step, is_milestone):
            return {}
        is_logged = is_milestone or self.is_due(step)
        is_checked = step % monitors.CHECK_EVERY == 0
        metrics = dist.mean_over_ranks({"loss": step_output.loss} | step_output.metrics)
        embedding = dist.all_gather(step_output.embedding)
        metrics |= monitors.embedding(embedding)
        if is_checked:
            rows, width = embedding.shape
            has_gone_off = self.alarm.update(
                metrics, rows, width, rows_per_rank=len(step_output.embedding)
            )
            # All ranks log a step or none does: what follows is collective.
            is_logged |= dist.any_rank(has_gone_off)
        metrics["collapse_alarm"] = float(self.alarm.on)
        return metrics if is_logged else {}


class ThroughputMeter:
    """Measures throughput, and the share of the time that is spent waiting for data."""

    def __init__(self, global_batch: int, step: int) -> None:
        self.global_batch = global_batch
        self.last_step = step
        self.start: float | None = None
        self.waited_s = 0.0

    def next_batches(self, batches: Iterator[Batch], count: int) -> list[Batch]:
        """Take the next ``count`` batches; the time until they are there counts as waiting."""
        begin = time.perf_counter()
        step_batches = list(islice(batches, count))
        if self.start is None:  # the pipeline's own start is not throughput
            self.start = time.perf_counter()
        else:
            self.waited_s += time.perf_counter() - begin
        return step_batches

    def rates(self, step: int) -> dict[str, float]:
        """Return images per second of the whole job and the data-wait share since the last call."""
        now = time.perf_counter()
        seconds = now - self.start if self.start is not None else float("inf")
        rates = {
            "images_per_second": (step - self.last_step) * self.global_batch / seconds,
            "data_wait_share": self.waited_s / seconds,
        }
        self.start = now
        self.last_step = step
        self.waited_s = 0.0
        return rates


def export(
    cfg: RunConfig,
    engine: Engine,
    probe: OnlineProbe | NoOnlineProbe,
    origin: WeightsOrigin,
    metrics: dict[str, float],
    on_export: Callable[[Path, int], None],
) -> None:
    """Export the backbone as plain weights that need none of this code, and announce the file.

    Args:
        cfg: The run.
        engine: Its evaluated branch is exported.
        probe: Its tensors are exported, too.
        origin: Training data and versions behind the weights, for the card.
        metrics: Those of this step, for the card.
        on_export: Called on rank 0 with the file and its step.
    """
    path = RunFolder(cfg.dir).export_folder.backbone_path(engine.step)
    description = ExportDescription.of(cfg, engine.step, engine.method.evaluated, origin, metrics)
    try:
        engine.export(path, description, probe.export_tensors())
    except CheckpointError as error:  # a full disk costs an evaluation, not the run
        _log.warning("step %d is not exported: %s", engine.step, error)
        return
    if dist.rank() == 0:
        on_export(path, engine.step)
