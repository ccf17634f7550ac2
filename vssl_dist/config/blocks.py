"""The blocks of a run.  Derived numbers are properties, never written back."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from vssl_dist.config.fields import FilePath, Finite, Many, Model, Positive, Side, as_tuple
from vssl_dist.config.recipes import Normalisation, Views

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
    image_size: Side = 224
    """Side of a view in pixels, of those that have no size of their own."""
    views: Views
    """One entry per view: the name of a recipe, or a block that may start from one (``recipe``),
    change its keys and stand for several views (``count``)."""
    normalise: Normalisation = Normalisation()
    """What the network sees of a colour: less the mean, over the standard deviation."""
    streams: Many = 64
    """Independent sample streams; must be a multiple of the number of ranks, now and later."""
    window: Many = 4096
    """Samples of a stream that are shuffled together, after the shards have been."""
    threads: Positive = 4
    """Decoding threads of each of the two batches that a rank has in the making."""
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
    """Which optimizer."""
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
    """Added to the gradient by SGD and LARS, decoupled from it by AdamW."""
    weight_decay_end: Annotated[Finite, Field(ge=0)] | None = None
    """Weight decay at the last step, half a cosine away from ``weight_decay``; null: it stays."""
    decay_norm_and_bias: bool = False
    """Whether weight decay also reaches biases and normalisation weights."""
    epochs: Annotated[Finite, Field(gt=0)] = 100.0
    """Passes over the training images, not necessarily whole ones."""
    max_steps: Positive | None = None
    """Stop (and end every schedule) after so many optimizer steps, whatever ``epochs`` says."""
    warmup_epochs: Annotated[Finite, Field(ge=0)] = 0.0
    """The first so many, in which the learning rate rises from 0; it falls on half a cosine."""
    global_batch: Many = 256
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
    """DeepSpeed's ZeRO: 1 shards the optimizer's state over the ranks, 2 also the gradients, 0
    nothing; 3 is refused."""
    autocast: Literal["bfloat16", "none"] = "bfloat16"
    """In which precision layers compute; weights stay float32, and losses are computed in it."""
    ema_decay: Annotated[tuple[Decay, Decay], BeforeValidator(as_tuple)] = (0.99, 1.0)
    """The teacher's decay at the first and at the last step; half a cosine in between."""
    compile: bool = False
    """Whether torch.compile translates the network."""
    channels_last: bool = False
    """Whether images lie in memory pixel by pixel: faster for convolutions."""
    deterministic: bool = True
    """On a GPU: only convolutions that give the same bits each time, without which a resumed run
    is not the uninterrupted one; a ViT's attention may still differ.  Off, cuDNN picks the
    fastest."""


class CheckpointConfig(Model):
    """When to save and what to keep."""

    every_minutes: Annotated[Finite, Field(gt=0)] | None = 15.0
    """Minutes between two checkpoints; null: none by the clock."""
    every_steps: Positive | None = None
    """Optimizer steps between two; null: none by steps.  The last step and a stop always save."""
    keep_last: Positive = 2
    """How many to keep, the newest ones."""
    keep_every: Positive | None = None
    """Also keep each checkpoint whose step is a multiple of this."""
