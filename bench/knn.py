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
from vssl_dist.evaluation.scores.knn import knn_accuracy_grid
from vssl_dist.evaluation.scores.neighbours import find_neighbours
from vssl_dist.evaluation.scores.table import LabelledFeatures

NeighbourSearch = Callable[[Tensor, Tensor, int], Tensor]
_CHUNK_QUERIES = 8192
_KS = (1, 5, 10, 20, 50, 100, 200)
_TEMPERATURES = (0.01, 0.03, 0.07, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class ProblemSize:
    """Numbers of bank features and of queries, and their width."""

    bank_size: int
    num_queries: int
    feature_width: int

    def draw_features(self) -> tuple[Tensor, Tensor]:
        """Draw a bank ``(N, D)`` and queries ``(M, D)``, float32, always the same."""
        generator = torch.Generator().manual_seed(0)
        bank, queries = (
            torch.randn(n, self.feature_width, generator=generator)
            for n in (self.bank_size, self.num_queries)
        )
        return bank, queries


def our_search(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Search as the evaluation does."""
    return find_neighbours(bank, queries, k, _CHUNK_QUERIES)[1]


def full_product_search(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Compute the whole matrix of similarities and take the largest of each row."""
    similarities = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    return similarities.topk(k, dim=1)[1]


def faiss_search(bank: Tensor, queries: Tensor, k: int) -> Tensor:
    """Search a flat index of inner products with faiss."""
    import faiss

    index = faiss.IndexFlatIP(bank.shape[1])
    index.add(F.normalize(bank, dim=1).numpy())
    return torch.from_numpy(index.search(F.normalize(queries, dim=1).numpy(), k)[1])


def searches_by_name() -> dict[str, NeighbourSearch]:
    """List the searches by name, ours first; faiss where the extra ``compare`` is installed."""
    searches: dict[str, NeighbourSearch] = {"ours": our_search, "naive": full_product_search}
    return searches | ({"faiss": faiss_search} if find_spec("faiss") else {})


def measure_seconds(size: ProblemSize, k: int, rounds: int) -> dict[str, list[float]]:
    """Measure the seconds of each contestant in each round.

    Raises:
        RuntimeError: They disagree by more than what rounding swaps.
    """
    bank, queries = size.draw_features()
    searches = searches_by_name()
    indices_by_name = {
        name: search(bank, queries, k).sort(dim=1)[0] for name, search in searches.items()
    }
    for name, index in indices_by_name.items():
        agreement = float((index == indices_by_name["ours"]).float().mean())
        if agreement < 0.99:
            raise RuntimeError(
                f"{name} finds other neighbours: {100 * agreement:.1f} % are the same"
            )
    seconds_by_name: dict[str, list[float]] = {name: [] for name in searches}
    for round_index in range(rounds):
        # Each round begins with another one, so that none is always the first.
        names = list(searches)
        first_index = round_index % len(names)
        for name in names[first_index:] + names[:first_index]:
            start = time.perf_counter()
            searches[name](bank, queries, k)
            seconds_by_name[name].append(time.perf_counter() - start)
    return seconds_by_name


def table_row(size: ProblemSize, k: int, seconds: dict[str, list[float]]) -> str:
    """Write a row of the table: best seconds, and each contestant's time over ours."""
    cells = []
    for contestant_seconds in seconds.values():
        ratio = statistics.median(
            contestant_s / our_s
            for contestant_s, our_s in zip(contestant_seconds, seconds["ours"], strict=True)
        )
        cells.append(f"{min(contestant_seconds):.2f} s ({ratio:.2f} x)")
    label = f"{size.bank_size:,} x {size.feature_width:,}, {size.num_queries:,} queries, k = {k}"
    return f"| {label} | {' | '.join(cells)} |"


@dataclass(frozen=True)
class SearchCost:
    """The cost of a search, split so that it tells that of any number of queries."""

    bank_pass_s: float
    """Seconds to read the bank once, for up to 8,192 queries."""
    query_s: float
    """Seconds per query."""
    peak_gib: float
    """Most memory of the process, pages of the mapped bank included."""

    def total_s(self, queries: int) -> float:
        """Extrapolate the seconds for so many queries."""
        return math.ceil(queries / _CHUNK_QUERIES) * self.bank_pass_s + queries * self.query_s


def write_bank(path: Path, size: ProblemSize) -> LabelledFeatures:
    """Write a bank of random float16 features and map it into memory."""
    generator = torch.Generator().manual_seed(0)
    bank_memmap = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(size.bank_size, size.feature_width)
    )
    for start in range(0, size.bank_size, _CHUNK_QUERIES):
        rows = bank_memmap[start : start + _CHUNK_QUERIES]
        rows[:] = torch.randn(rows.shape, generator=generator).half().numpy()
    bank_memmap.flush()
    del bank_memmap
    mapped_features = torch.from_numpy(np.load(path, mmap_mode="c"))
    return LabelledFeatures(mapped_features, torch.arange(size.bank_size) % 1000)


def measure_scale(bank: LabelledFeatures, slice_sizes: tuple[int, int]) -> SearchCost:
    """Time the whole grid of k and temperatures for two slices of queries, the smaller first."""
    generator = torch.Generator().manual_seed(1)
    seconds = []
    for count in slice_sizes:
        queries = torch.randn(count, bank.features.shape[1], generator=generator)
        start = time.perf_counter()
        knn_accuracy_grid(
            bank,
            LabelledFeatures(queries, torch.arange(count) % 1000),
            _KS,
            _TEMPERATURES,
        )
        seconds.append(time.perf_counter() - start)
    # Two points of a line: its slope is the cost of a query, its intercept that of the bank.
    query_s = max(seconds[1] - seconds[0], 0.0) / (slice_sizes[1] - slice_sizes[0])
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return SearchCost(max(seconds[0] - slice_sizes[0] * query_s, 0.0), query_s, peak_gib)


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
        _report_scale(args)
        return
    if find_spec("faiss"):
        import faiss as library

        library.omp_set_num_threads(args.threads)
    names = list(searches_by_name())
    print(f"Threads: {args.threads}, rounds: {args.rounds}; best time (median ratio to ours).\n")
    print(f"| features | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for bank, width in ((b, w) for b in args.bank for w in args.width):
        size = ProblemSize(bank, args.queries, width)
        for k in args.k:
            print(table_row(size, k, measure_seconds(size, k, args.rounds)), flush=True)


def _report_scale(args: argparse.Namespace) -> None:
    size = ProblemSize(args.scale_bank, args.scale_queries[1], max(args.width))
    with tempfile.TemporaryDirectory(dir=args.scale) as folder:
        bank = write_bank(Path(folder, "bank.npy"), size)
        scale = measure_scale(bank, (args.scale_queries[0], args.scale_queries[1]))
    print(
        f"{size.bank_size:,} x {size.feature_width:,} float16 "
        f"({size.bank_size * size.feature_width * 2 / 2**30:.2f} GiB), "
        f"{len(_KS)} k x {len(_TEMPERATURES)} temperatures, threads: {args.threads}\n"
        f"reading the bank {scale.bank_pass_s:.1f} s, a query {1000 * scale.query_s:.1f} ms, "
        f"peak memory {scale.peak_gib:.2f} GiB (the mapped bank included)\n"
        f"50,000 queries: {scale.total_s(50_000) / 60:.0f} minutes (extrapolated from "
        f"{args.scale_queries[0]} and {args.scale_queries[1]} queries)"
    )


if __name__ == "__main__":
    main()
