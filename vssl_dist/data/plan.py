"""Which sample stands at which position: computed, not stored.

Position ``p`` of the endless training sequence lies in epoch ``e = p // N`` at place ``q = p % N``
and belongs to stream ``s = p % S``, whose ``k = q // S``-th sample of the epoch it is.  In every
epoch the shards are permuted, laid end to end and cut into one stretch per stream; a stream walks
through its stretch shuffled within windows.  So any position is reached at once, every sample
comes exactly once per epoch, and a rank reads only the stretches of the streams it owns.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vssl_dist.config import RunConfig
from vssl_dist.errors import ConfigError

Int64 = NDArray[np.int64]

_SHARDS, _WINDOW = 1, 2  # what a generator shuffles: keeps the two kinds of draws apart
_EPOCHS_KEPT = 2  # a batch that straddles an epoch's end needs both


def _permutation(size: int, seed: int, epoch: int, what: tuple[int, int, int]) -> Int64:
    """A permutation keyed by all arguments.

    The order of a run must survive an upgrade of numpy, which promises the raw output of its
    bit generators for ever but not ``Generator.permutation``: hence ranks of raw numbers.
    """
    bits = np.random.Philox(key=[seed, epoch], counter=[0, *what])
    return np.argsort(bits.random_raw(size), kind="stable")


class _Epoch(NamedTuple):
    """The layout of one epoch."""

    shards: Int64
    """Shard numbers in this epoch's order."""
    ends: Int64
    """Where each of them ends in the concatenation."""
    cuts: Int64
    """``(S + 1,)``: where each stream's stretch begins, and N."""


