"""Several pictures of each image through a network, instead of one: views, or corruptions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import nn

from vssl_dist.config import ViewRecipe
from vssl_dist.config.recipes import Views
from vssl_dist.data.loader import Batch
from vssl_dist.data.passes import Pairs, augmented_pair_batches
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.errors import DataError
from vssl_dist.evaluation.features.corruptions import CORRUPTION_BY_KIND, NUM_LEVELS, corrupt
from vssl_dist.evaluation.features.extract import (
    FeatureBatches,
    FeatureFunction,
    ImageReading,
    compute_features,
)
from vssl_dist.exports.card import Card


class ImageVariants(Protocol):
    """K pictures of each image, the same each time."""

    @property
    def pictures_per_image(self) -> int:
        """How many pictures are made of each image: K."""

    @property
    def cache_facts(self) -> dict[str, object]:
        """All that the pictures depend on beside the images and their reading, as JSON values."""

    def images_per_batch(self, reading: ImageReading) -> int:
        """How many images make a batch."""

    def variant_batches(
        self, dataset: Dataset, reading: ImageReading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """Yield each image once, in the order of ``ids``, as K views."""


@dataclass(frozen=True)
class AugmentedPairs:
    """Pairs of augmented views, as a training draws them."""

    pair_settings: Pairs

    @classmethod
    def of_run(cls, card: Card, count: int) -> AugmentedPairs:
        """Make pairs by the recipes that the exported run was trained with, seed 0.

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
        first_recipe, second_recipe = recipes
        recipe_pair = (_without_own_size(first_recipe), _without_own_size(second_recipe))
        return cls(Pairs(recipe_pair, count, seed=0))

    @property
    def pictures_per_image(self) -> int:
        """How many views are made of each image: two of each pair, pair after pair."""
        return 2 * self.pair_settings.count

    @property
    def cache_facts(self) -> dict[str, object]:
        """Recipes, number and seed of the pairs, as JSON values."""
        recipes = [recipe.model_dump(mode="json") for recipe in self.pair_settings.recipes]
        return {"pairs": asdict(self.pair_settings) | {"recipes": recipes}}

    def images_per_batch(self, reading: ImageReading) -> int:
        """How many images make a batch of no more pictures than a plain batch has."""
        return max(1, reading.batch_size // self.pictures_per_image)

    def variant_batches(
        self, dataset: Dataset, reading: ImageReading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """Yield each image once, in the order of ``ids``, as ``count`` augmented views."""
        batches = augmented_pair_batches(
            dataset,
            reading.backend_spec(),
            self.pair_settings,
            backend=reading.backend,
            batch=self.images_per_batch(reading),
            ids=ids,
            timeout_s=reading.timeout_s,
        )
        return reading.log_substitutions(dataset, batches)


@dataclass(frozen=True)
class CorruptedVariants:
    """Each image as it is, then each kind of corruption at each level."""

    version: int = 1
    """Raise it when an amount changes: stored features are then computed again."""

    @property
    def kinds_and_levels(self) -> list[tuple[str, int]]:
        """Kind and level of each picture after the first, which is the image as it is."""
        return [(kind, level) for kind in CORRUPTION_BY_KIND for level in range(1, NUM_LEVELS + 1)]

    @property
    def pictures_per_image(self) -> int:
        """How many pictures are made of each image: itself, and each kind at each level."""
        return 1 + len(self.kinds_and_levels)

    @property
    def cache_facts(self) -> dict[str, object]:
        """Kinds, levels and version of the corruptions, as JSON values."""
        return {
            "corruptions": list(CORRUPTION_BY_KIND),
            "levels": NUM_LEVELS,
            "version": self.version,
        }

    def images_per_batch(self, reading: ImageReading) -> int:
        """How many images make a batch: as many as without corruptions."""
        return reading.batch_size

    def variant_batches(
        self, dataset: Dataset, reading: ImageReading, ids: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """Yield each image once, in the order of ``ids``, as it is and then corrupted."""
        channel_shape = (3, 1, 1)
        for batch in reading.read_batches(dataset, ids):
            clean_images = batch.views[0]
            channel_means = clean_images.new_tensor(reading.normalise.mean).view(channel_shape)
            channel_stds = clean_images.new_tensor(reading.normalise.std).view(channel_shape)
            # Corruptions are defined on pixels in [0, 1], batches come normalised.
            unnormalised_images = (clean_images * channel_stds + channel_means).clamp(0, 1)
            corrupted_views = [
                (corrupt(unnormalised_images, batch.ids, kind, level) - channel_means)
                / channel_stds
                for kind, level in self.kinds_and_levels
            ]
            yield replace(batch, views=[clean_images, *corrupted_views])


def stream_variant_features(
    network: FeatureFunction,
    dataset: Dataset,
    reading: ImageReading,
    variants: ImageVariants,
    ids: NDArray[np.int64],
) -> FeatureBatches:
    """Yield features ``(B * K, D)``, the K of an image together, and labels ``(B * K,)``."""
    if isinstance(network, nn.Module):
        network.to(reading.device)
    for batch in variants.variant_batches(dataset, reading, ids):
        features_by_view = [compute_features(network, view, reading) for view in batch.views]
        labels = batch.labels.cpu().repeat_interleave(variants.pictures_per_image)
        yield torch.stack(features_by_view, dim=1).flatten(0, 1), labels


def _without_own_size(recipe: ViewRecipe) -> ViewRecipe:
    """Take a recipe's own size away: its views then have the size of the network's images."""
    return recipe.model_copy(update={"size": None})
