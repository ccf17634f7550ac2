"""The training data of one rank; its entire state is one integer.

``plan`` says which samples, ``shards`` reads them, ``views`` draws what happens to them and a
backend carries it out, a few batches ahead of the training loop.  A batch is a function of its
position alone, so two are made at once, each by a thread and a backend of its own: while one is
planned, read or on the GPU, the other one has the decoding threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import count, pairwise
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vssl_dist.config import RunConfig
from vssl_dist.data.backends.base import (
    Backend,
    BackendSpec,
    Batch,
    record_on_current_stream,
)
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.damage.replace import read_decodable
from vssl_dist.data.plan import Plan
from vssl_dist.data.prefetch import Prefetcher
from vssl_dist.data.store.dataset import Dataset, Samples, Substitution
from vssl_dist.data.store.opening import open_watched
from vssl_dist.data.views import draw
from vssl_dist.errors import DataError

__all__ = [
    "BackendSpec",
    "Batch",
    "Loader",
    "build_loader",
    "check_classes",
    "check_labelled",
]

_AT_ONCE = 2
"""Batches in the making; as many more lie ready."""

Int64 = NDArray[np.int64]


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
        data, optim = cfg.data, cfg.optim
        self.position = 0
        self.substitutions: list[Substitution] = []
        """Samples shown in place of bad ones; whoever writes them down may empty the list."""
        self._recipes, self._seed = data.views, cfg.seed
        self._dataset, self._backends = dataset, backends
        self._rank, self._world_size = rank, world_size
        self._check = partial(dataset.watch.check, data.timeout_s, f"rank {rank}")
        self._plan = Plan(
            dataset.shard_sizes,
            seed=cfg.seed,
            streams=data.streams,
            window=data.window,
            global_batch=optim.global_batch,
            accumulate=optim.accumulate,
        )
        self._plan.streams_of(rank, world_size)
        self._planning = Lock()
        self._running: Prefetcher[tuple[Batch, list[Substitution]]] | None = None

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
        """From ``position`` on, for ever; a new iteration ends the one before it.

        Raises:
            DataError: A shard cannot be read, holds no usable image, or storage does not answer.
            ValueError: No micro-step begins at ``position``.
        """
        self.close()
        starts = count(self.position, self._plan.micro_batch)
        made = [self._batches(*each) for each in zip(self._backends, starts, strict=False)]
        batches = Prefetcher(made, 1, self._check)
        self._running = batches
        with closing(batches):
            for batch, substitutions in batches:
                self.position += self._plan.micro_batch
                self.substitutions += [replace(s, position=self.position) for s in substitutions]
                yield record_on_current_stream(batch)

    def close(self) -> None:
        """End the background threads and let go of the files; iterating again starts anew."""
        if self._running is not None:
            self._running.close()
            self._running = None
            self._dataset.close()

    def _batches(self, backend: Backend, start: int) -> Iterator[tuple[Batch, list[Substitution]]]:
        """One backend's share: the batch at ``start``, then those whose turn is its own."""
        for position in count(start, len(self._backends) * self._plan.micro_batch):
            with self._planning:
                ids, epochs = self._plan.micro_batch_ids(position, self._rank, self._world_size)
            samples, views = self._render(backend, ids, epochs)
            labels = torch.from_numpy(samples.label)
            yield Batch(torch.from_numpy(ids), views, labels), samples.substitutions

    def _render(self, backend: Backend, ids: Int64, epochs: Int64) -> tuple[Samples, list[Tensor]]:
        def render(samples: Samples) -> list[Tensor]:
            # A substitute is augmented as the planned sample would have been.
            sizes = np.stack([samples.height, samples.width], axis=1)
            draws = [
                draw(recipe, self._seed, view, ids, epochs, sizes)
                for view, recipe in enumerate(self._recipes)
            ]
            return backend(samples, draws)

        return read_decodable(self._dataset, ids, render)


def build_loader(cfg: RunConfig, *, rank: int, world_size: int, device: str) -> Loader:
    """The training loader of one rank.

    Args:
        cfg: The run.
        rank: In [0, world_size).
        world_size: Must divide ``data.streams``.
        device: Where the views are to be: ``"cpu"`` or ``"cuda"`` (this process's device).

    Raises:
        DataError: There is no dataset at ``data.train``, it is damaged or cannot be reached.
        ConfigError: The numbers do not divide, or the backend is not installed.
    """
    spec = BackendSpec(
        cfg.data.views, cfg.data.image_size, cfg.data.normalise, cfg.data.threads, device
    )
    dataset = open_watched(
        cfg.data.train,
        timeout_s=cfg.data.timeout_s,
        who=f"rank {rank}",
        share=slice(rank, None, world_size),  # together the ranks look at each shard once
        check=partial(check_classes, cfg),
    )
    backends = [build_backend(cfg.data.backend, spec) for _ in range(_AT_ONCE)]
    return Loader(cfg, dataset, backends, rank, world_size)


def check_classes(cfg: RunConfig, dataset: Dataset) -> None:
    """Refuse a training set whose labels are not those that the method learns.

    Raises:
        DataError: It has another number of classes than ``method.classes``, or images without.
    """
    wanted = cfg.method.classes_wanted
    if wanted is not None and wanted != len(dataset.classes):
        raise DataError(
            f"{cfg.data.train} has {len(dataset.classes)} classes, but method.classes={wanted}: "
            "give method.classes that number"
        )
    if wanted is not None:
        check_labelled(dataset, f"method {cfg.method.name} learns from labels")


def check_labelled(dataset: Dataset, purpose: str) -> None:
    """Refuse a split with images of no known class; reads every index.

    Args:
        dataset: The split.
        purpose: Why they are needed.

    Raises:
        DataError: It has some, or an index is damaged.
    """
    starts = np.cumsum([0, *dataset.shard_sizes]).tolist()
    unlabelled = sum(
        int((dataset.rows(np.arange(first, last))["label"] < 0).sum())
        for first, last in pairwise(starts)
    )
    if unlabelled:
        raise DataError(
            f"{dataset.folder}: {unlabelled} of its {dataset.samples} images have no label, but "
            f"{purpose}: name a labelled split"
        )
