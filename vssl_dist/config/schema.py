"""The whole schema of a run.  Derived numbers are properties, never written back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from vssl_dist.config.fields import (
    FilePath,
    Finite,
    MethodConfig,
    Model,
    Positive,
    as_tuple,
)
from vssl_dist.config.recipes import Normalisation, Views
from vssl_dist.config.tasks import Evaluation, OnlineConfig, OodConfig, TaskConfig

Decay = Annotated[Finite, Field(ge=0, le=1)]
Beta = Annotated[Finite, Field(ge=0, lt=1)]


class DataConfig(Model):
    """Which images, in which order, seen how."""

    train: FilePath
    """Folder of training shards: the one that holds ``manifest.json``."""
    val: FilePath | None = None
    """Folder of held-out shards: the queries of k-NN, whose bank is ``bank``."""
    bank: FilePath | None = None
    """Folder of labelled training shards, where those of ``train`` have no labels: what k-NN and
    probes learn from; null: ``train``."""
    backend: Literal["dali", "reference"] = "dali"
    """``reference`` decodes with PIL on the CPU: the oracle, and where DALI has no wheel."""
    image_size: Positive = 224
    views: Views
    normalise: Normalisation = Normalisation()
    streams: Positive = 64
    """Independent sample streams; must be a multiple of the number of ranks, now and later."""
    window: Positive = 4096
    """Samples of a stream that are shuffled together, after the shards have been."""
    threads: Positive = 4
    """Decoding threads per rank."""
    max_bad: Annotated[Finite, Field(ge=0, le=1)] = 1e-4
    """Share of the images that may turn out to be damaged before the run stops; ten always may,
    unless it is 0."""
    timeout_s: Annotated[Finite, Field(gt=0)] = 120.0
    """Seconds without an answer to one read after which storage counts as dead."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each view in pixels."""
        return tuple(view.size or self.image_size for view in self.views)


class OptimConfig(Model):
    """The optimizer and how long it runs."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    base_lr: Annotated[Finite, Field(gt=0)]
    """Peak learning rate per 256 images: the run uses ``base_lr * global_batch / 256``."""
    momentum: Annotated[Finite, Field(ge=0, lt=1)] = 0.9
    """Of SGD and LARS."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)] = (0.9, 0.999)
    """Of AdamW."""
    trust: Annotated[Finite, Field(gt=0)] = 0.001
    """Of LARS: a weight moves by this share of its norm, times the learning rate."""
    trust_clip: bool = False
    """Of LARS: never by more than its gradient times the learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    weight_decay_end: Annotated[Finite, Field(ge=0)] | None = None
    """Weight decay at the last step, half a cosine away from ``weight_decay``; null: it stays."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also reaches biases and normalisation weights."""
    epochs: Annotated[Finite, Field(gt=0)] = 100.0
    max_steps: Positive | None = None
    """Stop (and end every schedule) after so many optimizer steps, whatever ``epochs`` says."""
    warmup_epochs: Annotated[Finite, Field(ge=0)] = 0.0
    global_batch: Positive = 256
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulate: Positive = 1
    """Micro-steps per optimizer step; batch norm sees ``global_batch / accumulate`` images."""
    clip: Annotated[Finite, Field(ge=0)] = 0.0
    """Largest norm of the gradient; 0 is off."""

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.global_batch / 256


class EngineConfig(Model):
    """How the mathematics is carried out; the result may differ only by rounding."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    ema_decay: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.99, 1.0)
    """The teacher's decay at the first and at the last step; half a cosine in between."""
    compile: bool = False
    channels_last: bool = False
    deterministic: bool = True
    """On a GPU: only convolutions that give the same bits each time, without which a resumed run
    is not the uninterrupted one.  Off, cuDNN picks the fastest."""


class CheckpointConfig(Model):
    """When to save and what to keep."""

    every_minutes: Annotated[Finite, Field(gt=0)] | None = 15.0
    every_steps: Positive | None = None
    keep_last: Positive = 2
    keep_every: Positive | None = None
    """Also keep each checkpoint whose step is a multiple of this."""


class RunConfig(Model):
    """A run: the resolved YAML, whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    out: FilePath = Path("runs")
    """Folder of runs; this run lives in ``out/name``."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    trace: bool = False
    """Write ``trace.rank<r>.jsonl``: every loss, id and pixel digest, for comparing runs."""
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluations: Annotated[tuple[Evaluation, ...], BeforeValidator(as_tuple)] = ()
    online: OnlineConfig | None = None
    """A linear probe that learns during the training, for its curve; null: none."""
    log_every: Positive = 50
    vote_every: Positive = 20
    """Steps between asking all ranks whether anyone was told to stop."""
    silence: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ()
    """Names of warnings that are not to be printed before a run: see ``vssl_dist.linter``."""

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self.out / self.name

    def absolute(self) -> RunConfig:
        """The same run whatever folder a job starts in."""
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

    def evaluations_at(self, step: int, samples: int) -> tuple[TaskConfig, ...]:
        """The evaluations due after optimizer step ``step``; all of them after the last one."""
        images = step * self.optim.global_batch
        last = step == self.total_steps(samples)

        def due(task: TaskConfig) -> bool:
            period = task.every_epochs * samples
            return images // period > (images - self.optim.global_batch) // period

        return tuple(task for task in self.evaluations if last or due(task))

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
    """What a resumed run may not change: everything that the result depends on."""
    free = {"name", "out", "trace", "silence", "evaluations", "checkpoint"}
    free |= {"log_every", "vote_every"}
    part: dict[str, Any] = cfg.model_dump(mode="json", exclude=free)
    # Where the data lies is free: its digest is not.
    for key in ("train", "val", "bank", "threads", "max_bad", "timeout_s"):
        del part["data"][key]
    # A name for values that all are in the part.
    part["method"].pop("preset", None)
    return part
