"""Several pictures of each image through a network, instead of one: views, or corruptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn

from vssl_dist.config import ViewRecipe
from vssl_dist.config.recipes import Views
from vssl_dist.data.loader import Batch
from vssl_dist.data.passes import Pairs, augmented_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.corruptions import (
    KINDS,
    LEVELS,
    corrupted,
)
from vssl_dist.evaluation.features.extract import (
    Forward,
    Reading,
    Rows,
    forward,
)
from vssl_dist.exports.card import Card


class Variants(Protocol):
    """K pictures of each image, the same each time."""

    @property
    def count(self) -> int:
        """K."""

    @property
    def facts(self) -> dict[str, Any]:
        """All that they depend on beside the images and their reading, as JSON values."""

    def batch(self, reading: Reading) -> int:
        """Images at a time."""

    def batches(
        self, dataset: Dataset, reading: Reading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """Each image once, in the order of ``ids``, as K views."""


@dataclass(frozen=True)
class AugmentedPairs:
    """Pairs of augmented views, as a training draws them."""

    pairs: Pairs

    @classmethod
    def of_run(cls, card: Card, count: int) -> AugmentedPairs:
        """Pairs by the recipes that the exported run was trained with, seed 0.

        Raises:
            DataError: Its card does not name two recipes.
        """
        try:
            recipes = TypeAdapter(Views).validate_python(list(card.config.data.views))
        except ValidationError:
            recipes = ()
        if len(recipes) != 2:
            raise DataError(
                f"run {card.run}: its card names {len(recipes)} views, but pairs need 2 "
                "(set ood's pairs to 0)"
            )
        first, second = recipes
        return cls(Pairs((_plain(first), _plain(second)), count, seed=0))

    @property
    def count(self) -> int:
        """Two of each pair, pair after pair."""
        return 2 * self.pairs.count

    @property
    def facts(self) -> dict[str, Any]:
        """Recipes, number and seed."""
        recipes = [recipe.model_dump(mode="json") for recipe in self.pairs.recipes]
        return {"pairs": asdict(self.pairs) | {"recipes": recipes}}

    def batch(self, reading: Reading) -> int:
        """As many as make no more pictures than a batch has images."""
        return max(1, reading.batch // self.count)

    def batches(
        self, dataset: Dataset, reading: Reading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """As `Variants` says."""
        how, size = reading.backend, self.batch(reading)
        spec, timeout_s = reading.spec(), reading.timeout_s
        made = augmented_batches(
            dataset, spec, self.pairs, backend=how, batch=size, ids=ids, timeout_s=timeout_s
        )
        return reading.counted(dataset, made)


@dataclass(frozen=True)
class Corruptions:
    """Each image as it is, then each kind of corruption at each level."""

    version: int = 1
    """To be raised when an amount changes: stored features are then computed again."""

    @property
    def names(self) -> list[tuple[str, int]]:
        """Kind and level of each picture after the first."""
        return [(kind, level) for kind in KINDS for level in range(1, LEVELS + 1)]

    @property
    def count(self) -> int:
        """One, and each kind at each level."""
        return 1 + len(self.names)

    @property
    def facts(self) -> dict[str, Any]:
        """Which ones."""
        return {"corruptions": list(KINDS), "levels": LEVELS, "version": self.version}

    def batch(self, reading: Reading) -> int:
        """As many as without."""
        return reading.batch

    def batches(
        self, dataset: Dataset, reading: Reading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """As `Variants` says."""
        shape = (3, 1, 1)
        for batch in reading.batches(dataset, ids):
            clean = batch.views[0]
            mean = clean.new_tensor(reading.normalise.mean).view(shape)
            std = clean.new_tensor(reading.normalise.std).view(shape)
            images = (clean * std + mean).clamp(0, 1)
            worse = [(corrupted(images, batch.ids, *name) - mean) / std for name in self.names]
            yield replace(batch, views=[clean, *worse])


def stream_variants(
    network: Forward,
    dataset: Dataset,
    reading: Reading,
    variants: Variants,
    ids: NDArray[np.int64],
) -> Rows:
    """Features ``(B * K, D)`` float32, the K of an image together, and labels ``(B * K,)``."""
    if isinstance(network, nn.Module):
        network.to(reading.device)
    for batch in variants.batches(dataset, reading, ids):
        rows = [forward(network, view, reading) for view in batch.views]
        labels = batch.labels.cpu().repeat_interleave(variants.count)
        yield torch.stack(rows, dim=1).flatten(0, 1), labels


def _plain(recipe: ViewRecipe) -> ViewRecipe:
    """The same recipe at the size of the network's images."""
    return recipe.model_copy(update={"size": None})
