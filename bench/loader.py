"""How fast images become two 224-pixel views, beside the usual ways of doing it.

``python -m bench.loader`` prints images per second (an image is two views) of this project's
loader with its DALI and its reference backend, of torchvision's ImageFolder in a DataLoader and
of webdataset in a WebLoader, the last two with torchvision's v2 transforms, and once more with
Pillow's blur in place of torchvision's.  All read the same JPEGs, run the same recipe, are held
to the same cores and are measured in turn, round by round, so that a load on the machine falls on
all alike; ratios are of one round and then their median.  Decoding alone with DALI is the
ceiling.  A second table says where this project's time goes, a third what a long run does to its
memory.  Some four minutes on two cores.

With ``--device cuda`` also: decoding alone with the settings of this project's backend, training
steps of configs/in1k_vje.yaml on views that lie ready, and how busy the GPU is (needs
nvidia-ml-py, and turns of several seconds: ``--batch 256 --batches 100 --cores 16``).

The JPEGs are 500x375 cuts of scikit-image's photographs, or those of the folder ``--images``.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import psutil
import torch

from bench.loader_gpu import Busy, steps
from bench.loader_memory import MARKS, family, long_run
from bench.loader_ours import STREAMS, ours, report_stages, run_config, stages
from bench.loader_peers import Batches, TwoViews, decoding, imagefolder, tars
from bench.shard import write_folder
from data_prep.shard import positive_int
from data_prep.sharding.dataset import BuildOptions, build_dataset
from data_prep.sources import SOURCES
from data_prep.sources.base import Request
from vssl_dist import config
from vssl_dist.config.paths import path_argument
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.data.store.manifest import read_manifest
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS

CONSUMER = Path(__file__).parents[1] / "configs" / "in1k_vje.yaml"
DRAINED = 6
"""Batches that may lie ready when a turn begins: more than any of them keeps."""
RESTING_S = 0.03
"""Processor time in ten times as long that is none."""


class Turn(NamedTuple):
    """What one contestant did in one round."""

    rate: float
    """Images per second."""
    busy: float
    """Percent of the time in which the GPU was at work; not a number where there is none."""


def training(args: argparse.Namespace) -> Batches:
    """Training steps that wait for no data."""
    overrides = [f"optim.global_batch={args.batch}", "data.streams=1"]
    return steps(config.load(CONSUMER, overrides, methods=CONFIGS), args.device)


def contestants(
    root: Path, shards: Path, args: argparse.Namespace
) -> dict[str, Callable[[], Batches]]:
    """Who takes part; the first one is compared with all."""
    batch, cores, device = args.batch, args.cores, args.device
    own = partial(run_config, shards, batch=batch, cores=cores)
    decode = partial(decoding, shards, batch, cores, device)
    found: dict[str, Callable[[], Batches]] = {
        "vssl-dist, DALI": lambda: ours(own(backend="dali"), device),
        "vssl-dist, reference": lambda: ours(own(backend="reference"), device),
    }
    for told, pillow in (("", False), (", Pillow's blur", True)):
        views = TwoViews(pillow)
        folder = partial(imagefolder, root / "train", views, batch, cores, device)
        found[f"ImageFolder + DataLoader{told}"] = folder
        found[f"webdataset + WebLoader{told}"] = partial(tars, shards, views, batch, cores)
    found["DALI, decode alone"] = decode
    if device == "cuda":
        found["DALI, decode alone, on no JPEG engine"] = partial(decode, engine=False)
        found[f"steps of {CONSUMER.stem}, no data"] = lambda: training(args)
    return found


def start(
    makers: dict[str, Callable[[], Batches]],
) -> tuple[dict[str, Batches], dict[str, float]]:
    """Every contestant with its workers running and caches warm, and the MiB that it took."""
    running, taken = {}, {}
    for name, make in makers.items():
        before = family()
        running[name] = make()
        for _ in islice(running[name], 2 * DRAINED):
            pass
        taken[name] = family() - before
        print(f"{name} runs", file=sys.stderr, flush=True)
    return running, taken


def measure(running: dict[str, Batches], args: argparse.Namespace) -> dict[str, list[Turn]]:
    """All contestants in turn; what lies ready is drained before the clock starts."""
    found: dict[str, list[Turn]] = {name: [] for name in running}
    for number in range(args.rounds):
        for name, batches in running.items():
            settle()
            for _ in islice(batches, DRAINED):
                pass
            found[name].append(turn(batches, args))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return found


def turn(batches: Batches, args: argparse.Namespace) -> Turn:
    """One contestant against the clock."""
    on_gpu = args.device == "cuda"
    with Busy(torch.cuda.utilization) if on_gpu else nullcontext() as busy:
        start = time.perf_counter()
        for _ in islice(batches, args.batches):
            pass
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return Turn(args.batches * args.batch / seconds, busy.percent if busy else math.nan)


def settle() -> None:
    """Wait until nobody's workers are at it: after their turn they fill their queues again."""
    here = psutil.Process()
    everybody = [here, *here.children(recursive=True)]
    spent = -math.inf
    while True:
        now = sum(sum(process.cpu_times()[:2]) for process in everybody)
        if now - spent < RESTING_S:
            return
        spent = now
        time.sleep(10 * RESTING_S)


