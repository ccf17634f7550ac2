"""Damaged images of an evaluation: what was shown instead is counted and held to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssl_dist.config import DataConfig
from vssl_dist.data.damage.training_log import bad_images_allowed
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.errors import DataError

_MAX_BAD = DataConfig.model_fields["max_bad"].default


class SubstitutionTally:
    """The images replaced in each split, each once however often it is read."""

    def __init__(self) -> None:
        self._by_split: dict[Path, dict[int, Substitution]] = {}
        """Substitutions by planned id, by the folder of their split."""

    def record(self, dataset: Dataset, substitutions: Sequence[Substitution]) -> None:
        """Count what was replaced while reading a split.

        Raises:
            DataError: One line: of this split more is damaged than figures may rest on.
        """
        by_planned = self._by_split.setdefault(dataset.folder, {})
        by_planned.update({bad.planned: bad for bad in substitutions})
        allowed = bad_images_allowed(dataset.samples, _MAX_BAD)
        if len(by_planned) > allowed:
            raise DataError(
                f"{dataset.folder}: {len(by_planned)} of the images looked at so far are damaged, "
                f"an evaluation allows {allowed} ({self.first_in_words(dataset)}): "
                "data_prep/verify.py finds all, data_prep/shard.py makes shards anew"
            )

    def in_split(self, dataset: Dataset) -> list[Substitution]:
        """Return what was replaced in a split, in the order of the planned ids."""
        by_planned = self._by_split.get(dataset.folder, {})
        return [by_planned[planned] for planned in sorted(by_planned)]

    def first_in_words(self, dataset: Dataset) -> str:
        """Describe the first substitution in a split that has one."""
        first = self.in_split(dataset)[0]
        return f"sample {first.planned} is evaluated as {first.used}: {first.reason}"
