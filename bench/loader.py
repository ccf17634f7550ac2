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

from bench.loader_gpu import BusyMonitor, endless_training_steps
from bench.loader_memory import NUM_MARKS, print_long_run, process_tree_mib
from bench.loader_ours import (
    NUM_STREAMS,
    our_batches,
    print_stage_shares,
    run_config,
    stage_seconds,
)
from bench.loader_peers import (
    Batches,
    TwoViews,
    decoded_batches,
    imagefolder_batches,
    webdataset_batches,
)
from bench.shard import write_folder
from data_prep.shard import positive_int
from data_prep.sharding.dataset import BuildOptions, build_dataset
from data_prep.sources import SOURCES
from data_prep.sources.base import SourceRequest
from vssl_dist import config
from vssl_dist.config.paths import path_argument
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.data.store.manifest import read_manifest
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS

TRAINING_CONFIG = Path(__file__).parents[1] / "configs" / "in1k_vje.yaml"
NUM_DRAINED_BATCHES = 6
"""Batches that may lie ready when a turn begins: more than any of them keeps."""
MAX_IDLE_CPU_S = 0.03
"""Processor time in ten times as long that is none."""


class TurnResult(NamedTuple):
    """What one contestant did in one round."""

    images_per_s: float
    """Images per second."""
    gpu_busy_percent: float
    """Percent of the time in which the GPU was at work; not a number where there is none."""


def training_steps(args: argparse.Namespace) -> Batches:
    """Training steps that wait for no data."""
    overrides = [f"optim.global_batch={args.batch}", "data.streams=1"]
    return endless_training_steps(
        config.load(TRAINING_CONFIG, overrides, methods=CONFIGS), args.device
    )


def contestant_makers(
    root: Path, shards: Path, args: argparse.Namespace
) -> dict[str, Callable[[], Batches]]:
    """Who takes part; the first one is compared with all."""
    batch, cores, device = args.batch, args.cores, args.device
    our_run_config = partial(run_config, shards, batch=batch, cores=cores)
    decoding_only = partial(decoded_batches, shards, batch, cores, device)
    makers: dict[str, Callable[[], Batches]] = {
        "vssl-dist, DALI": lambda: our_batches(our_run_config(backend="dali"), device),
        "vssl-dist, reference": lambda: our_batches(our_run_config(backend="reference"), device),
    }
    for name_suffix, uses_pillow_blur in (("", False), (", Pillow's blur", True)):
        views = TwoViews(uses_pillow_blur)
        folder = partial(imagefolder_batches, root / "train", views, batch, cores, device)
        makers[f"ImageFolder + DataLoader{name_suffix}"] = folder
        makers[f"webdataset + WebLoader{name_suffix}"] = partial(
            webdataset_batches, shards, views, batch, cores
        )
    makers["DALI, decode alone"] = decoding_only
    if device == "cuda":
        makers["DALI, decode alone, on no JPEG engine"] = partial(
            decoding_only, uses_jpeg_engine=False
        )
        makers[f"steps of {TRAINING_CONFIG.stem}, no data"] = lambda: training_steps(args)
    return makers


def start_contestants(
    makers: dict[str, Callable[[], Batches]],
) -> tuple[dict[str, Batches], dict[str, float]]:
    """Every contestant with its workers running and caches warm, and the MiB that it took."""
    batches_by_name, mib_by_name = {}, {}
    for name, make_batches in makers.items():
        mib_before = process_tree_mib()
        batches_by_name[name] = make_batches()
        for _ in islice(batches_by_name[name], 2 * NUM_DRAINED_BATCHES):
            pass
        mib_by_name[name] = process_tree_mib() - mib_before
        print(f"{name} runs", file=sys.stderr, flush=True)
    return batches_by_name, mib_by_name


def measure_rounds(
    batches_by_name: dict[str, Batches], args: argparse.Namespace
) -> dict[str, list[TurnResult]]:
    """All contestants in turn; what lies ready is drained before the clock starts."""
    turns_by_name: dict[str, list[TurnResult]] = {name: [] for name in batches_by_name}
    for number in range(args.rounds):
        for name, batches in batches_by_name.items():
            wait_until_idle()
            for _ in islice(batches, NUM_DRAINED_BATCHES):
                pass
            turns_by_name[name].append(time_one_turn(batches, args))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return turns_by_name


