"""The training data of one rank; its entire state is one integer.

`SampleOrder` says which samples come next and `ViewRenderer` makes their views, a few batches ahead
of the training loop.  A batch is a function of its position alone, so two are made at once, each by
a thread and a backend of its own: while one is planned, read or on the GPU, the other one has the
decoding threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from threading import Lock

import numpy as np

from vssl_dist import dist
from vssl_dist.config import RunConfig
from vssl_dist.data.backends.base import (
    Backend,
    BackendSpec,
    Batch,
    record_on_current_stream,
)
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.plan import sample_order_of_run
from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.render import ViewRenderer
from vssl_dist.data.store.dataset import Dataset, Substitution
from vssl_dist.data.store.manifest import Manifest
from vssl_dist.data.store.opening import open_watched
from vssl_dist.errors import DataError

__all__ = [
    "BackendSpec",
    "Batch",
    "Loader",
    "build_loader",
    "refuse_other_classes",
    "refuse_unlabelled",
]

_log = logging.getLogger(__name__)
_NUM_BACKENDS = 2
"""Batches in the making, each by a backend of its own; as many more lie ready."""


class Loader:
    """An endless iterator over one rank's micro-steps.

    ``position`` counts the samples that the whole job has consumed, not what this rank has
    prefetched: it moves on when a batch is yielded.  Set it before iterating to go anywhere.
    """

    def __init__(
        self,
        cfg: RunConfig,
        dataset: Dataset,
        backends: Sequence[Backend],
        rank: int,
        world_size: int,
    ) -> None:
        self.position = 0
        self.substitutions: list[Substitution] = []
        """Samples shown in place of bad ones; whoever writes them down may empty the list."""
        self._dataset = dataset
        self._renderers = [
            ViewRenderer(dataset, backend, cfg.data.views, cfg.seed) for backend in backends
        ]
        self._rank = rank
        self._world_size = world_size
        self._check_storage = partial(dataset.watch.check, cfg.data.timeout_s, f"rank {rank}")
        self._sample_order = sample_order_of_run(cfg, dataset.shard_sizes)
        # Refuses, before anything is rendered, ranks that do not divide the streams.
        own_streams = self._sample_order.streams_of_rank(rank, world_size)
        # So many shards hold a stream's window, the first and the last of them in part.
        shards_per_window = cfg.data.window // max(int(dataset.shard_sizes.mean()), 1) + 2
        shards_in_turn = min(len(own_streams) * shards_per_window, len(dataset.shard_sizes))
        kept_open = dataset.keep_open(shards_in_turn)
        if kept_open < shards_in_turn:
            _log.warning(
                "rank %d reads from %d shards in turn and may keep %d open: reading will be slow; "
                "raise the limit of open files (ulimit -Hn) to %d or lower data.streams",
                rank,
                shards_in_turn,
                kept_open,
                4 * shards_in_turn,
            )
        # The order keeps caches, and each source asks it in its own thread.
        self._sample_order_lock = Lock()
        self._prefetcher: Prefetcher[Batch] | None = None

    @property
    def samples(self) -> int:
        """Samples of one epoch, over all ranks."""
        return self._dataset.samples

    @property
    def classes(self) -> int:
        """Classes of the training set."""
        return len(self._dataset.classes)

    @property
    def fingerprint(self) -> str:
        """Digest of the dataset's manifest."""
        return self._dataset.fingerprint

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from ``position`` on, for ever; a new iteration ends the one before it.

        Raises:
            DataError: A shard cannot be read, holds no usable image, or storage does not answer.
            ValueError: No micro-step begins at ``position``.
        """
        self.close()
        positions = count(self.position, self._sample_order.micro_batch)
        batch_sources = [
            self._render_batches(renderer, start)
            for renderer, start in zip(self._renderers, positions, strict=False)
        ]
        batches = Prefetcher(batch_sources, 1, self._check_storage)
        self._prefetcher = batches
        with closing(batches):
            for batch in batches:
                # Only now: what was prefetched and never yielded has not been consumed.
                self.position += self._sample_order.micro_batch
                self.substitutions += [
                    replace(substitution, position=self.position)
                    for substitution in batch.substitutions
                ]
                yield record_on_current_stream(replace(batch, substitutions=()))

    def close(self) -> None:
        """End the background threads and close all files; iterating again starts anew."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None
            self._dataset.close()

    def _render_batches(self, renderer: ViewRenderer, start: int) -> Iterator[Batch]:
        """Yield one renderer's share: the batch at ``start``, then every n-th of n renderers."""
        for position in count(start, len(self._renderers) * self._sample_order.micro_batch):
            with self._sample_order_lock:
                ids, epochs = self._sample_order.micro_batch_ids(
                    position, self._rank, self._world_size
                )
            yield renderer.render_augmented(ids, [epochs]).batch()


