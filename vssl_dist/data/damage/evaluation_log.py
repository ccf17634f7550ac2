"""Damaged images of an evaluation: what was shown instead is counted and held to a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssl_dist.config import DataConfig
from vssl_dist.data.damage.training_log import max_bad_images
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.errors import DataError

_MAX_BAD_SHARE = DataConfig.model_fields["max_bad"].default


class SubstitutionTally:
    """The images replaced in each split, each once however often it is read."""

    def __init__(self) -> None:
        self._substitutions_by_split: dict[Path, dict[int, Substitution]] = {}
        """Substitutions by planned id, by the folder of their split."""

    def record(self, dataset: Dataset, substitutions: Sequence[Substitution]) -> None:
        """Count what was replaced while reading a split.

        Raises:
            DataError: One line: of this split more is damaged than figures may rest on.
        """
        substitution_by_planned_id = self._substitutions_by_split.setdefault(dataset.folder, {})
        substitution_by_planned_id.update(
            {substitution.planned: substitution for substitution in substitutions}
        )
        num_bad_allowed = max_bad_images(dataset.samples, _MAX_BAD_SHARE)
        if len(substitution_by_planned_id) > num_bad_allowed:
            raise DataError(
                f"{dataset.folder}: {len(substitution_by_planned_id)} of the images looked at "
                f"so far are damaged, an evaluation allows {num_bad_allowed} "
                f"({self.describe_first_substitution(dataset)}): "
                "data_prep/verify.py finds all, data_prep/shard.py makes shards anew"
            )

    def substitutions_in_split(self, dataset: Dataset) -> list[Substitution]:
        """Return what was replaced in a split, in the order of the planned ids."""
        substitution_by_planned_id = self._substitutions_by_split.get(dataset.folder, {})
        return [
            substitution_by_planned_id[planned_id]
            for planned_id in sorted(substitution_by_planned_id)
        ]

    def describe_first_substitution(self, dataset: Dataset) -> str:
        """Describe the first substitution in a split that has one."""
        first = self.substitutions_in_split(dataset)[0]
        return f"sample {first.planned} is evaluated as {first.used}: {first.reason}"
