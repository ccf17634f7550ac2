"""Evaluations of every export: one block per task, told apart by its key ``task``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator

from vssl_dist.config.fields import (
    Counts,
    FilePath,
    Finite,
    Model,
    Positive,
    Range,
    Temperatures,
)
from vssl_dist.config.recipes import ViewRecipe
from vssl_dist.config.task import BankConfig, Name, OneOrMore, Period, Rates, Shares, TaskConfig


class OnlineConfig(Model):
    """A linear classifier that learns beside the method, from its features as they are."""

    lr: Annotated[Finite, Field(gt=0)] = 0.1
    """Peak learning rate of the probe per 256 images; it falls to 0 on half a cosine."""


class KnnConfig(BankConfig):
    """k-NN accuracy of an export: cosine similarity, votes weighted by exp(similarity / T)."""

    task: Literal["knn"] = "knn"
    k: Counts = (10, 20, 100, 200)
    """Numbers of neighbours that vote; each is tried."""
    temperature: Temperatures = (0.07, 0.1)
    """Temperatures of the neighbours' votes; each is tried with each k; ``inf``: all votes count
    alike."""


class LinearConfig(BankConfig):
    """A linear classifier on frozen features: descent on a grid, logistic regression, low-shot."""

    task: Literal["linear"] = "linear"
    every_epochs: Period = 100.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum 0.9, or LARS with a trust of 0.001, which wants higher rates and larger
    batches (SimSiam's protocol: ``lr: [0.1]``, ``sgd_batch: 4096``, ``epochs: 90``)."""
    epochs: Positive = 100
    """Passes over the training images, with the learning rate on half a cosine."""
    lr: Rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates per 256 images that are tried; the best one on held-out training images
    is used."""
    sgd_batch: Positive = 256
    """Training images per optimizer step."""
    l2: Rates = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Penalties tried for logistic regression: weights of half the squared norm beside the mean
    loss; the best one on held-out training images is used."""
    held_out: Annotated[Finite, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images, of each class, on which ``lr`` and ``l2`` are chosen."""
    shares: Shares = (0.01, 0.1)
    """Low-shot: shares of the training images, of each class, for logistic regression."""
    seeds: Annotated[int, Field(gt=0, le=100)] = 3
    """Number of times that the optimizer's descent is repeated, and a low-shot subset drawn."""


class OodConfig(BankConfig):
    """Tell held-out images from those of other datasets by scores of frozen features."""

    task: Literal["ood"] = "ood"
    every_epochs: Period = 100.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    ood: dict[Name, FilePath] = Field(default_factory=dict)
    """Folders of shards by the name of the dataset, whose images are to be told from held-out
    ones."""
    k: Positive = 50
    """Rank of the neighbour among the training images whose distance is the k-NN score."""
    l2: Annotated[Finite, Field(gt=0)] = 1e-4
    """Penalty of the logistic regression whose largest probability is a score."""
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = 200
    """Resamplings behind the 95 % intervals; 0: none."""
    density: Literal["polar", "cartesian"] = "polar"
    """VJE: whether likelihoods are densities of the embedding's direction and norm (``polar``, as
    in training) or, as a control, of the embedding itself (``cartesian``), which ranks images by
    their norm."""
    draws: Positive = 8
    """VJE and VSSL: samples of a posterior that an expected likelihood is averaged over."""
    posteriors: Positive = 256
    """VJE and VSSL: number of training images whose posteriors explain an image."""
    pairs: Annotated[int, Field(ge=0, le=64)] = 4
    """VJE and VSSL: pairs of augmented views that explain each other, each of which costs two more
    passes over the images; 0: none, and none of VSSL's scores that need them."""

    @property
    def stem(self) -> str:
        """Beginning of the names of the task's results: other results, other names."""
        return self.task if self.density == "polar" else f"{self.task}-{self.density}"

    def absolute(self) -> OodConfig:
        """Copy the task with absolute paths: a job may start in another folder."""
        return self.model_copy(update={"ood": {k: Path(v).absolute() for k, v in self.ood.items()}})

    def asked_of(self, *, embedding_density: bool) -> OodConfig:
        """Copy the task without the settings that mean nothing for a method.

        Args:
            embedding_density: Whether the method has likelihoods of an embedding.
        """
        return self if embedding_density else self.model_copy(update={"density": "polar"})


class CollapseConfig(TaskConfig):
    """Whether features of held-out images fill their space, and views of one stay together."""

    task: Literal["collapse"] = "collapse"
    max_queries: Positive | None = 25_600
    """Use only this many of the held-out images, the first ones; RankMe's authors use 25,600; null:
    all."""
    pairs: Annotated[int, Field(ge=0)] = 2048
    """Held-out images of which two augmented views are compared for the alignment; 0: none."""


class UncertaintyConfig(BankConfig):
    """Whether a posterior's variance says where a prediction fails and an image is spoilt."""

    needs_posterior: ClassVar[bool] = True

    task: Literal["uncertainty"] = "uncertainty"
    every_epochs: Period = 100.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    k: Positive = 20
    """Nearest training images that vote on the prediction whose risk is measured."""
    temperature: Annotated[Finite, Field(gt=0)] = 0.07
    """Temperature of the neighbours' votes."""
    max_corrupted: Positive = 500
    """Held-out images that are corrupted, each in 20 ways."""
    shown: Annotated[int, Field(gt=0, le=24)] = 10
    """Images on the sheet: this many of the most certain and of the least certain ones."""


class FinetuneConfig(BankConfig):
    """A classifier of the unfrozen backbone: all weights are trained on cropped, flipped images."""

    task: Literal["finetune"] = "finetune"
    every_epochs: Period = 100.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    epochs: Positive = 30
    """Passes over the training images at the chosen learning rate."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    lr: OneOrMore = (0.01, 0.03, 0.1)
    """Peak learning rates per 256 images that are tried for all weights, each falling to 0 on half
    a cosine; the best one on held-out training images is used.  AdamW needs lower ones than SGD."""
    search_epochs: Positive = 5
    """Passes over the training images that are not held out, for each learning rate that is
    tried."""
    held_out: Annotated[Finite, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images, of each class, on which the learning rate is chosen."""
    weight_decay: Annotated[Finite, Field(ge=0)] = 1e-4
    """Weight decay of all weights but biases and those of normalisation layers."""
    train_batch: Positive = 256
    """Training images per optimizer step."""
    crop_scale: Range = (0.2, 1.0)
    """Share of an image's area that its random crop covers."""
    seeds: Annotated[int, Field(gt=0, le=100)] = 1
    """Number of times that the fine-tuning is repeated."""

    @property
    def recipe(self) -> ViewRecipe:
        """Augmentation of a training image."""
        return ViewRecipe(crop_scale=self.crop_scale, jitter=0.0, grayscale=0.0, blur=0.0)

    @model_validator(mode="after")
    def _crops_something(self) -> FinetuneConfig:
        if self.crop_scale[0] <= 0 or self.crop_scale[1] > 1:
            raise ValueError("crop_scale must lie above 0 and up to 1")
        return self


Evaluation = Annotated[
    KnnConfig | LinearConfig | OodConfig | CollapseConfig | UncertaintyConfig | FinetuneConfig,
    Field(discriminator="task"),
]
TASKS: dict[str, type[TaskConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "ood": OodConfig,
    "collapse": CollapseConfig,
    "uncertainty": UncertaintyConfig,
    "finetune": FinetuneConfig,
}


def read_task(raw: str | dict[str, Any]) -> TaskConfig:
    """Read a task that `pydantic` has dumped, as JSON text or as plain values.

    >>> read_task(KnnConfig(k=(20,)).model_dump_json()).k
    (20,)
    """
    adapter: TypeAdapter[TaskConfig] = TypeAdapter(Evaluation)
    if isinstance(raw, str):
        return adapter.validate_json(raw)
    return adapter.validate_python(raw)
