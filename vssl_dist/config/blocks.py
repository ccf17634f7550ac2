"""The blocks of a run.  Derived numbers are properties, never written back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vssl_dist.config.fields import (
    FilePath,
    Finite,
    JpegEngine,
    Many,
    Model,
    Positive,
    Side,
    as_tuple,
)
from vssl_dist.config.recipes import Normalisation, Views

Decay = Annotated[Finite, Field(ge=0, le=1)]
Beta = Annotated[Finite, Field(ge=0, lt=1)]


class DataConfig(Model):
    """The images of a run, their order and their augmentation."""

    train: FilePath
    """Folder of training shards: the one that holds ``manifest.json``."""
    val: FilePath | None = None
    """Folder of held-out shards: the queries of every evaluation."""
    bank: FilePath | None = None
    """Folder of labelled training shards, where those of ``train`` have no labels: what k-NN and
    probes learn from; null: ``train``."""
    backend: Literal["dali", "reference"] = "dali"
    """Decoder of images: DALI, or, where DALI has no wheel, Pillow on the CPU (``reference``)."""
    image_size: Side = 224
    """Side in pixels of each view that has no ``size`` of its own."""
    views: Views
    """One entry per view: the name of a recipe, or a block that may start from one (``recipe``),
    change its keys and stand for several views (``count``)."""
    normalise: Normalisation = Normalisation()
    """Mean and standard deviation by which colours are normalised."""
    streams: Many = 64
    """Independent sequences of images that ranks share; a multiple of the number of ranks, now and
    after any resume."""
    window: Many = 4096
    """Images of a stream that are shuffled together, after its shards have been shuffled."""
    threads: Positive = 4
    """Decoding threads for each of the two batches that a rank prepares at a time."""
    jpeg_engine: JpegEngine = "none"
    """Whether a GPU's JPEG engine decodes ``all`` images that it can, or ``none``: the engine
    spares the other units of the GPU and cores of the CPU, and rounds differently."""
    max_bad: Annotated[Finite, Field(ge=0, le=1)] = 1e-4
    """Share of the images that may be damaged before the run stops; ten always may, unless this is
    0."""
    timeout_s: Annotated[Finite, Field(gt=0)] = 120.0
    """Seconds that one read may take before the storage counts as dead and the run stops."""

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each view in pixels."""
        return tuple(view.size or self.image_size for view in self.views)


class OptimConfig(Model):
    """The optimizer and how long it runs."""

    name: Literal["sgd", "adamw", "lars"] = "sgd"
    """The optimizer's name."""
    base_lr: Annotated[Finite, Field(gt=0)]
    """Peak learning rate per 256 images: the run uses ``base_lr * global_batch / 256``."""
    momentum: Annotated[Finite, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD and LARS."""
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(as_tuple)] = (0.9, 0.999)
    """Decay rates of AdamW's two moving averages."""
    trust: Annotated[Finite, Field(gt=0)] = 0.001
    """LARS: a weight moves by this share of its norm, times the learning rate."""
    trust_clip: bool = False
    """LARS: a weight never moves by more than its gradient times the learning rate."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 0.0
    """Weight decay, added to the gradient by SGD and LARS, decoupled from it by AdamW."""
    weight_decay_end: Annotated[Finite, Field(ge=0)] | None = None
    """Weight decay at the last step, reached on half a cosine; null: it stays ``weight_decay``."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also reaches biases and normalisation weights."""
    epochs: Annotated[Finite, Field(gt=0)] = 100.0
    """Passes over the training images; need not be a whole number."""
    max_steps: Positive | None = None
    """Optimizer steps after which the run and all of its schedules end, whatever ``epochs``
    says."""
    warmup_epochs: Annotated[Finite, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises from 0; after them it falls on half a cosine."""
    global_batch: Many = 256
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulate: Positive = 1
    """Micro-steps per optimizer step; batch norm sees ``global_batch / accumulate`` images."""
    clip: Annotated[Finite, Field(ge=0)] = 0.0
    """Largest norm of the gradient, which is scaled down to it; 0: no limit."""

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up."""
        return self.base_lr * self.global_batch / 256


class EngineConfig(Model):
    """Execution of the mathematics; the result may differ only by rounding."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """DeepSpeed's ZeRO stage: 0 shards nothing, 1 the optimizer's state, 2 also the gradients; 3 is
    refused."""
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    """Precision that layers compute in; weights stay float32, and losses are computed in it."""
    ema_decay: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.99, 1.0)
    """The teacher's decay at the first and at the last step, with half a cosine in between."""
    compile: bool = False
    """Compile the network with torch.compile."""
    channels_last: bool = False
    """Store images with their channels last in memory, which is faster for convolutions."""
    deterministic: bool = True
    """On a GPU: use only kernels that give the same bits each time, so that a resumed run equals an
    uninterrupted one, and stop where torch has none.  Off: cuDNN picks the fastest."""


class CheckpointConfig(Model):
    """When checkpoints are saved and which are kept."""

    every_minutes: Annotated[Finite, Field(gt=0)] | None = 15.0
    """Minutes between two checkpoints; null: the clock saves none."""
    every_steps: Positive | None = None
    """Optimizer steps between two checkpoints; null: none but those by the clock, at the last step
    and at a stop."""
    keep_last: Positive = 2
    """Number of newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Also keep each checkpoint whose step is a multiple of this; null: none."""
