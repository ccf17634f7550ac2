"""Passes over a dataset outside of a training run: every image once, in any order."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import ViewRecipe
from vssl_dist.data.backends.base import BackendSpec, Batch, record_on_current_stream
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.render import ViewRenderer
from vssl_dist.data.store.dataset import Dataset

Int64 = NDArray[np.int64]
Batches = Generator[Batch, None, None]
"""Close it where it is not run to its end: threads then stop reading, and files are closed."""
_NUM_BATCHES_AHEAD = 2


def evaluation_batches(
    dataset: Dataset,
    spec: BackendSpec,
    *,
    backend: str,
    batch: int,
    ids: Int64 | None = None,
    timeout_s: float = 120.0,
) -> Batches:
    """Yield each sample exactly once, in the order of its id, as one view.

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
    renderer = ViewRenderer(dataset, build_backend(backend, spec))
    batches = (
        renderer.render_centre_crop(batch_ids, spec.image_size).batch()
        for batch_ids in _split_ids_into_batches(dataset, batch, ids)
    )
    yield from _prefetch_batches(dataset, batches, timeout_s, "evaluation")


@dataclass(frozen=True)
class Pairs:
    """Augmented views of each image, made as training makes them."""

    recipes: tuple[ViewRecipe, ViewRecipe]
    """Augmentations of the first and of the second view of a pair."""
    count: int
    """Pairs of each image."""
    seed: int
    """Key of the draws.  Pair ``t`` is what a training of this seed shows in epoch ``t``."""


def augmented_pair_batches(
    dataset: Dataset,
    spec: BackendSpec,
    pairs: Pairs,
    *,
    backend: str,
    batch: int,
    ids: Int64 | None = None,
    timeout_s: float = 120.0,
) -> Batches:
    """Yield each sample exactly once, in the order of its id, as ``2 * pairs.count`` views.

    Pair follows pair, and no pixel depends on the size of the batch.

    Args:
        dataset: The split.
        spec: Size, normalisation, threads and device; its recipes are not used.
        pairs: Which views.
        backend: ``dali`` or ``reference``.
        batch: Samples per batch; the last one may be shorter.
        ids: These samples alone, in this order.
        timeout_s: Seconds without an answer to one read after which storage counts as dead.

    Yields:
        `Batch` with all views.  A damaged image is replaced as in training, and listed there.

    Raises:
        DataError: A shard cannot be read, holds no usable image, or storage does not answer.
    """
    # The backend renders all pairs in one call, so that each image is decoded once.
    rendering_backend = build_backend(backend, replace(spec, recipes=pairs.recipes * pairs.count))
    renderer = ViewRenderer(dataset, rendering_backend, pairs.recipes, pairs.seed)
    batches = (
        renderer.render_augmented(
            batch_ids, [np.full_like(batch_ids, epoch) for epoch in range(pairs.count)]
        ).batch()
        for batch_ids in _split_ids_into_batches(dataset, batch, ids)
    )
    yield from _prefetch_batches(dataset, batches, timeout_s, "evaluation")


@dataclass(frozen=True)
class SeededEpoch:
    """The key of the draws of one epoch of a training."""

    seed: int
    number: int


def finetuning_batches(
    dataset: Dataset,
    spec: BackendSpec,
    epoch: SeededEpoch,
    *,
    backend: str,
    batch: int,
    ids: Int64,
    timeout_s: float = 120.0,
) -> Batches:
    """Yield samples in the order of ``ids``, augmented by the recipes of ``spec``.

    Args:
        dataset: The split.
        spec: Recipes, size, normalisation, threads and device.
        epoch: Which draws.
        backend: ``dali`` or ``reference``.
        batch: Samples per batch; the last one may be shorter.
        ids: The samples, in the order of the epoch.
        timeout_s: Seconds without an answer to one read after which storage counts as dead.

    Yields:
        `Batch` with one view per recipe.  A damaged image is replaced as in training, and
        listed there.

    Raises:
        DataError: A shard cannot be read, holds no usable image, or storage does not answer.
    """
    renderer = ViewRenderer(dataset, build_backend(backend, spec), spec.recipes, epoch.seed)
    batches = (
        renderer.render_augmented(batch_ids, [np.full_like(batch_ids, epoch.number)]).batch()
        for batch_ids in _split_ids_into_batches(dataset, batch, ids)
    )
    yield from _prefetch_batches(dataset, batches, timeout_s, "fine-tuning")


def _split_ids_into_batches(dataset: Dataset, batch: int, ids: Int64 | None) -> Iterator[Int64]:
    ids = np.arange(dataset.samples) if ids is None else ids
    return (ids[start : start + batch] for start in range(0, len(ids), batch))


def _prefetch_batches(
    dataset: Dataset, batch_source: Iterator[Batch], timeout_s: float, waiting_for: str
) -> Batches:
    """Yield batches made ahead by a thread; ``waiting_for`` is named if storage does not answer."""
    check_storage = partial(dataset.watch.check, timeout_s, waiting_for)
    try:
        with closing(Prefetcher([batch_source], _NUM_BATCHES_AHEAD, check_storage)) as batches:
            for batch in batches:
                yield record_on_current_stream(batch)
    finally:
        dataset.close()
