"""How well the training order shuffles, against a full permutation of the epoch.

Twice: on shards sorted by class, which is the worst that somebody else's shards can be, and on
the same mixed once while sharding, as `data_prep/shard.py` writes them.  No image is read: the
order is a function of the sizes of the shards.

    python bench/shuffle.py --plot docs/shuffle.png
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data_prep.shard import positive_int
from data_prep.sharding.dataset import fixed_permutation
from vssl_dist.config.paths import path_argument
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.data.plan import SampleOrder
from vssl_dist.durable import write_durably
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.figures.plots import render_png

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class ShardedDataset:
    """Images cut into shards."""

    samples: int
    classes: int
    shard_size: int

    @property
    def shard_sizes(self) -> Int64:
        """``(shards,)`` samples of each shard."""
        sizes = np.full(-(-self.samples // self.shard_size), self.shard_size, np.int64)
        sizes[-1] = self.samples - sizes[:-1].sum()
        return sizes

    def labels(self, *, mixed: bool) -> Int64:
        """Class of each sample: equally many of each, one after the other unless ``mixed``."""
        ordered = np.arange(self.samples) * self.classes // self.samples
        return ordered[fixed_permutation(self.samples)] if mixed else ordered


@dataclass(frozen=True)
class ClassMixture:
    """Classes within the batches of an epoch."""

    mean_classes: float
    """Different classes in a batch."""
    min_classes: int
    same_class_ratio: float
    """How much more often two images of a batch share their class than two of the dataset."""

    @classmethod
    def of(cls, labels: Int64, classes: int) -> ClassMixture:
        """Of ``(batches, B)`` labels."""
        classes_per_batch = np.array([len(np.unique(batch)) for batch in labels])
        return cls(
            float(classes_per_batch.mean()),
            int(classes_per_batch.min()),
            _equal_pair_probability(labels) * classes,
        )


@dataclass(frozen=True)
class ShuffleQuality:
    """What is measured of one way to shuffle; see `measure_shuffle`."""

    name: str
    displacement: float
    sorted: ClassMixture
    mixed: ClassMixture
    meet_again_ratio: float
    shards_per_batch: float


def two_planned_epochs(data: ShardedDataset, plan: SampleOrder) -> list[Int64]:
    """``(batches, global_batch)`` ids of two epochs; batches that straddle an end are left out."""
    batches = data.samples // plan.global_batch
    starts = [-(-e * data.samples // plan.global_batch) * plan.global_batch for e in range(2)]
    return [
        np.stack(
            [
                plan.micro_batch_ids(start + b * plan.global_batch, 0, 1)[0]
                for b in range(batches - 1)
            ]
        )
        for start in starts
    ]


def two_permuted_epochs(data: ShardedDataset, batch: int, seed: int) -> list[Int64]:
    """The same of a full permutation for every epoch."""
    batches = data.samples // batch - 1
    random = np.random.default_rng(seed)
    return [
        random.permutation(data.samples)[: batches * batch].reshape(batches, batch)
        for _ in range(2)
    ]


def measure_shuffle(name: str, data: ShardedDataset, epochs: Sequence[Int64]) -> ShuffleQuality:
    """The figures of one way to shuffle.

    Args:
        name: Of the row.
        data: What was shuffled.
        epochs: Two epochs of ``(batches, B)`` ids.

    Returns:
        ``displacement``: mean distance between a sample's place in the epoch and in the
        dataset, in epochs (a permutation: 1/3).  ``meet_again_ratio``: how much more often two
        images that met in one epoch's batch meet in the next one's than by chance.
        ``shards_per_batch``: read for one batch.
    """
    first, second = epochs
    places_in_epoch = np.arange(first.size).reshape(first.shape)
    batch_of_sample = np.full(data.samples, -1)
    batch_of_sample[second.ravel()] = np.repeat(np.arange(len(second)), second.shape[1])
    next_batches = [batch[batch >= 0] for batch in batch_of_sample[first]]
    return ShuffleQuality(
        name,
        displacement=float(np.abs(places_in_epoch - first).mean() / data.samples),
        sorted=ClassMixture.of(data.labels(mixed=False)[first], data.classes),
        mixed=ClassMixture.of(data.labels(mixed=True)[first], data.classes),
        meet_again_ratio=_equal_pair_probability(next_batches) * data.samples / first.shape[1],
        shards_per_batch=float(
            np.mean([len(np.unique(batch // data.shard_size)) for batch in first])
        ),
    )


def _equal_pair_probability(batches: Sequence[Int64] | Int64) -> float:
    """Probability that two entries of a row are equal."""
    equal = total = 0.0
    for batch in batches:
        counts = np.unique(batch, return_counts=True)[1]
        equal += float((counts * (counts - 1)).sum())
        total += len(batch) * (len(batch) - 1)
    return equal / total if total else math.nan


def markdown_table(rows: Sequence[ShuffleQuality]) -> str:
    """The figures as Markdown."""
    head = (
        "| window | displacement, epochs | classes in a batch, mean (least): sorted | mixed | "
        "same-class pairs, x chance: sorted | mixed | pairs that meet again, x chance | "
        "shards for a batch |\n|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {r.name} | {r.displacement:.3f} | {r.sorted.mean_classes:.0f} ({r.sorted.min_classes}) "
        f"| {r.mixed.mean_classes:.0f} ({r.mixed.min_classes}) | {r.sorted.same_class_ratio:.2f} "
        f"| {r.mixed.same_class_ratio:.2f} "
        f"| {r.meet_again_ratio:.2f} | {r.shards_per_batch:.0f} |"
        for r in rows
    ]
    return "\n".join([head, *lines])


def picture_png(rows: Sequence[ShuffleQuality]) -> bytes:
    """Class mixture and repeated company over the window, the permutation as a line."""
    *windows, full = rows
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = [r.name for r in windows]
    left.plot(names, [r.mixed.mean_classes for r in windows], "o-", label="shards mixed")
    left.plot(names, [r.sorted.mean_classes for r in windows], "s-", label="shards sorted by class")
    left.axhline(full.mixed.mean_classes, color="grey", label="full permutation")
    left.set(xlabel="window (samples of a stream)", ylabel="classes in a batch", ylim=(0, None))
    right.plot(
        names, [r.mixed.same_class_ratio for r in windows], "o-", label="same class, shards mixed"
    )
    right.plot(
        names, [r.sorted.same_class_ratio for r in windows], "s-", label="same class, sorted"
    )
    right.plot(
        names, [r.meet_again_ratio for r in windows], "^--", label="meet again in the next epoch"
    )
    right.axhline(1.0, color="grey", label="full permutation")
    right.set(xlabel="window (samples of a stream)", ylabel="pairs in a batch, x chance")
    right.set_yscale("log")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
    return render_png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 0, 2 (refused) or 130 (Ctrl-C)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=positive_int, default=1_281_167)
    parser.add_argument("--classes", type=positive_int, default=1000)
    parser.add_argument("--shard-size", type=positive_int, default=1000)
    parser.add_argument("--streams", type=positive_int, default=64)
    parser.add_argument("--batch", type=positive_int, default=4096)
    parser.add_argument(
        "--windows", type=positive_int, nargs="+", default=[1, 256, 1024, 4096, 16384]
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=path_argument, help="write a PNG")
    args = parser.parse_args(argv)
    with end_in_one_line(args.plot or Path()) as ending:
        if not 1 < args.batch <= args.samples // 2 or args.seed < 0:
            raise ConfigError(
                "--batch must be from 2 on and at most half of --samples, --seed 0 or more"
            )
        if args.plot and args.plot.is_dir():
            raise ConfigError(f"--plot {args.plot}: is a folder; name a file, such as shuffle.png")
        rows = quality_per_window(args)
        print(
            f"{args.samples} samples of {args.classes} classes, shards of {args.shard_size}, "
            f"{args.streams} streams, batches of {args.batch}, seed {args.seed}\n"
        )
        print(markdown_table(rows))
        if args.plot:
            write_durably(args.plot, picture_png(rows))
    return ending.exit_code


def quality_per_window(args: argparse.Namespace) -> list[ShuffleQuality]:
    """A row per window, and the permutation's."""
    data = ShardedDataset(args.samples, args.classes, args.shard_size)
    rows = []
    for window in args.windows:
        plan = SampleOrder(data.shard_sizes, args.seed, args.streams, window, args.batch)
        rows.append(measure_shuffle(str(window), data, two_planned_epochs(data, plan)))
    full = two_permuted_epochs(data, args.batch, args.seed)
    return [*rows, measure_shuffle("full permutation", data, full)]


if __name__ == "__main__":
    sys.exit(main())
