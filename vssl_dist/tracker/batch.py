"""What one request to MLflow carries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlflow.entities import Metric, Param, RunTag

_MAX_METRICS, _MAX_PARAMS = 1000, 100
_MAX_KEY_LENGTH = 250


def clean_key(key: str) -> str:
    """Make a key one that MLflow takes: plain characters, no path tricks, at most 250 long.

    >>> clean_key("knn/top1_k20_t0.07"), clean_key("../a//b?")
    ('knn/top1_k20_t0.07', 'a/b_')
    """
    parts = re.sub(r"[^\w\-. /]", "_", key).split("/")
    return (
        "/".join(p for p in parts if p not in ("", ".", ".."))[:_MAX_KEY_LENGTH].rstrip("/") or "_"
    )


@dataclass(frozen=True)
class Batch:
    """Metrics, parameters and tags of one request."""

    metrics: Sequence[Metric] = ()
    params: Sequence[Param] = ()
    tags: Sequence[RunTag] = ()

    def __len__(self) -> int:
        """Count the values that the request carries."""
        return len(self.metrics) + len(self.params) + len(self.tags)

    def split_within_limits(self) -> Iterator[Batch]:
        """Split into requests of at most 1000 metrics, 100 parameters and 100 tags."""
        for start in range(0, max(len(self.params), len(self.tags)), _MAX_PARAMS):
            index_range = slice(start, start + _MAX_PARAMS)
            yield Batch((), self.params[index_range], self.tags[index_range])
        for start in range(0, len(self.metrics), _MAX_METRICS):
            yield Batch(self.metrics[start : start + _MAX_METRICS])

    def split_in_half(self) -> tuple[Batch, Batch]:
        """Split into two requests, neither of them empty where there are two values."""
        values: list[Metric | Param | RunTag] = [*self.metrics, *self.params, *self.tags]
        middle = len(values) // 2
        return _batch_of(values[:middle]), _batch_of(values[middle:])

    def name(self) -> str:
        """Name the only value of a request of one."""
        if self.metrics:
            return f"metric {self.metrics[0].key}"
        return f"parameter {self.params[0].key}" if self.params else f"tag {self.tags[0].key}"


def _batch_of(values: Sequence[Metric | Param | RunTag]) -> Batch:
    return Batch(
        [v for v in values if isinstance(v, Metric)],
        [v for v in values if isinstance(v, Param)],
        [v for v in values if isinstance(v, RunTag)],
    )
