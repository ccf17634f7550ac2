"""From sample ids to pixels: the one way in which training, evaluation and previews make views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import Backend, Batch
from vssl_dist.data.damage.replace import read_with_substitutes
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.data.views import Draws, draw

Int64 = NDArray[np.int64]

# Evaluation resizes the short side to the first number of pixels and crops the second from it, or
# in proportion where images are of another size.
_RESIZED_SIDE, _CROPPED_SIDE = 256, 224


@dataclass(frozen=True)
class RenderedViews:
    """B samples, what was drawn for them, and the views that resulted."""

    ids: Int64
    """``(B,)`` ids as planned, also where a substitute is shown."""
    samples: Samples
    """The encoded images that are shown, and which of them are substitutes."""
    draws: list[Draws]
    """One entry per view; empty where nothing is random."""
    views: list[Tensor]
    """V x ``(B, 3, S, S)`` float32, normalised, on the backend's device."""

    def batch(self) -> Batch:
        """Return the views with the labels of the images shown."""
        labels = torch.from_numpy(self.samples.label)
        return Batch(torch.from_numpy(self.ids), self.views, labels, self.samples.substitutions)


@dataclass(frozen=True)
class ViewRenderer:
    """Reads samples and turns them into views; what is damaged is replaced and listed."""

    dataset: Dataset
    backend: Backend
    recipes: tuple[ViewRecipe, ...] = ()
    """Augmentations of the views of one epoch, in order; only `render_augmented` needs them."""
    seed: int = 0
    """Key of all draws, below 2**32."""

    def render_augmented(self, ids: Int64, epochs: Sequence[Int64]) -> RenderedViews:
        """Render augmented views.

        Args:
            ids: ``(B,)`` sample ids.
            epochs: One or more ``(B,)`` arrays: the epochs whose draws are used.  All recipes
                are rendered for the first array, then all of them for the next one.

        Raises:
            DataError: A shard cannot be read, or holds no usable image near a damaged one.
        """
        draws: list[Draws] = []

        def render_samples(samples: Samples) -> list[Tensor]:
            # Drawn again after each replacement: the crop depends on the substitute's size.  All
            # else is addressed by the planned id, so it is what the planned image would have got.
            image_sizes = np.stack([samples.height, samples.width], axis=1)
            draws[:] = [
                draw(recipe, self.seed, view, ids, epoch, image_sizes)
                for epoch in epochs
                for view, recipe in enumerate(self.recipes)
            ]
            return self.backend(samples, draws)

        samples, views = read_with_substitutes(self.dataset, ids, render_samples)
        return RenderedViews(ids, samples, draws, views)

    def render_centre_crop(self, ids: Int64, side: int) -> RenderedViews:
        """Render one view of each sample without randomness, as evaluation sees it.

        Args:
            ids: ``(B,)`` sample ids.
            side: Height and width of the backend's frames, in pixels.

        Raises:
            DataError: A shard cannot be read, or holds no usable image near a damaged one.
        """

        def render_samples(samples: Samples) -> Tensor:
            return self.backend.frame(samples, centre_crop_boxes(samples, side))

        samples, view = read_with_substitutes(self.dataset, ids, render_samples)
        return RenderedViews(ids, samples, [], [view])


def centre_crop_boxes(samples: Samples, side: int) -> NDArray[np.float32]:
    """Return the region of each image that resizing its short side and cropping the centre keep.

    Only this region is resized then, which gives the same pixels for less work.

    Args:
        samples: B images; only their sizes matter.
        side: Side of the crop in pixels.

    Returns:
        ``(B, 4)`` top, left, height, width in pixels of the original.
    """
    image_sizes = np.stack([samples.height, samples.width], axis=1)
    short_sides = image_sizes.min(axis=1, keepdims=True)
    target_short_side = int(side * _RESIZED_SIDE / _CROPPED_SIDE + 0.5)
    resized_sizes = np.where(
        image_sizes == short_sides,
        target_short_side,
        image_sizes * target_short_side // short_sides,
    )
    resized_sizes = np.where((image_sizes == side).all(axis=1, keepdims=True), side, resized_sizes)
    crop_offsets = np.rint((resized_sizes - side) / 2)
    resize_factors = image_sizes / resized_sizes
    return np.hstack([crop_offsets * resize_factors, side * resize_factors]).astype(np.float32)
