"""A run: its blocks and the rules between them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vssl_dist.config.blocks import CheckpointConfig, DataConfig, EngineConfig, OptimConfig
from vssl_dist.config.evaluations import (
    Evaluation,
    OnlineConfig,
    OodConfig,
)
from vssl_dist.config.fields import FilePath, MethodConfig, Model, Positive, as_tuple
from vssl_dist.config.task import TaskConfig

RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


class RunConfig(Model):
    """The whole configuration of a run, resolved."""

    name: RunName
    """Name of the run and of its folder; a config without one is named after its file."""
    out: FilePath = Path("runs")
    """Folder of all runs; this run's folder is ``out/name``."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights, the order of the images, their augmentation and all noise."""
    trace: bool = False
    """Write every loss, image id and pixel digest to ``trace.rank<r>.jsonl``, to compare runs."""
    method: SerializeAsAny[MethodConfig]
    """Method: its name and its own keys."""
    data: DataConfig
    """Images that are trained on, their order and their augmentation."""
    optim: OptimConfig
    """The optimizer, its schedules and the length of the training."""
    engine: EngineConfig = EngineConfig()
    """Execution of the mathematics: sharding, precision, determinism."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved and which are kept."""
    evaluations: Annotated[tuple[Evaluation, ...], BeforeValidator(as_tuple)] = ()
    """Evaluations of each export: a list of tasks, none of them twice."""
    online: OnlineConfig | None = None
    """A linear probe that is trained beside the method, for its accuracy curve; null: none."""
    licence: Annotated[str, Field(pattern=r"^[^\n]{1,200}$")] | None = None
    """Licence of the weights, stated in the card of every export; null: the card states none."""
    log_every: Positive = 50
    """Optimizer steps between two points of every curve."""
    vote_every: Positive = 20
    """Optimizer steps between two votes of all ranks on whether to stop."""
    silence: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Names of warnings that are not printed before a run (docs/linter.md lists them)."""

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self.out / self.name

    def absolute(self) -> RunConfig:
        """Copy the run with absolute paths: a job may start in another folder."""
        folders = {key: getattr(self.data, key) for key in ("train", "val", "bank")}
        data = {key: path.absolute() for key, path in folders.items() if path}
        tasks = tuple(task.absolute() for task in self.evaluations)
        changed = {"out": self.out.absolute(), "data": self.data.model_copy(update=data)}
        return self.model_copy(update=changed | {"evaluations": tasks})

    def micro_batch(self, world_size: int) -> int:
        """Images per rank per forward pass.

        Raises:
            ValueError: The batch or the streams do not divide over ``world_size`` ranks.
        """
        optim, streams = self.optim, self.data.streams
        if streams % world_size:
            raise ValueError(
                f"data.streams={streams} is not a multiple of the {world_size} ranks: every rank "
                "owns the same number of streams (choose another number of ranks, or of streams)"
            )
        return optim.global_batch // (world_size * optim.accumulate)

    def total_steps(self, samples: int) -> int:
        """Optimizer steps of the run on a dataset of ``samples`` images."""
        steps = -int(-self.optim.epochs * samples // self.optim.global_batch)
        return min(steps, self.optim.max_steps or steps)

    @property
    def tasks(self) -> tuple[TaskConfig, ...]:
        """The evaluations without the settings that mean nothing for this method."""
        density = self.method.has_embedding_density
        return tuple(task.asked_of(embedding_density=density) for task in self.evaluations)

    def evaluations_at(self, step: int, samples: int) -> tuple[TaskConfig, ...]:
        """The evaluations due after optimizer step ``step``; all of them after the last one."""
        images = step * self.optim.global_batch
        last = step == self.total_steps(samples)

        def due(task: TaskConfig) -> bool:
            period = task.every_epochs * samples
            return images // period > (images - self.optim.global_batch) // period

        return tuple(task for task in self.tasks if last or due(task))

    @model_validator(mode="after")
    def _rules_between_fields(self) -> RunConfig:
        optim, data = self.optim, self.data
        if optim.global_batch % (data.streams * optim.accumulate):
            raise ValueError(
                f"optim.global_batch={optim.global_batch} must be a multiple of data.streams "
                f"* optim.accumulate = {data.streams * optim.accumulate}: every micro-step takes "
                "the same number of images from every stream"
            )
        if len(data.views) != self.method.views_wanted:
            raise ValueError(
                f"data.views has {len(data.views)} entries, but {self.method.name} compares "
                f"{self.method.views_wanted} views of each image"
            )
        if wrong := self.method.wrong_sizes(data.sides):
            raise ValueError(f"data.views: {wrong}")
        if self.engine.zero_stage == 3:
            raise ValueError(
                "engine.zero_stage=3 is not built yet: use 0, 1 or 2 (the teacher is not sharded)"
            )
        if optim.warmup_epochs > optim.epochs:
            raise ValueError(
                f"optim.warmup_epochs={optim.warmup_epochs:g} is longer than optim.epochs="
                f"{optim.epochs:g}: the learning rate would never reach its peak"
            )
        return self

    @model_validator(mode="after")
    def _evaluations_can_be_done(self) -> RunConfig:
        tasks = [task.task for task in self.evaluations]
        if len(set(tasks)) < len(tasks):
            raise ValueError(
                f"evaluations name a task twice ({', '.join(tasks)}): their results would "
                "overwrite each other (one entry takes several values of k and temperature)"
            )
        if any(isinstance(task, OodConfig) and not task.ood for task in self.evaluations):
            raise ValueError("evaluations: task ood names no dataset (ood: {svhn: FOLDER})")
        for number, task in enumerate(self.evaluations):
            if task.needs_posterior and not self.method.has_posterior:
                raise ValueError(
                    f"evaluations.{number}: task {task.task} needs a posterior, which method "
                    f"{self.method.name} does not infer: leave it out, or train one that does "
                    "(such as vje)"
                )
        if self.evaluations and self.data.val is None:
            raise ValueError("evaluations need data.val: the folder of held-out shards")
        return self


def frozen_part(cfg: RunConfig) -> dict[str, Any]:
    """Keys and values that a resumed run may not change: all that the result depends on."""
    free = {"name", "out", "trace", "silence", "licence", "evaluations", "checkpoint"}
    free |= {"log_every", "vote_every"}
    frozen: dict[str, Any] = cfg.model_dump(mode="json", exclude=free)
    # Where the data lies is free: its digest is not.
    for key in ("train", "val", "bank", "threads", "max_bad", "timeout_s"):
        del frozen["data"][key]
    # A name for values that are all compared themselves.
    frozen["method"].pop("preset", None)
    return frozen
