"""How fast images become shards, beside what decoding and hashing alone cost.

``python bench/shard.py`` prints, for CIFAR-sized pixels and for 500x375 JPEGs cut from the
photographs of scikit-image: samples per second with one worker and with two, their ratio, and
the rate of a bare loop that does with Pillow and hashlib what cannot be avoided: decode and hash
each JPEG, or encode and hash bare pixels.  All are measured in turn, round by round, so that a
load on the machine falls on all alike, and ratios are of one round and then their median; what
runs in one process is also given per second of processor time, which such a load hardly
changes.  Some three minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import numpy as np
import psutil
from numpy.typing import NDArray
from PIL import Image

from data_prep.sharding.dataset import BuildOptions, build_dataset
from data_prep.sources import SOURCES
from data_prep.sources.base import SourceRequest
from data_prep.sources.photos import PHOTOGRAPH_NAMES, read_photograph

JPEG_SIZE = (375, 500)
ONE_WORKER, TWO_WORKERS = "one worker", "two workers"
TimedWork = Callable[[], int]
"""Does some work and returns for how many samples."""


def photograph_cuts(num_cuts: int, size: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """``num_cuts`` different cuts of ``size`` (height, width) from the photographs."""
    folder = Path(_skimage()) / "data"
    photographs = [read_photograph(folder / name) for name in PHOTOGRAPH_NAMES]
    photographs = [
        photograph
        for photograph in photographs
        if photograph.shape[0] > size[0] and photograph.shape[1] > size[1]
    ]
    random = np.random.default_rng(0)
    cuts: list[NDArray[np.uint8]] = []
    for number in range(num_cuts):
        picture = photographs[number % len(photographs)]
        y, x = (int(random.integers(picture.shape[axis] - size[axis])) for axis in (0, 1))
        cuts.append(picture[y : y + size[0], x : x + size[1]])
    return cuts


def write_cifar(root: Path, samples: int) -> None:
    """A CIFAR-10 of real cuts in the official layout."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    cuts = np.stack(photograph_cuts(samples, (32, 32))).transpose(0, 3, 1, 2).reshape(samples, -1)
    each = samples // 5
    for number in range(5):
        rows = cuts[number * each : (number + 1) * each]
        batch = {b"data": rows, b"labels": [row % 10 for row in range(len(rows))]}
        (folder / f"data_batch_{number + 1}").write_bytes(pickle.dumps(batch, protocol=2))
    meta = {b"label_names": [b"%d" % number for number in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))


def write_folder(root: Path, samples: int) -> None:
    """An image folder of 500x375 JPEGs."""
    for number, cut in enumerate(photograph_cuts(samples, JPEG_SIZE)):
        path = root / "train" / f"n{number % 10:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cut).save(path, "JPEG", quality=95)


def sharding_work(source: str, root: Path, scratch: Path, workers: int) -> TimedWork:
    """The whole program but for its command line, into a folder of its own each time."""

    def run() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            splits = SOURCES[source].read(SourceRequest(root, ("train",), has_named_splits=True))
            options = BuildOptions(shard_size=250, workers=workers)
            built = build_dataset(
                splits, Path(out), options, lambda *_: nullcontext(lambda done: None)
            )
        return built[0].manifest.samples

    return run


def decoding_work(root: Path) -> TimedWork:
    """Nothing but what cannot be avoided: read, decode in full, hash."""

    def run() -> int:
        paths = sorted(root.glob("train/*/*"))
        for path in paths:
            data = path.read_bytes()
            Image.open(io.BytesIO(data)).load()
            hashlib.sha256(data).digest()
        return len(paths)

    return run


def encoding_work(samples: int) -> TimedWork:
    """The same of pixels: encode as PNG, hash what went in and what came out."""
    cuts = photograph_cuts(samples, (32, 32))

    def run() -> int:
        for cut in cuts:
            stream = io.BytesIO()
            Image.fromarray(cut).save(stream, "PNG")
            hashlib.sha256(cut.tobytes()).digest()
            hashlib.sha256(stream.getvalue()).digest()
        return len(cuts)

    return run


def measured_rates(
    measures: dict[str, TimedWork], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Samples per second, and per second of this process, of each, measured in turn.

    A first round, which is not counted, warms the caches.
    """
    rates_by_name: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for number in range(rounds + 1):
        for name, timed_work in measures.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            samples = timed_work()
            wall_and_cpu_s = (time.perf_counter() - start, time.process_time() - cpu_start)
            if number:
                rates_by_name[name].append(
                    (samples / wall_and_cpu_s[0], samples / wall_and_cpu_s[1])
                )
        print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return rates_by_name


def print_report(title: str, rates_by_name: dict[str, list[tuple[float, float]]]) -> None:
    """Print a table: median, least and most, and each over the first in the same round."""
    print(f"{title}\n")
    print("| what | images/s, median | least to most | over one worker | /s of processor time |")
    print("|---|---|---|---|---|")
    one_worker_rates = [rate for rate, _ in next(iter(rates_by_name.values()))]
    for name, values in rates_by_name.items():
        wall_rates = [rate for rate, _ in values]
        ratio = statistics.median(
            rate / one_worker_rate
            for rate, one_worker_rate in zip(wall_rates, one_worker_rates, strict=True)
        )
        # What worker processes spend is not this process's.
        cpu_rate_text = (
            f"{statistics.median(rate for _, rate in values):,.0f}" if name != TWO_WORKERS else ""
        )
        spread = f"{min(wall_rates):,.0f} to {max(wall_rates):,.0f}"
        print(
            f"| {name} | {statistics.median(wall_rates):,.0f} | {spread} | {ratio:.2f} | "
            f"{cpu_rate_text} |"
        )
    print()


def main() -> None:
    """Measure and print."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--small", type=int, default=20_000, help="CIFAR-sized samples")
    top.add_argument("--full", type=int, default=2_000, help="500x375 samples")
    args = top.parse_args()
    print(f"{psutil.cpu_count()} cores, load {psutil.getloadavg()[0]:.1f}, {args.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as scratch:
        scratch_folder = Path(scratch)
        write_cifar(scratch_folder / "small", args.small)
        small_work = sharding_works("cifar10", scratch_folder / "small", scratch_folder)
        small_work["encode and hash alone"] = encoding_work(args.small)
        print_report(
            f"{args.small:,} images of 32x32 pixels", measured_rates(small_work, args.rounds)
        )
        write_folder(scratch_folder / "full", args.full)
        full_work = sharding_works("imagefolder", scratch_folder / "full", scratch_folder)
        full_work["decode and hash alone"] = decoding_work(scratch_folder / "full")
        sizes = [path.stat().st_size for path in (scratch_folder / "full").glob("train/*/*")]
        title = f"{args.full:,} JPEGs of 500x375 pixels, {statistics.mean(sizes) / 1e3:.0f} kB each"
        print_report(title, measured_rates(full_work, args.rounds))


def sharding_works(source: str, root: Path, scratch: Path) -> dict[str, TimedWork]:
    """Sharding by one worker and by two."""
    return {
        ONE_WORKER: sharding_work(source, root, scratch, 1),
        TWO_WORKERS: sharding_work(source, root, scratch, 2),
    }


def _skimage() -> str:
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image is needed")
    return str(Path(spec.origin).parent)


if __name__ == "__main__":
    main()