def report(found: dict[str, list[Turn]], taken: dict[str, float]) -> None:
    """Print who was how fast, with what."""
    own = next(iter(found.values()))
    print(
        "| loader | images/s, median | least to most | vssl-dist is faster by, median | "
        "GPU at work | MiB of the host |\n|---|---|---|---|---|---|"
    )
    for name, turns in found.items():
        rates = [each.rate for each in turns]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ratio = statistics.median(
            mine.rate / theirs for mine, theirs in zip(own, rates, strict=True)
        )
        busy = statistics.median(each.busy for each in turns)
        at_work = "" if math.isnan(busy) else f"{busy:.0f} %"
        print(
            f"| {name} | {statistics.median(rates):,.0f} | {spread} | {ratio:.2f} x | {at_work} | "
            f"{taken[name]:,.0f} |"
        )


def shard(root: Path, out: Path) -> Path:
    """The image folder as shards; the train folder of them."""
    splits = SOURCES["imagefolder"].read(Request(root, ("train",), explicit=True))
    build_dataset(
        splits, out, BuildOptions(shard_size=250), lambda *_: nullcontext(lambda done: None)
    )
    return out / "train"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--images", type=path_argument, help="image folder, with a folder train in it")
    top.add_argument("--samples", type=positive_int, default=1000, help="of the photographs' cuts")
    top.add_argument("--batch", type=positive_int, default=32)
    top.add_argument("--batches", type=positive_int, default=12, help="of one turn")
    top.add_argument("--rounds", type=positive_int, default=5)
    top.add_argument("--long", type=positive_int, default=10_000, help="batches of the third table")
    top.add_argument("--cores", type=positive_int, default=2, help="that everybody is held to")
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    return top


def photographs(scratch: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """The images as a folder and as shards.

    Raises:
        ConfigError, DataError: They, or a GPU, are not there, or are too few.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device")
    if args.long < 2 * MARKS:
        raise ConfigError(f"--long {args.long}: must be at least {2 * MARKS}")
    if args.batch % STREAMS:
        raise ConfigError(f"--batch {args.batch}: must be a multiple of {STREAMS}")
    root = args.images or scratch / "images"
    if args.images is None:
        write_folder(root, args.samples)
    elif not (root / "train").is_dir():
        raise ConfigError(f"--images {root}: has no folder train with a folder per class")
    shards = shard(root, scratch / "shards")
    if (there := read_manifest(shards).samples) < args.batch * args.cores:
        raise ConfigError(f"--batch {args.batch}: {args.cores} workers share {there} images only")
    return root, shards


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 0, 2 (refused) or 130 (Ctrl-C)."""
    args = parser().parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(args.cores)
    with tempfile.TemporaryDirectory() as scratch, end_in_one_line(args.images or Path()) as ending:
        root, shards = photographs(Path(scratch), args)
        running, taken = start(contestants(root, shards, args))
        found = measure(running, args)
        running.clear()
        gc.collect()  # ends threads and workers before their files go
        print(
            f"{args.rounds} rounds of {args.batches} batches of {args.batch} images, "
            f"{args.cores} of {psutil.cpu_count()} cores, {args.device}, load "
            f"{psutil.getloadavg()[0]:.1f}\n"
        )
        report(found, taken)
        cfg = run_config(shards, batch=args.batch, cores=args.cores)
        report_stages(stages(cfg, args.batches, args.device))
        long_run(Path(scratch), args.long)
    return ending.exit_code


if __name__ == "__main__":
    sys.exit(main())
