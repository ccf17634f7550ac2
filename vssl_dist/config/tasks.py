"""What is done with every export: one block per task, told apart by its key ``task``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter

from vssl_dist.config.fields import (
    Counts,
    FilePath,
    Finite,
    Model,
    Positive,
    Temperatures,
    as_tuple,
)

Period = Annotated[Finite, Field(gt=0)]
Rates = Annotated[
    tuple[Annotated[Finite, Field(gt=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
]
"""Numbers above 0, written as a YAML list."""
Shares = Annotated[
    tuple[Annotated[Finite, Field(gt=0, lt=1)], ...],
    BeforeValidator(as_tuple),
]
"""Numbers between 0 and 1, written as a YAML list."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]


class TaskConfig(Model):
    """What every task has; its queries are the images of ``data.val``."""

    task: str
    every_epochs: Period = 1.0
    """An export, and with it an evaluation, every so many epochs and at the end."""
    max_queries: Positive | None = None
    """Use only the first so many held-out images."""
    batch: Positive = 256
    """Images that go through the network at a time."""

    @property
    def limits(self) -> dict[str, int | None]:
        """How many images of each split it wants, by the split's part; None: all."""
        return {"queries": self.max_queries}

    def absolute(self) -> Self:
        """The same task whatever folder a job starts in."""
        return self


class BankConfig(TaskConfig):
    """What every task has that also sees the images of ``data.train``, its bank."""

    max_bank: Positive | None = None
    """Use only the first so many training images."""

    @property
    def limits(self) -> dict[str, int | None]:
        """How many images of each split it wants, by the split's part; None: all."""
        return {"bank": self.max_bank, "queries": self.max_queries}


class KnnConfig(BankConfig):
    """k-NN accuracy of an export: cosine similarity, votes weighted by exp(similarity / T)."""

    task: Literal["knn"] = "knn"
    k: Counts = (10, 20, 100, 200)
    temperature: Temperatures = (0.07, 0.1)


class LinearConfig(BankConfig):
    """A linear classifier on frozen features: SGD over a grid, logistic regression, low-shot."""

    task: Literal["linear"] = "linear"
    every_epochs: Period = 100.0
    """An export, and with it an evaluation, every so many epochs and at the end."""
    epochs: Positive = 100
    """Of SGD, its learning rate on half a cosine."""
    lr: Rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Peak learning rates per 256 images; the best one on held-out training images is used."""
    sgd_batch: Positive = 256
    """Training images per step of SGD."""
    l2: Rates = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    """Weights of half the squared norm beside the mean loss, for logistic regression; chosen
    likewise."""
    held_out: Annotated[Finite, Field(gt=0, le=0.5)] = 0.1
    """Share of the training images, of each class, on which both are chosen."""
    shares: Shares = (0.01, 0.1)
    """Low-shot: shares of the training images, of each class, for logistic regression."""
    seeds: Annotated[int, Field(gt=0, le=100)] = 3
    """How often SGD is repeated, and a low-shot subset drawn."""


class OodConfig(BankConfig):
    """How well scores of frozen features tell the held-out images from those of other datasets."""

    task: Literal["ood"] = "ood"
    every_epochs: Period = 100.0
    """An export, and with it an evaluation, every so many epochs and at the end."""
    ood: dict[Name, FilePath] = Field(default_factory=dict)
    """Folders of shards, by name: what is not to be taken for held-out images."""
    k: Positive = 50
    """The k-NN score is the distance to this neighbour among the training images."""
    l2: Annotated[Finite, Field(gt=0)] = 1e-4
    """Of the logistic regression whose largest probability is a score."""
    bootstrap: Annotated[int, Field(ge=0, le=10_000)] = 200
    """Resamplings behind the 95 % intervals; 0: none."""

    def absolute(self) -> OodConfig:
        """The same task whatever folder a job starts in."""
        return self.model_copy(update={"ood": {k: Path(v).absolute() for k, v in self.ood.items()}})


class CollapseConfig(TaskConfig):
    """Whether features fill their space: RankMe, spread and uniformity of held-out images."""

    task: Literal["collapse"] = "collapse"
    max_queries: Positive | None = 25_600
    """Use only the first so many held-out images; RankMe's authors use 25,600."""


Evaluation = Annotated[
    KnnConfig | LinearConfig | OodConfig | CollapseConfig, Field(discriminator="task")
]
TASKS: dict[str, type[TaskConfig]] = {
    "knn": KnnConfig,
    "linear": LinearConfig,
    "ood": OodConfig,
    "collapse": CollapseConfig,
}


def read_task(raw: str | dict[str, Any]) -> TaskConfig:
    """A task from what `pydantic` dumped of it, as JSON text or as plain values.

    >>> read_task(KnnConfig(k=(20,)).model_dump_json()).k
    (20,)
    """
    adapter: TypeAdapter[TaskConfig] = TypeAdapter(Evaluation)
    if isinstance(raw, str):
        return adapter.validate_json(raw)
    return adapter.validate_python(raw)