@dataclass(frozen=True)
class Plan:
    """The order of a run, as a pure function of position, rank and world size.

    Two plans with equal fields give equal sequences.  The caches inside hold two epochs' shard
    tables and two windows for each stream of the rank that asks, whatever the dataset's size.

    Args:
        shard_sizes: ``(shards,)`` samples of each shard; a sample's id is its place when the
            shards are laid end to end in their own order.
        seed: Key of both shuffles, in [0, 2**64).
        streams: S, the number of independent streams.
        window: Samples of a stream that are shuffled together.
        global_batch: Positions per optimizer step.
        accumulate: Micro-steps per optimizer step.

    Raises:
        ConfigError: The numbers do not divide, or there is no sample.

    >>> plan = Plan(np.array([3, 2]), seed=0, streams=2, window=2, global_batch=2, accumulate=1)
    >>> two_epochs = np.concatenate([plan.micro_batch_ids(p, 0, 1)[0] for p in range(0, 10, 2)])
    >>> sorted(two_epochs.tolist())
    [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    shard_sizes: Int64
    seed: int
    streams: int
    window: int
    global_batch: int
    accumulate: int = 1
    _epochs: OrderedDict[int, _Epoch] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )
    _windows: OrderedDict[tuple[int, int, int], Int64] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        each_step = self.streams * self.accumulate
        if self.global_batch % each_step:
            raise ConfigError(
                f"optim.global_batch={self.global_batch} must be a multiple of data.streams * "
                f"optim.accumulate = {each_step}"
            )
        if self.samples == 0:
            raise ConfigError("data.train: the dataset holds no sample (shard some images first)")

    # Kept: each is a pass over all shards, of which there may be a million.
    @cached_property
    def samples(self) -> int:
        """N, the samples of one epoch."""
        return int(self.shard_sizes.sum())

    @cached_property
    def _first_ids(self) -> Int64:
        """The id of each shard's first sample."""
        return np.cumsum(self.shard_sizes, dtype=np.int64) - self.shard_sizes

    @property
    def micro_batch(self) -> int:
        """Positions of one micro-step, over all ranks."""
        return self.global_batch // self.accumulate

    def micro_batch_ids(self, position: int, rank: int, world_size: int) -> tuple[Int64, Int64]:
        """The samples that one rank takes in the micro-step that begins at ``position``.

        Args:
            position: A multiple of ``global_batch / accumulate``, at least 0.
            rank: In [0, world_size).
            world_size: Must divide ``streams``.

        Returns:
            ``ids`` and ``epochs``, both ``(micro_batch / world_size,)`` int64, ordered by stream
            and within a stream by position; the ranks' rows, joined in rank order, do not depend
            on ``world_size``.

        Raises:
            ConfigError: ``streams`` is not a multiple of ``world_size``.
            ValueError: No micro-step begins at ``position``, or there is no such rank.
        """
        mine = self.streams_of(rank, world_size)
        if position < 0 or position % self.micro_batch:
            raise ValueError(
                f"position {position} is not the start of a micro-step: it must be a multiple of "
                f"global_batch / accumulate = {self.micro_batch}"
            )
        stride = np.arange(0, self.micro_batch, self.streams, dtype=np.int64)
        streams = np.repeat(np.arange(mine.start, mine.stop, dtype=np.int64), len(stride))
        epochs, place = np.divmod(position + streams + np.tile(stride, len(mine)), self.samples)
        windows, within = np.divmod(place // self.streams, self.window)

        ids = np.empty_like(streams)
        keys = np.stack([epochs, streams, windows], axis=1)
        # Positions of one stream follow each other, so equal keys stand side by side.
        starts = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
        for start, stop in zip(starts, [*starts[1:], len(keys)], strict=True):
            epoch, stream, window = keys[start].tolist()
            order = self._window_ids(epoch, stream, window, keep=2 * len(mine))
            ids[start:stop] = order[within[start:stop]]
        return ids, epochs

    def streams_of(self, rank: int, world_size: int) -> range:
        """The streams a rank owns: contiguous, disjoint over ranks, none left out.

        Raises:
            ConfigError: ``streams`` is not a multiple of ``world_size``.
            ValueError: There is no such rank.
        """
        if self.streams % world_size:
            raise ConfigError(
                f"data.streams={self.streams} is not a multiple of the {world_size} ranks "
                "(choose another number of ranks, or of streams)"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"there is no rank {rank} among {world_size}")
        each = self.streams // world_size
        return range(rank * each, (rank + 1) * each)

    def _window_ids(self, epoch: int, stream: int, window: int, keep: int) -> Int64:
        """The ids of one window of one stream, in the order in which they are taken."""
        key = (epoch, stream, window)
        if key in self._windows:
            self._windows.move_to_end(key)
            return self._windows[key]
        table = self._epoch(epoch)
        start = int(table.cuts[stream]) + window * self.window
        size = min(self.window, int(table.cuts[stream + 1]) - start)
        place = start + _permutation(size, self.seed, epoch, (window, stream, _WINDOW))
        nth = np.searchsorted(table.ends, place, side="right")
        shard = table.shards[nth]
        begins = table.ends[nth] - self.shard_sizes[shard]
        ids: Int64 = self._first_ids[shard] + place - begins
        self._windows[key] = ids
        while len(self._windows) > keep:
            self._windows.popitem(last=False)
        return ids

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            n, s = self.samples, self.streams
            shards = _permutation(len(self.shard_sizes), self.seed, epoch, (0, 0, _SHARDS))
            # Stream j's first place in the epoch is d; from there it takes every S-th.
            d = (np.arange(s, dtype=np.int64) - epoch * n % s) % s
            counts = -((d - n) // s)
            cuts = np.concatenate([[0], np.cumsum(counts)])
            self._epochs[epoch] = _Epoch(shards, np.cumsum(self.shard_sizes[shards]), cuts)
            while len(self._epochs) > _EPOCHS_KEPT:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def run_plan(cfg: RunConfig, shard_sizes: Int64) -> Plan:
    """Return the order in which a run passes through its training set.

    Args:
        cfg: The run.
        shard_sizes: ``(shards,)`` samples of each shard of the training set.

    Raises:
        ConfigError: The numbers do not divide, or there is no sample.
    """
    return Plan(
        shard_sizes,
        seed=cfg.seed,
        streams=cfg.data.streams,
        window=cfg.data.window,
        global_batch=cfg.optim.global_batch,
        accumulate=cfg.optim.accumulate,
    )
