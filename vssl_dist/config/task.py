"""What every evaluation task has, and the kinds of values that their keys take."""

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
"""The same, or one number."""
Shares = Annotated[
    tuple[Annotated[Finite, Field(gt=0, lt=1)], ...],
    BeforeValidator(as_tuple),
]
"""Numbers between 0 and 1, written as a YAML list."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")]


class TaskConfig(Model):
    """What every task has; its queries are the images of ``data.val``."""

    needs_posterior: ClassVar[bool] = False
    """Whether it can be done of none but a method that has one."""

    task: str
    every_epochs: Period = 1.0
    """Epochs between two exports that this task evaluates; the last export is always evaluated."""
    max_queries: Positive | None = None
    """Use only this many of the held-out images, the first ones; null: all."""
    batch: Positive = 256
    """Images that pass through the network at a time."""

    @property
    def limits(self) -> dict[str, int | None]:
        """How many images of each split it wants, by the split's part; None: all."""
        return {"queries": self.max_queries}

    @property
    def stem(self) -> str:
        """How the names of its results begin: other results, other names."""
        return self.task

    def absolute(self) -> Self:
        """The same task whatever folder a job starts in."""
        return self

    def asked_of(self, *, embedding_density: bool) -> Self:
        """The same task without what means nothing for a method.

        Args:
            embedding_density: Whether the method has likelihoods of an embedding.
        """
        return self


class BankConfig(TaskConfig):
    """What every task has that also sees the images of ``data.train``, its bank."""

    max_bank: Positive | None = None
    """Use only this many of the training images, the first ones; null: all."""

    @property
    def limits(self) -> dict[str, int | None]:
        """How many images of each split it wants, by the split's part; None: all."""
        return {"bank": self.max_bank, "queries": self.max_queries}
