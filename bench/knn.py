"""Our search of nearest neighbours beside faiss and the plain product, and at ImageNet's size.

From features as they are, normalised or not, to the neighbours of every query: what each of them
needs for that is counted.  The contestants take turns on the same cores; a ratio is the median
over the rounds of their time over ours.

    python bench/knn.py --threads 1
    python bench/knn.py --scale /scratch --threads 2

The second writes a bank of 1,281,167 x 2,048 float16 numbers (5.3 GB) into the folder, searches it
for a slice of 50,000 queries and deletes it.
"""

from __future__ import annotations

import argparse
import math
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vssl_dist.config.paths import path_argument
from vssl_dist.evaluation.scores.knn import knn_grid
from vssl_dist.evaluation.scores.neighbours import neighbours
from vssl_dist.evaluation.scores.table import Features

Search = Callable[[Tensor, Tensor, int], Tensor]
_CHUNK = 8192
_KS, _TEMPERATURES = (1, 5, 10, 20, 50, 100, 200), (0.01, 0.03, 0.07, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Size:
    """How much is searched for how much."""

    bank: int
    queries: int
    width: int

    def features(self) -> tuple[Tensor, Tensor]:
        """Random bank ``(N, D)`` and queries ``(M, D)``, float32, always the same."""
        random = torch.Generator().manual_seed(0)
        bank, queries = (
            torch.randn(n, self.width, generator=random) for n in (self.bank, self.queries)
        )
        return bank, queries


def ours(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """What the evaluation does."""
    return neighbours(bank, queries, k, _CHUNK)[1]


def naive(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """The whole matrix of similarities, and the largest of each row."""
    product = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return product.topk(k, dim=1)[1]


def faiss(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """A flat index of inner products."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank, dim=1).numpy())
    return torch.from_numpy(index.search(F.normalize(queries, dim=1).numpy(), k)[1])


def contestants() -> dict[str, Search]:
    """By name, ours first; faiss where the extra ``compare`` is installed."""
    found: dict[str, Search] = {"ours": ours, "naive": naive}
    return found | ({"faiss": faiss} if find_spec("faiss") else {})


def compare(size: Size, k: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round.

    Raises:
        RuntimeError: They disagree by more than what rounding swaps.
    """
    bank, queries = size.features()
    searches = contestants()
    found = {name: search(bank, queries, k).sort(dim=1)[0] for name, search in searches.items()}
    for name, index in found.items():
        same = float((index == found["ours"]).float().mean())
        if same < 0.99:
            raise RuntimeError(f"{name} finds other neighbours: {100 * same:.1f} % are the same")
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    for turn in range(rounds):
        order = list(searches)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            start = time.perf_counter()
            searches[name](bank, queries, k)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def line(size: Size, k: int, seconds: dict[str, list[float]]) -> str:
    """A row of the table: best seconds, and each one's time over ours."""
    cells = []
    for times in seconds.values():
        ratio = statistics.median(
            theirs / mine for theirs, mine in zip(times, seconds["ours"], strict=True)
        )
        cells.append(f"{min(times):.2f} s ({ratio:.2f} x)")
    named = f"{size.bank:,} x {size.width:,}, {size.queries:,} queries, k = {k}"
    return f"| {named} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class Scale:
    """What a slice of the queries cost, and what all would."""

    fixed_s: float
    """Reading the bank once, for up to 8,192 queries."""
    query_s: float
    peak_gib: float
    """Most memory of the process, pages of the mapped bank included."""

    def total_s(self, queries: int) -> float:
        """Seconds for so many queries."""
        return math.ceil(queries / _CHUNK) * self.fixed_s + queries * self.query_s


def bank_file(path: Path, size: Size) -> Features:
    """Write a bank of random float16 features and map it into memory."""
    random = torch.Generator().manual_seed(0)
    stored = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(size.bank, size.width)
    )
    for start in range(0, size.bank, _CHUNK):
        rows = stored[start : start + _CHUNK]
        rows[:] = torch.randn(rows.shape, generator=random).half().numpy()
    stored.flush()
    del stored
    mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
    return Features(mapped, torch.arange(size.bank) % 1000)


def scale(bank: Features, slices: tuple[int, int]) -> Scale:
    """The whole grid of k and temperatures for two slices of the queries, the smaller first."""
    random = torch.Generator().manual_seed(1)
    seconds = []
    for count in slices:
        queries = torch.randn(count, bank.features.shape[1], generator=random)
        start = time.perf_counter()
        knn_grid(bank, Features(queries, torch.arange(count) % 1000), _KS, _TEMPERATURES)
        seconds.append(time.perf_counter() - start)
    each = max(seconds[1] - seconds[0], 0.0) / (slices[1] - slices[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Scale(max(seconds[0] - slices[0] * each, 0.0), each, peak)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bank", type=int, nargs="+", default=[50_000])
    parser.add_argument("--width", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--k", type=int, nargs="+", default=[20, 200])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--scale", type=path_argument, metavar="FOLDER", help="for a bank in this folder"
    )
    parser.add_argument("--scale-bank", type=int, default=1_281_167)
    parser.add_argument("--scale-queries", type=int, nargs=2, default=[128, 640])
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.scale:
        _scale(args)
        return
    if find_spec("faiss"):
        import faiss as library

        library.omp_set_num_threads(args.threads)
    names = list(contestants())
    print(f"Threads: {args.threads}, rounds: {args.rounds}; best time (median ratio to ours).\n")
    print(f"| features | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for bank, width in ((b, w) for b in args.bank for w in args.width):
        size = Size(bank, args.queries, width)
        for k in args.k:
            print(line(size, k, compare(size, k, args.rounds)), flush=True)


def _scale(args: argparse.Namespace) -> None:
    size = Size(args.scale_bank, args.scale_queries[1], max(args.width))
    with tempfile.TemporaryDirectory(dir=args.scale) as folder:
        bank = bank_file(Path(folder, "bank.npy"), size)
        found = scale(bank, (args.scale_queries[0], args.scale_queries[1]))
    print(
        f"{size.bank:,} x {size.width:,} float16 ({size.bank * size.width * 2 / 2**30:.2f} GiB), "
        f"{len(_KS)} k x {len(_TEMPERATURES)} temperatures, threads: {args.threads}\n"
        f"reading the bank {found.fixed_s:.1f} s, a query {1000 * found.query_s:.1f} ms, "
        f"peak memory {found.peak_gib:.2f} GiB (the mapped bank included)\n"
        f"50,000 queries: {found.total_s(50_000) / 60:.0f} minutes (extrapolated from "
        f"{args.scale_queries[0]} and {args.scale_queries[1]} queries)"
    )


if __name__ == "__main__":
    main()
