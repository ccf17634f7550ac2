"""Every image once, in the order of the ids, seen the same way each time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import (
    Backend,
    BackendSpec,
    Batch,
    record_on_current_stream,
)
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.damage.replace import read_decodable
from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.data.views import draw

Ids = NDArray[np.int64]
_AHEAD = 2
_RESIZED, _CROPPED = 256, 224  # the short side is resized to the first to crop the second


def evaluation_batches(
    dataset: Dataset,
    spec: BackendSpec,
    *,
    backend: str,
    batch: int,
    ids: Ids | None = None,
    timeout_s: float = 120.0,
) -> Iterator[Batch]:
    """Each sample exactly once, in the order of its id, as one view.

    Images of ``spec.image_size`` x ``spec.image_size`` are taken as they are; of all others the
    short side is resized to 256 / 224 of it and the centre is cropped.

    Args:
        dataset: The split.
        spec: Size, normalisation, threads and device; its recipes are not used.
        backend: ``dali`` or ``reference``.
        batch: Samples per batch; the last one may be shorter.
        ids: These samples alone, in this order.
        timeout_s: Seconds without an answer to one read after which storage counts as dead.

    Yields:
        `Batch` with one view.  A damaged image is replaced as in training, and listed there.

    Raises:
        DataError: A shard cannot be read, holds no usable image, or storage does not answer.
    """
    made = build_backend(backend, spec)
    shown = (_framed(dataset, made, some, spec.image_size) for some in _some(dataset, batch, ids))
    yield from _ahead(dataset, shown, timeout_s)


@dataclass(frozen=True)
class Pairs:
    """Augmented views of each image, made as training makes them."""

    recipes: tuple[ViewRecipe, ViewRecipe]
    """Of the first and of the second view of a pair."""
    count: int
    """Pairs of each image."""
    seed: int
    """Of the draws.  Pair ``t`` is what a training of this seed shows in epoch ``t``."""


def augmented_batches(
    dataset: Dataset,
    spec: BackendSpec,
    pairs: Pairs,
    *,
    backend: str,
    batch: int,
    ids: Ids | None = None,
    timeout_s: float = 120.0,
) -> Iterator[Batch]:
    """Each sample exactly once, in the order of its id, as ``2 * pairs.count`` views.

    Pair stands after pair.  The same pixels whatever the size of the batch.  Else as
    `evaluation_batches`.
    """
    made = build_backend(backend, replace(spec, recipes=pairs.recipes * pairs.count))
    shown = (_augmented(dataset, made, some, pairs) for some in _some(dataset, batch, ids))
    yield from _ahead(dataset, shown, timeout_s)


def _some(dataset: Dataset, batch: int, ids: Ids | None) -> Iterator[Ids]:
    ids = np.arange(dataset.samples) if ids is None else ids
    return (ids[i : i + batch] for i in range(0, len(ids), batch))


def _ahead(dataset: Dataset, source: Iterator[Batch], timeout_s: float) -> Iterator[Batch]:
    check = partial(dataset.watch.check, timeout_s, "evaluation")
    try:
        with closing(Prefetcher([source], _AHEAD, check)) as batches:
            for result in batches:
                yield record_on_current_stream(result)
    finally:
        dataset.close()


def _framed(dataset: Dataset, backend: Backend, ids: Ids, side: int) -> Batch:
    samples, view = read_decodable(
        dataset, ids, lambda samples: backend.frame(samples, centre_boxes(samples, side))
    )
    return _batch(samples, ids, [view])


def _augmented(dataset: Dataset, backend: Backend, ids: Ids, pairs: Pairs) -> Batch:
    def render(samples: Samples) -> list[Tensor]:
        sizes = np.stack([samples.height, samples.width], axis=1)
        draws = [
            draw(recipe, pairs.seed, view, ids, np.full_like(ids, pair), sizes)
            for pair in range(pairs.count)
            for view, recipe in enumerate(pairs.recipes)
        ]
        return backend(samples, draws)

    samples, views = read_decodable(dataset, ids, render)
    return _batch(samples, ids, views)


def _batch(samples: Samples, ids: Ids, views: list[Tensor]) -> Batch:
    labels = torch.from_numpy(samples.label)
    return Batch(torch.from_numpy(ids), views, labels, samples.substitutions)


def centre_boxes(samples: Samples, side: int) -> NDArray[np.float32]:
    """The part of each image that resizing its short side and cropping the centre would keep.

    Only this part is resized then, which gives the same pixels for less work.

    Args:
        samples: B images; only their sizes matter.
        side: Side of the crop.

    Returns:
        ``(B, 4)`` top, left, height, width in pixels of the original.
    """
    sizes = np.stack([samples.height, samples.width], axis=1)
    short = sizes.min(axis=1, keepdims=True)
    target = int(side * _RESIZED / _CROPPED + 0.5)
    resized = np.where(sizes == short, target, sizes * target // short)
    resized = np.where((sizes == side).all(axis=1, keepdims=True), side, resized)
    offset = np.rint((resized - side) / 2)
    scale = sizes / resized
    return np.hstack([offset * scale, side * scale]).astype(np.float32)
