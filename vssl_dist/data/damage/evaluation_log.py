"""The images that an evaluation had to show others for: counted, listed, held against a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vssl_dist.config import DataConfig
from vssl_dist.data.damage.training_log import bad_images_allowed
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.errors import DataError

_SHARE = DataConfig.model_fields["max_bad"].default


class Substitutes:
    """What was replaced in each split, each image once however often it is looked at."""

    def __init__(self) -> None:
        self._found: dict[Path, dict[int, Substitution]] = {}

    def note(self, dataset: Dataset, substitutions: Sequence[Substitution]) -> None:
        """Count what was replaced.

        Raises:
            DataError: One line: of this split more is damaged than figures may rest on.
        """
        found = self._found.setdefault(dataset.folder, {})
        found.update({bad.planned: bad for bad in substitutions})
        allowed = bad_images_allowed(dataset.samples, _SHARE)
        if len(found) > allowed:
            raise DataError(
                f"{dataset.folder}: {len(found)} of the images looked at so far are damaged, an "
                f"evaluation allows {allowed} ({self.first(dataset)}): data_prep/verify.py finds "
                "all, data_prep/shard.py makes shards anew"
            )

    def of(self, dataset: Dataset) -> list[Substitution]:
        """Those of a split, in the order of the ids."""
        found = self._found.get(dataset.folder, {})
        return [found[planned] for planned in sorted(found)]

    def first(self, dataset: Dataset) -> str:
        """The first of a split's, in words."""
        bad = self.of(dataset)[0]
        return f"sample {bad.planned} is evaluated as {bad.used}: {bad.reason}"
