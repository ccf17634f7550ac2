"""Keys common to all evaluation tasks, and the types of values that tasks' keys take."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field

from vssl_dist.config.fields import Finite, Model, Positive, as_tuple


def _several(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else (value,)


Period = Annotated[Finite, Field(gt=0)]
Rates = Annotated[
    tuple[Annotated[Finite, Field(gt=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
]
"""Numbers above 0, written as a YAML list."""
OneOrMore = Annotated[Rates, BeforeValidator(_several)]
"""Numbers above 0, written as a YAML list, or one number by itself."""
Shares = Annotated[
    tuple[Annotated[Finite, Field(gt=0, lt=1)], ...],
    BeforeValidator(as_tuple),
]
"""Numbers between 0 and 1, written as a YAML list."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]


class TaskConfig(Model):
    """Keys common to all tasks; the queries are the images of ``data.val``."""

    needs_posterior: ClassVar[bool] = False
    """Whether the task can be done only of a method that has a posterior."""

    task: str
    every_epochs: Period = 1.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    max_queries: Positive | None = None
    """Use only this many of the held-out images, the first ones; null: all."""
    batch: Positive = 256
    """Images that pass through the network at a time."""

    @property
    def limits(self) -> dict[str, int | None]:
        """Number of images wanted of each split, by the split's role; None: all."""
        return {"queries": self.max_queries}

    @property
    def stem(self) -> str:
        """Beginning of the names of the task's results: other results, other names."""
        return self.task

    def absolute(self) -> Self:
        """Copy the task with absolute paths: a job may start in another folder."""
        return self

    def asked_of(self, *, embedding_density: bool) -> Self:
        """Copy the task without the settings that mean nothing for a method.

        Args:
            embedding_density: Whether the method has likelihoods of an embedding.
        """
        return self


class BankConfig(TaskConfig):
    """Keys common to all tasks that also see the images of ``data.train``, their bank."""

    max_bank: Positive | None = None
    """Use only this many of the training images, the first ones; null: all."""

    @property
    def limits(self) -> dict[str, int | None]:
        """Number of images wanted of each split, by the split's role; None: all."""
        return {"bank": self.max_bank, "queries": self.max_queries}
