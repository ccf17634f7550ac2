"""How fast images become two 224-pixel views, beside the usual ways of doing it.

``python -m bench.loader`` prints images per second (an image is two views) of this project's
loader with its DALI and its reference backend, of torchvision's ImageFolder in a DataLoader and
of webdataset in a WebLoader, the last two with torchvision's v2 transforms.  All read the same
JPEGs, run the same recipe, have the same number of cores and are measured in turn, round by
round, so that a load on the machine falls on all alike; ratios are of one round and then their
median.  Decoding alone with DALI is the ceiling.  A second table says where this project's time
goes, a third what a long run does to its memory.  Some three minutes on two cores.

The JPEGs are 500x375 cuts of the photographs of scikit-image, or those of ``--images``, an
image folder.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bench.loader_memory import resident, slope
from bench.loader_peers import RECIPE, SIDE, Batches, decoding, imagefolder, tars
from bench.shard import write_cifar, write_folder
from data_prep.build import Options, build_all
from data_prep.sources import SOURCES
from data_prep.split import Request
from vssl_dist.config import RunConfig
from vssl_dist.data.backend import BackendSpec
from vssl_dist.data.backends import build_backend
from vssl_dist.data.loader import build_loader
from vssl_dist.data.plan import Plan
from vssl_dist.data.shards import Dataset, Samples
from vssl_dist.data.substitution import read_decodable
from vssl_dist.data.views import draw
from vssl_dist.methods.vje import VJEConfig

READ = "read and check"
DRAINED = 6
"""Batches that may lie ready when a turn begins: more than any of them keeps."""
RESTING_S = 0.03
"""Processor time in ten times as long that is none."""


def run_config(shards: Path, args: argparse.Namespace, backend: str) -> RunConfig:
    """A run of one rank over the shards."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "method": VJEConfig(),
            "data": {
                "train": str(shards),
                "image_size": args.side,
                "views": [RECIPE, RECIPE],
                "streams": 4,
                "window": 256,
                "threads": args.cores,
                "backend": backend,
            },
            "optim": {"base_lr": 0.1, "epochs": 1, "global_batch": args.batch},
        }
    )


def ours(shards: Path, args: argparse.Namespace, backend: str) -> Batches:
    """This project's loader."""
    cfg = run_config(shards, args, backend)
    return iter(build_loader(cfg, rank=0, world_size=1, device=args.device))


def measure(
    contestants: dict[str, Batches], args: argparse.Namespace, rounds: int
) -> dict[str, list[float]]:
    """Images per second of each, in turn; what lies ready is drained before the clock starts."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name, batches in contestants.items():
            settle()
            for _ in islice(batches, DRAINED):
                pass
            start = time.perf_counter()
            for _ in islice(batches, args.batches):
                pass
            if args.device == "cuda":
                torch.cuda.synchronize()
            found[name].append(args.batches * args.batch / (time.perf_counter() - start))
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return found


def settle() -> None:
    """Wait until nobody's workers are at it: after their turn they fill their queues again."""
    here = psutil.Process()
    family = [here, *here.children(recursive=True)]
    spent = -math.inf
    while True:
        now = sum(sum(process.cpu_times()[:2]) for process in family)
        if now - spent < RESTING_S:
            return
        spent = now
        time.sleep(10 * RESTING_S)