def time_one_turn(batches: Batches, args: argparse.Namespace) -> TurnResult:
    """One contestant against the clock."""
    on_gpu = args.device == "cuda"
    with BusyMonitor(torch.cuda.utilization) if on_gpu else nullcontext() as busy:
        start = time.perf_counter()
        for _ in islice(batches, args.batches):
            pass
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return TurnResult(args.batches * args.batch / seconds, busy.mean_percent if busy else math.nan)


def wait_until_idle() -> None:
    """Wait until nobody's workers are at it: after their turn they fill their queues again."""
    this_process = psutil.Process()
    all_processes = [this_process, *this_process.children(recursive=True)]
    previous_cpu_s = -math.inf
    while True:
        cpu_s = sum(sum(process.cpu_times()[:2]) for process in all_processes)
        if cpu_s - previous_cpu_s < MAX_IDLE_CPU_S:
            return
        previous_cpu_s = cpu_s
        time.sleep(10 * MAX_IDLE_CPU_S)


def print_report(turns_by_name: dict[str, list[TurnResult]], mib_by_name: dict[str, float]) -> None:
    """Print who was how fast, with what."""
    our_turns = next(iter(turns_by_name.values()))
    print(
        "| loader | images/s, median | least to most | vssl-dist is faster by, median | "
        "GPU at work | MiB of the host |\n|---|---|---|---|---|---|"
    )
    for name, turns in turns_by_name.items():
        rates = [turn_result.images_per_s for turn_result in turns]
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        ratio = statistics.median(
            our_turn.images_per_s / other_rate
            for our_turn, other_rate in zip(our_turns, rates, strict=True)
        )
        busy = statistics.median(turn_result.gpu_busy_percent for turn_result in turns)
        gpu_busy_text = "" if math.isnan(busy) else f"{busy:.0f} %"
        print(
            f"| {name} | {statistics.median(rates):,.0f} | {spread} | {ratio:.2f} x | "
            f"{gpu_busy_text} | {mib_by_name[name]:,.0f} |"
        )


def write_shards(root: Path, out: Path) -> Path:
    """The image folder as shards; the train folder of them."""
    splits = SOURCES["imagefolder"].read(SourceRequest(root, ("train",), has_named_splits=True))
    build_dataset(
        splits, out, BuildOptions(shard_size=250), lambda *_: nullcontext(lambda done: None)
    )
    return out / "train"


def argument_parser() -> argparse.ArgumentParser:
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


def prepare_images(scratch: Path, args: argparse.Namespace) -> tuple[Path, Path]:
    """Prepare the images as a folder and as shards.

    Raises:
        ConfigError, DataError: They, or a GPU, are not there, or are too few.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: there is no CUDA device")
    if args.long < 2 * NUM_MARKS:
        raise ConfigError(f"--long {args.long}: must be at least {2 * NUM_MARKS}")
    if args.batch % NUM_STREAMS:
        raise ConfigError(f"--batch {args.batch}: must be a multiple of {NUM_STREAMS}")
    root = args.images or scratch / "images"
    if args.images is None:
        write_folder(root, args.samples)
    elif not (root / "train").is_dir():
        raise ConfigError(f"--images {root}: has no folder train with a folder per class")
    shards = write_shards(root, scratch / "shards")
    if (num_images := read_manifest(shards).samples) < args.batch * args.cores:
        raise ConfigError(
            f"--batch {args.batch}: {args.cores} workers share {num_images} images only"
        )
    return root, shards


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code: 0, 2 (refused) or 130 (Ctrl-C)."""
    args = argument_parser().parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    torch.set_num_threads(args.cores)
    with tempfile.TemporaryDirectory() as scratch, end_in_one_line(args.images or Path()) as ending:
        root, shards = prepare_images(Path(scratch), args)
        batches_by_name, mib_by_name = start_contestants(contestant_makers(root, shards, args))
        turns_by_name = measure_rounds(batches_by_name, args)
        batches_by_name.clear()
        gc.collect()  # ends threads and workers before their files go
        print(
            f"{args.rounds} rounds of {args.batches} batches of {args.batch} images, "
            f"{args.cores} of {psutil.cpu_count()} cores, {args.device}, load "
            f"{psutil.getloadavg()[0]:.1f}\n"
        )
        print_report(turns_by_name, mib_by_name)
        cfg = run_config(shards, batch=args.batch, cores=args.cores)
        print_stage_shares(stage_seconds(cfg, args.batches, args.device))
        print_long_run(Path(scratch), args.long)
    return ending.exit_code


if __name__ == "__main__":
    sys.exit(main())
