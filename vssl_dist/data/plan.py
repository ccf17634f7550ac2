"""The order of the training samples: computed from a position, not stored.

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

_SHARD_SHUFFLE = 1
_WINDOW_SHUFFLE = 2
"""What a generator shuffles, as part of its key: shards and windows never share random numbers."""
_MAX_CACHED_EPOCHS = 2  # a batch that straddles the end of an epoch needs both


def _keyed_permutation(size: int, seed: int, epoch: int, counter: tuple[int, int, int]) -> Int64:
    """Return a permutation keyed by all arguments.

    The order of a run must survive an upgrade of numpy, which promises the raw output of its
    bit generators for ever but not ``Generator.permutation``: hence ranks of raw numbers.
    """
    bit_generator = np.random.Philox(key=[seed, epoch], counter=[0, *counter])
    return np.argsort(bit_generator.random_raw(size), kind="stable")


class _EpochLayout(NamedTuple):
    """The layout of one epoch."""

    shards: Int64
    """Shard numbers in this epoch's order."""
    shard_ends: Int64
    """Where each shard ends when they are laid end to end in this order."""
    stream_starts: Int64
    """``(S + 1,)``: where each stream's stretch begins, and N."""


@dataclass(frozen=True)
class SampleOrder:
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

    >>> plan = SampleOrder(
    ...     np.array([3, 2]), seed=0, streams=2, window=2, global_batch=2, accumulate=1
    ... )
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
    _cached_epoch_layouts: OrderedDict[int, _EpochLayout] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )
    _cached_window_ids: OrderedDict[tuple[int, int, int], Int64] = field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        batch_divisor = self.streams * self.accumulate
        if self.global_batch % batch_divisor:
            raise ConfigError(
                f"optim.global_batch={self.global_batch} must be a multiple of data.streams * "
                f"optim.accumulate = {batch_divisor}"
            )
        if self.samples == 0:
            raise ConfigError("data.train: the dataset holds no sample (shard some images first)")

    # Cached: it is a pass over all shards, of which there may be a million.
    @cached_property
    def samples(self) -> int:
        """The number N of samples in one epoch."""
        return int(self.shard_sizes.sum())

    @cached_property
    def _first_id_of_shard(self) -> Int64:
        """The id of each shard's first sample."""
        return np.cumsum(self.shard_sizes, dtype=np.int64) - self.shard_sizes

    @property
    def micro_batch(self) -> int:
        """Positions of one micro-step, over all ranks."""
        return self.global_batch // self.accumulate

    def micro_batch_ids(self, position: int, rank: int, world_size: int) -> tuple[Int64, Int64]:
        """Return the samples that one rank takes in the micro-step that begins at ``position``.

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
        own_streams = self.streams_of_rank(rank, world_size)
        if position < 0 or position % self.micro_batch:
            raise ValueError(
                f"position {position} is not the start of a micro-step: it must be a multiple of "
                f"global_batch / accumulate = {self.micro_batch}"
            )
        turn_offsets = np.arange(0, self.micro_batch, self.streams, dtype=np.int64)
        streams = np.repeat(
            np.arange(own_streams.start, own_streams.stop, dtype=np.int64), len(turn_offsets)
        )
        epochs, epoch_offsets = np.divmod(
            position + streams + np.tile(turn_offsets, len(own_streams)), self.samples
        )
        windows, rows_in_window = np.divmod(epoch_offsets // self.streams, self.window)

        ids = np.empty_like(streams)
        window_keys = np.stack([epochs, streams, windows], axis=1)
        # Positions of one stream follow each other, so equal keys stand side by side, and each
        # window is looked up once.
        run_starts = np.flatnonzero(np.r_[True, (window_keys[1:] != window_keys[:-1]).any(axis=1)])
        for run_start, run_end in zip(run_starts, [*run_starts[1:], len(window_keys)], strict=True):
            epoch, stream, window = window_keys[run_start].tolist()
            ids_of_window = self._ids_of_window(
                epoch, stream, window, max_cached_windows=2 * len(own_streams)
            )
            ids[run_start:run_end] = ids_of_window[rows_in_window[run_start:run_end]]
        return ids, epochs

    def streams_of_rank(self, rank: int, world_size: int) -> range:
        """Return the streams of a rank: contiguous, disjoint over ranks, none left out.

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
        streams_per_rank = self.streams // world_size
        return range(rank * streams_per_rank, (rank + 1) * streams_per_rank)

    def _ids_of_window(
        self, epoch: int, stream: int, window: int, max_cached_windows: int
    ) -> Int64:
        """Return the ids of one window of one stream, in the order in which they are taken."""
        key = (epoch, stream, window)
        if key in self._cached_window_ids:
            self._cached_window_ids.move_to_end(key)
            return self._cached_window_ids[key]
        epoch_layout = self._layout_of_epoch(epoch)
        window_start = int(epoch_layout.stream_starts[stream]) + window * self.window
        size = min(self.window, int(epoch_layout.stream_starts[stream + 1]) - window_start)
        epoch_offsets = window_start + _keyed_permutation(
            size, self.seed, epoch, (window, stream, _WINDOW_SHUFFLE)
        )
        # From offsets in this epoch's order of the shards to ids, which count in their own order.
        shard_places = np.searchsorted(epoch_layout.shard_ends, epoch_offsets, side="right")
        shards = epoch_layout.shards[shard_places]
        shard_starts = epoch_layout.shard_ends[shard_places] - self.shard_sizes[shards]
        ids: Int64 = self._first_id_of_shard[shards] + epoch_offsets - shard_starts
        self._cached_window_ids[key] = ids
        while len(self._cached_window_ids) > max_cached_windows:
            self._cached_window_ids.popitem(last=False)
        return ids

    def _layout_of_epoch(self, epoch: int) -> _EpochLayout:
        """Return the layout of an epoch."""
        if epoch not in self._cached_epoch_layouts:
            samples = self.samples
            streams = self.streams
            shard_order = _keyed_permutation(
                len(self.shard_sizes), self.seed, epoch, (0, 0, _SHARD_SHUFFLE)
            )
            # Streams take turns through all epochs, so where N is no multiple of S an epoch begins
            # in the middle of a turn.  A stream has every S-th position from its first one on.
            first_positions = (
                np.arange(streams, dtype=np.int64) - epoch * samples % streams
            ) % streams
            samples_per_stream = -((first_positions - samples) // streams)
            stream_starts = np.concatenate([[0], np.cumsum(samples_per_stream)])
            self._cached_epoch_layouts[epoch] = _EpochLayout(
                shard_order, np.cumsum(self.shard_sizes[shard_order]), stream_starts
            )
            while len(self._cached_epoch_layouts) > _MAX_CACHED_EPOCHS:
                self._cached_epoch_layouts.popitem(last=False)
        return self._cached_epoch_layouts[epoch]


def sample_order_of_run(cfg: RunConfig, shard_sizes: Int64) -> SampleOrder:
    """Return the order in which a run passes through its training set.

    Args:
        cfg: The run.
        shard_sizes: ``(shards,)`` samples of each shard of the training set.

    Raises:
        ConfigError: The numbers do not divide, or there is no sample.
    """
    return SampleOrder(
        shard_sizes,
        seed=cfg.seed,
        streams=cfg.data.streams,
        window=cfg.data.window,
        global_batch=cfg.optim.global_batch,
        accumulate=cfg.optim.accumulate,
    )