def stages(shards: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds that each stage of this project's loader takes, one after the other."""
    cfg, dataset = run_config(shards, args, "dali"), Dataset.open(shards)
    data, optim = cfg.data, cfg.optim
    plan = Plan(
        dataset.shard_sizes,
        seed=0,
        streams=data.streams,
        window=data.window,
        global_batch=optim.global_batch,
        accumulate=1,
    )
    spec = BackendSpec(data.views, SIDE, data.normalise, data.threads, args.device)
    backend = build_backend("dali", spec)
    spent: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - start
        return result

    def shown(at: int) -> None:
        ids, epochs = timed("plan", lambda: plan.micro_batch_ids(at, 0, 1))

        def render(samples: Samples) -> list[torch.Tensor]:
            sizes = np.stack([samples.height, samples.width], axis=1)
            views = list(enumerate(data.views))
            draws = timed("draw", lambda: [draw(r, 0, v, ids, epochs, sizes) for v, r in views])
            made: list[torch.Tensor] = timed("decode and render", lambda: backend(samples, draws))
            return made

        timed(READ, lambda: read_decodable(dataset, ids, render))

    for number in range(args.batches + 1):
        if number == 1:  # the batch before has built the pipeline
            spent.clear()
        shown(number * plan.micro_batch)
    spent[READ] -= spent["draw"] + spent["decode and render"]
    return spent


def report(found: dict[str, list[float]], spent: dict[str, float]) -> None:
    """Print two tables."""
    own = next(iter(found.values()))
    print("| loader | images/s, median | least to most | vssl-dist is faster by, median |")
    print("|---|---|---|---|")
    for name, rates in found.items():
        middle = statistics.median(rates)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ratio = statistics.median(mine / theirs for mine, theirs in zip(own, rates, strict=True))
        print(f"| {name} | {middle:,.0f} | {spread} | {ratio:.2f} x |")
    whole = sum(spent.values())
    print("\n| stage of vssl-dist, DALI | share of its time |\n|---|---|")
    for stage, seconds in spent.items():
        print(f"| {stage} | {seconds / whole:.2%} |")
    around = 1 - spent["decode and render"] / whole
    print(f"| all but decoding and rendering | {around:.2%} |")


def memory(scratch: Path, batches: int) -> None:
    """Print what so many small batches do to the memory of a process with our loader."""
    write_cifar(scratch / "small", 2000)
    splits = SOURCES["cifar10"].read(Request(scratch / "small", ("train",), explicit=True))
    options = Options(shard_size=250)
    build_all(splits, scratch / "shards32", options, lambda *_: nullcontext(lambda done: None))
    small = argparse.Namespace(batch=8, cores=1, device="cpu", side=32)
    found = resident(ours(scratch / "shards32" / "train", small, "dali"), batches)
    print(f"\n| batches of {small.batch} CIFAR-sized images | MiB resident |\n|---|---|")
    for done, mib in found:
        print(f"| {done:,} | {mib:,.1f} |")
    kept = found[len(found) // 2 :]
    print(f"\nThe second half grows by {slope(kept):,.0f} bytes per batch.")


def shard(root: Path, out: Path) -> Path:
    """The image folder as shards; the train folder of them."""
    splits = SOURCES["imagefolder"].read(Request(root, ("train",), explicit=True))
    build_all(splits, out, Options(shard_size=250), lambda *_: nullcontext(lambda done: None))
    return out / "train"


def main() -> None:
    """Measure and print."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--images", type=Path, help="image folder, with a folder train in it")
    top.add_argument("--samples", type=int, default=1000, help="of the photographs' cuts")
    top.add_argument("--batch", type=int, default=32)
    top.add_argument("--batches", type=int, default=12, help="of one turn")
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--long", type=int, default=10_000, help="batches of the third table")
    top.add_argument("--cores", type=int, default=2, help="threads or worker processes")
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = top.parse_args()
    args.side = SIDE
    torch.set_num_threads(args.cores)
    with tempfile.TemporaryDirectory() as scratch:
        root = args.images or Path(scratch) / "images"
        if args.images is None:
            write_folder(root, args.samples)
        shards = shard(root, Path(scratch) / "shards")
        contestants = {
            "vssl-dist, DALI": ours(shards, args, "dali"),
            "vssl-dist, reference": ours(shards, args, "reference"),
            "ImageFolder + DataLoader": imagefolder(
                root / "train", args.batch, args.cores, args.device
            ),
            "webdataset + WebLoader": tars(shards, args.batch, args.cores),
            "DALI, decode alone": decoding(shards, args.batch, args.cores, args.device),
        }
        measure(contestants, args, rounds=1)  # warms caches, workers and pipelines
        found = measure(contestants, args, args.rounds)
        contestants.clear()
        gc.collect()  # ends threads and workers before their files go
        print(
            f"{args.rounds} rounds of {args.batches} batches of {args.batch} images, "
            f"{args.cores} of {psutil.cpu_count()} cores, {args.device}, load "
            f"{psutil.getloadavg()[0]:.1f}\n"
        )
        report(found, stages(shards, args))
        memory(Path(scratch), args.long)


if __name__ == "__main__":
    main()
