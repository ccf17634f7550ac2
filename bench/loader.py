"""How fast images become two 224-pixel views, beside the usual ways of doing it.

``python -m bench.loader`` prints images per second (an image is two views) of this project's
loader with its DALI and its reference backend, of torchvision's ImageFolder in a DataLoader and
of webdataset in a WebLoader, the last two with torchvision's v2 transforms.  All read the same
JPEGs, run the same recipe, have the same number of cores and are measured in turn, round by
round, so that a load on the machine falls on all alike.  Decoding alone with DALI is the ceiling.
A second table says where this project's time goes.

The JPEGs are 500x375 cuts of the photographs of scikit-image, or those of ``--images``, an
image folder.
"""

from __future__ import annotations

import argparse
import gc
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

from bench.loader_peers import RECIPE, SIDE, Batches, decoding, imagefolder, tars
from bench.shard import write_folder
from data_prep.build import Options, build_all
from data_prep.sources import SOURCES
from data_prep.split import Request
from vssl_dist.config import RunConfig
from vssl_dist.data.backend import BackendSpec
from vssl_dist.data.backends import build_backend
from vssl_dist.data.loader import build_loader
from vssl_dist.data.plan import Plan
from vssl_dist.data.shards import Dataset
from vssl_dist.data.views import draw
from vssl_dist.methods import CONFIGS

DRAINED = 8
"""Batches that may lie ready when a turn begins: more than any of them keeps."""


def run_config(shards: Path, args: argparse.Namespace, backend: str) -> RunConfig:
    """A run of one rank over the shards."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "method": CONFIGS["vje"](),
            "data": {
                "train": str(shards),
                "image_size": SIDE,
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
    spent = dict.fromkeys(("plan", "read and crc32", "draw", "decode and render"), 0.0)

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        spent[stage] += time.perf_counter() - start
        return result

    for number in range(args.batches + 1):
        at = number * plan.micro_batch
        ids, epochs = timed("plan", lambda at=at: plan.micro_batch_ids(at, 0, 1))
        samples = timed("read and crc32", lambda ids=ids: dataset.read_checked(ids))
        sizes = np.stack([samples.height, samples.width], axis=1)
        draws = [
            timed("draw", lambda v=v, r=r: draw(r, 0, v, ids, epochs, sizes))  # noqa: B023
            for v, r in enumerate(data.views)
        ]
        timed("decode and render", lambda: backend(samples, draws))  # noqa: B023
        if number == 0:  # the first batch builds the pipeline
            spent = dict.fromkeys(spent, 0.0)
    return spent


def report(found: dict[str, list[float]], spent: dict[str, float], memory: str) -> None:
    """Print both tables."""
    base = statistics.median(found["vssl-dist, DALI"])
    print("| loader | images/s, median | least to most | vssl-dist is faster by |")
    print("|---|---|---|---|")
    for name, rates in found.items():
        middle = statistics.median(rates)
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        print(f"| {name} | {middle:,.0f} | {spread} | {base / middle:.2f} x |")
    whole = sum(spent.values())
    print("\n| stage of vssl-dist, DALI | share of its time |\n|---|---|")
    for stage, seconds in spent.items():
        print(f"| {stage} | {seconds / whole:.2%} |")
    print(f"\n{memory}")


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
    top.add_argument("--batch", type=int, default=64)
    top.add_argument("--batches", type=int, default=8, help="of one turn")
    top.add_argument("--rounds", type=int, default=5)
    top.add_argument("--cores", type=int, default=2, help="threads or worker processes")
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = top.parse_args()
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
        process = psutil.Process()
        before = process.memory_info().rss
        found = measure(contestants, args, args.rounds)
        grown = (process.memory_info().rss - before) / 2**20
        contestants.clear()
        gc.collect()  # ends threads and workers before their files go
        memory = f"This process grew by {grown:.0f} MiB in {args.rounds} rounds."
        report(found, stages(shards, args), memory)


if __name__ == "__main__":
    main()
