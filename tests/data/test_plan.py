"""The order of a run, against one written naively from its description."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from vssl_dist.data.plan import SampleOrder
from vssl_dist.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    sizes: tuple[int, ...]
    streams: int
    window: int
    global_batch: int
    accumulate: int = 1

    def plan(self, seed: int = 3) -> SampleOrder:
        return SampleOrder(
            np.array(self.sizes),
            seed=seed,
            streams=self.streams,
            window=self.window,
            global_batch=self.global_batch,
            accumulate=self.accumulate,
        )

    @property
    def micro(self) -> int:
        return self.global_batch // self.accumulate

    @property
    def samples(self) -> int:
        return sum(self.sizes)


TOPOLOGIES = [
    Topology((7,), 1, 3, 2),
    Topology((5, 1, 9, 2), 1, 100, 6, 3),
    Topology((101, 50, 3, 77, 1), 12, 4, 24),
    Topology((64, 64, 64, 64), 12, 1, 48, 2),
    Topology((40, 41, 39, 97), 60, 3, 60),
    Topology((500, 1, 1, 333, 166), 60, 5, 240, 2),
    Topology((1000, 999, 34), 64, 8, 128),
    Topology((129,) * 9, 96, 2, 384, 4),
    Topology((13, 8), 12, 4, 48),  # one micro-step holds more than two epochs
    Topology((3, 2), 12, 4, 12),  # fewer samples than streams
]


def naive_epoch(topology: Topology, seed: int, epoch: int) -> dict[int, list[int]]:
    """Every stream's samples of one epoch in order: the whole list, built step by step.

    The two shuffles are the plan's own definition, so their permutations are spelled alike.
    """

    def shuffled(items: list[int], *what: int) -> list[int]:
        raw = np.random.Philox(key=[seed, epoch], counter=[0, *what]).random_raw(len(items))
        return [item for _, item in sorted(zip(raw.tolist(), items, strict=True))]

    first, shards = 0, []
    for size in topology.sizes:
        shards.append(list(range(first, first + size)))
        first += size
    order = shuffled(list(range(len(shards))), 0, 0, 1)
    everything = [sample for shard in order for sample in shards[shard]]

    streams: dict[int, list[int]] = {}
    begin = 0
    for stream in range(topology.streams):
        d = (stream - epoch * topology.samples) % topology.streams
        count = math.ceil((topology.samples - d) / topology.streams)
        stretch = everything[begin : begin + count]
        begin += count
        streams[stream] = []
        for number, start in enumerate(range(0, count, topology.window)):
            chunk = stretch[start : start + topology.window]
            streams[stream] += shuffled(chunk, number, stream, 2)
    assert begin == topology.samples
    return streams


def naive_order(topology: Topology, seed: int, positions: int) -> list[tuple[int, int]]:
    """(epoch, id) of each position from 0 on."""
    epochs: dict[int, dict[int, list[int]]] = {}
    order = []
    for p in range(positions):
        e, q = divmod(p, topology.samples)
        if e not in epochs:
            epochs[e] = naive_epoch(topology, seed, e)
        order.append((e, epochs[e][p % topology.streams][q // topology.streams]))
    return order


def rows(plan: SampleOrder, position: int, world_size: int) -> list[tuple[int, int]]:
    """(epoch, id) of one micro-step, all ranks' rows joined."""
    joined = []
    for rank in range(world_size):
        ids, epochs = plan.micro_batch_ids(position, rank, world_size)
        assert ids.dtype == epochs.dtype == np.int64
        joined += list(zip(epochs.tolist(), ids.tolist(), strict=True))
    return joined


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_every_world_size_takes_the_naive_order(topology: Topology) -> None:
    steps = min(-(-3 * topology.samples // topology.micro), 40)
    order = naive_order(topology, 3, steps * topology.micro)
    divisors = [w for w in range(1, topology.streams + 1) if topology.streams % w == 0]
    plans = {world: topology.plan() for world in divisors}
    for step in range(steps):
        start = step * topology.micro
        # Rows are ordered by stream, and within a stream by position.
        positions = sorted(
            range(start, start + topology.micro), key=lambda p: (p % topology.streams, p)
        )
        expected = [order[p] for p in positions]
        for world, plan in plans.items():
            assert rows(plan, start, world) == expected, f"step {step} on {world} ranks"


STREAMS = (1, 12, 60, 64, 96)
UNEVEN = ((1000, 1, 7, 1, 333), (7, 1000, 1), (1, 1, 1, 97, 7), (89, 1, 7, 251, 13, 1000, 1))
ACCUMULATE = (1, 3)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("sizes", UNEVEN, ids=lambda sizes: "-".join(map(str, sizes)))
@pytest.mark.parametrize("streams", STREAMS)
def test_hundreds_of_topologies_share_one_naive_order_and_see_each_id_once(
    sizes: tuple[int, ...], streams: int, accumulate: int
) -> None:
    # A micro-step of about a tenth of the epoch, so that steps straddle its end.
    turns = max(1, sum(sizes) // (10 * streams))
    topology = Topology(sizes, streams, 5, streams * accumulate * turns, accumulate)
    steps = -(-topology.samples // topology.micro) + 1
    order = naive_order(topology, 3, steps * topology.micro)
    assert sorted(sample for _, sample in order[: topology.samples]) == list(range(sum(sizes)))
    plan = topology.plan()
    for step in range(steps):
        start = step * topology.micro
        expected = [
            order[p]
            for stream in range(streams)
            for p in range(start, start + topology.micro)
            if p % streams == stream
        ]
        for world in divisors(streams):
            assert rows(plan, start, world) == expected, f"step {step} on {world} ranks"


def test_the_topologies_above_are_hundreds() -> None:
    assert sum(len(divisors(s)) for s in STREAMS) * len(UNEVEN) * len(ACCUMULATE) == 304


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_each_id_comes_once_per_epoch(topology: Topology) -> None:
    plan, counts = topology.plan(), Counter[tuple[int, int]]()
    for start in range(0, 3 * topology.samples + topology.micro, topology.micro):
        counts.update(rows(plan, start, 1))
    for epoch in range(3):
        assert all(counts[epoch, sample] == 1 for sample in range(topology.samples))


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_any_position_is_reached_without_the_ones_before(topology: Topology) -> None:
    plan = topology.plan()
    starts = np.arange(0, 3 * topology.samples, topology.micro)
    straight = {start: rows(plan, start, 1) for start in starts.tolist()}
    random = np.random.default_rng(0)
    for start in random.permutation(starts)[:20].tolist():
        assert rows(plan, start, 1) == straight[start]
        assert rows(topology.plan(), start, 1) == straight[start]


@pytest.mark.parametrize("epoch", [1, 4, 10**9 // 1447, 10**15 // 1447])
@pytest.mark.parametrize("streams", [1, 12, 64])
def test_any_position_equals_the_naive_epochs_around_it(epoch: int, streams: int) -> None:
    topology = Topology((1000, 7, 1, 333, 106), streams, 9, 4 * streams)
    end = epoch * topology.samples
    around = {e: naive_epoch(topology, 3, e) for e in (epoch - 1, epoch)}

    def naive(p: int) -> tuple[int, int]:
        e, q = divmod(p, topology.samples)
        return e, around[e][p % streams][q // streams]

    last = (end - 1) // topology.micro * topology.micro  # holds the last position of an epoch
    for start in (last - topology.micro, last, last + topology.micro):
        expected = [
            naive(p)
            for s in range(streams)
            for p in range(start + s, start + topology.micro, streams)
        ]
        assert rows(topology.plan(), start, 1) == expected
        assert rows(topology.plan(), start, streams) == expected


def test_the_order_is_frozen() -> None:
    # A changed digest means that no run of before can be resumed.
    digest = hashlib.sha256()
    for topology in TOPOLOGIES:
        for start in (0, topology.micro, 1000 * topology.micro):
            digest.update(np.array(rows(topology.plan(), start, 1), "<i8").tobytes())
    assert digest.hexdigest() == "3fe6aad4772de531c14602b24a15de30751e4eaf4f935dd3110fcc138abf7889"


def test_a_thousand_million_samples_in_a_million_shards_are_planned_at_once() -> None:
    # A process of its own: its memory is what the plan takes, with numpy and the interpreter.
    program = """
import resource, time, tracemalloc
import numpy as np
from vssl_dist.data.plan import SampleOrder

def first_batch(position, rank, world_size):
    sizes = np.full(10**6, 1000)
    sizes[::2] += 1
    sizes[1::2] -= 1
    begun = time.process_time()
    plan = SampleOrder(sizes, 0, streams=64, window=4096, global_batch=4096)
    ids, _ = plan.micro_batch_ids(position, rank, world_size)
    spent = time.process_time() - begun
    assert len(set(ids.tolist())) == 4096 // world_size
    assert plan.samples == 10**9
    return spent

base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for position, rank, world_size in ((0, 0, 1), (10**9 // 4096 * 4096, 0, 1), (4096, 63, 64)):
    print(first_batch(position, rank, world_size))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)
tracemalloc.start()
first_batch(0, 0, 1)
print(tracemalloc.get_traced_memory()[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    *seconds, resident, peak = map(float, done.stdout.split())
    assert max(seconds) < 1.0
    assert resident < 200e6
    assert peak < 100e6


def test_seed_and_epoch_change_the_order() -> None:
    topology = TOPOLOGIES[6]
    once = [sample for _, sample in rows(topology.plan(), 0, 1)]
    assert once == [sample for _, sample in rows(topology.plan(), 0, 1)]
    assert once != [sample for _, sample in rows(topology.plan(seed=4), 0, 1)]
    later = 2 * topology.streams * topology.samples  # a whole number of epochs and micro-steps
    assert later % topology.micro == 0
    assert once != [sample for _, sample in rows(topology.plan(), later, 1)]


def test_a_rank_reads_only_its_own_stretches() -> None:
    topology = Topology((100,) * 80, 8, 32, 64)
    plan = topology.plan()
    touched = [set[int](), set[int]()]
    for start in range(0, 8000 - 64, 64):
        for rank in range(2):
            touched[rank].update((plan.micro_batch_ids(start, rank, 2)[0] // 100).tolist())
    assert len(touched[0] & touched[1]) <= 1
    assert len(touched[0]) <= 41
    assert len(touched[1]) <= 41


def test_caches_do_not_grow_with_the_dataset_or_with_time() -> None:
    topology = Topology((5000,) * 40, 12, 16, 120)
    plan = topology.plan()
    for start in range(0, 10 * topology.samples, 40_080):
        rows(plan, start, 4)
    assert len(plan._cached_epoch_layouts) <= 2
    assert len(plan._cached_window_ids) <= 2 * 12 / 4
    assert max(len(ids) for ids in plan._cached_window_ids.values()) <= 16


def test_what_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"multiple of data\.streams"):
        Topology((10,), 4, 2, 10).plan()
    with pytest.raises(ConfigError, match=r"global_batch=8 .* = 16"):
        Topology((10,), 4, 2, 8, 4).plan()
    with pytest.raises(ConfigError, match="no sample"):
        Topology((), 4, 2, 8).plan()
    plan = Topology((10,), 4, 2, 8).plan()
    with pytest.raises(ConfigError, match="not a multiple of the 3 ranks"):
        plan.micro_batch_ids(0, 0, 3)
    with pytest.raises(ValueError, match="position 4 is not the start"):
        plan.micro_batch_ids(4, 0, 2)
    with pytest.raises(ValueError, match="position -8"):
        plan.micro_batch_ids(-8, 0, 2)
    with pytest.raises(ValueError, match="no rank 2"):
        plan.micro_batch_ids(0, 2, 2)