def build_loader(cfg: RunConfig, *, rank: int, world_size: int, device: str) -> Loader:
    """Build the training loader of one rank.

    Args:
        cfg: The run.
        rank: In [0, world_size).
        world_size: Must divide ``data.streams``.
        device: Where the views are to be: ``"cpu"`` or ``"cuda"`` (this process's device).

    Raises:
        DataError: There is no dataset at ``data.train``, it is damaged or cannot be reached.
        ConfigError: The numbers do not divide, or the backend is not installed.
    """
    data = cfg.data
    spec = BackendSpec(
        data.views, data.image_size, data.normalise, data.threads, device, data.jpeg_engine
    )
    dataset = _open_share(cfg, rank, world_size)
    backends = [build_backend(cfg.data.backend, spec) for _ in range(_NUM_BACKENDS)]
    return Loader(cfg, dataset, backends, rank, world_size)


def _open_share(cfg: RunConfig, rank: int, world_size: int) -> Dataset:
    """Open the training set; of the ranks of a job the first one reads what concerns all.

    That is the manifest, the sizes of all files and, for a method that learns from labels, all
    indices: thousands of files, which a file server would be asked for by each rank at once.
    """
    open_dataset = partial(
        open_watched, cfg.data.train, timeout_s=cfg.data.timeout_s, who=f"rank {rank}"
    )
    share = slice(rank, None, world_size)  # together the ranks look at each shard once
    check = partial(refuse_other_classes, cfg)
    if dist.world_size() == 1:
        return open_dataset(share=share, check=check)
    manifest: Manifest | DataError | None = None
    if dist.rank() == 0:
        try:
            whole = open_dataset(check=check)
            manifest = whole.manifest
            whole.close()
        except DataError as error:
            manifest = error
    manifest = dist.broadcast(manifest)
    if isinstance(manifest, DataError):
        raise manifest
    return open_dataset(manifest=manifest, share=share)


def refuse_other_classes(cfg: RunConfig, dataset: Dataset) -> None:
    """Refuse a training set whose labels are not those that the method learns.

    Raises:
        DataError: It has another number of classes than ``method.classes``, or images without.
    """
    num_classes = cfg.method.classes_wanted
    if num_classes is None:
        return
    if num_classes != len(dataset.classes):
        raise DataError(
            f"{cfg.data.train} has {len(dataset.classes)} classes, but "
            f"method.classes={num_classes}: give method.classes that number"
        )
    refuse_unlabelled(dataset, f"method {cfg.method.name} learns from labels")


def refuse_unlabelled(dataset: Dataset, label_purpose: str) -> None:
    """Refuse a split with images of no known class; reads every index.

    Args:
        dataset: The split.
        label_purpose: Why labels are needed.

    Raises:
        DataError: Some images have no label, or an index is damaged.
    """
    # Shard by shard: the index rows of a large dataset do not fit into memory at once.
    shard_starts = np.cumsum([0, *dataset.shard_sizes]).tolist()
    num_unlabelled = sum(
        int((dataset.rows(np.arange(first, last))["label"] < 0).sum())
        for first, last in pairwise(shard_starts)
    )
    if num_unlabelled:
        raise DataError(
            f"{dataset.folder}: {num_unlabelled} of its {dataset.samples} images have no label, "
            f"but {label_purpose}: name a labelled split"
        )
