"""What one request to MLflow carries."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlflow.entities import Metric, Param, RunTag

_METRICS, _PARAMS = 1000, 100
_KEY = 250


def clean_key(key: str) -> str:
    """Make a key one that MLflow takes: plain characters, no path tricks, at most 250 long.

    >>> clean_key("knn/top1_k20_t0.07"), clean_key("../a//b?")
    ('knn/top1_k20_t0.07', 'a/b_')
    """
    parts = re.sub(r"[^\w\-. /]", "_", key).split("/")
    return "/".join(p for p in parts if p not in ("", ".", ".."))[:_KEY].rstrip("/") or "_"


@dataclass(frozen=True)
class Batch:
    """Metrics, parameters and tags of one request."""

    metrics: Sequence[Metric] = ()
    params: Sequence[Param] = ()
    tags: Sequence[RunTag] = ()

    def __len__(self) -> int:
        """Count the values that the request carries."""
        return len(self.metrics) + len(self.params) + len(self.tags)

    def within_limits(self) -> Iterator[Batch]:
        """Split into requests of at most 1000 metrics, 100 parameters and 100 tags."""
        for start in range(0, max(len(self.params), len(self.tags)), _PARAMS):
            stretch = slice(start, start + _PARAMS)
            yield Batch((), self.params[stretch], self.tags[stretch])
        for start in range(0, len(self.metrics), _METRICS):
            yield Batch(self.metrics[start : start + _METRICS])

    def halves(self) -> tuple[Batch, Batch]:
        """Split into two requests, neither of them empty where there are two values."""
        values: list[Metric | Param | RunTag] = [*self.metrics, *self.params, *self.tags]
        middle = len(values) // 2
        return _batch(values[:middle]), _batch(values[middle:])

    def name(self) -> str:
        """Name the only value of a request of one."""
        if self.metrics:
            return f"metric {self.metrics[0].key}"
        return f"parameter {self.params[0].key}" if self.params else f"tag {self.tags[0].key}"


def _batch(values: Sequence[Metric | Param | RunTag]) -> Batch:
    return Batch(
        [v for v in values if isinstance(v, Metric)],
        [v for v in values if isinstance(v, Param)],
        [v for v in values if isinstance(v, RunTag)],
    )
