"""Turn raw images into shards: ``python data_prep/shard.py cifar10 --root R --out O``.

Writes ``O/train`` and ``O/val``.  A call that was killed is continued by the same call; the
bytes depend on the images and the options, not on ``--workers`` nor on interruptions.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data_prep.build import Options, build
from data_prep.progress import bar
from data_prep.sources import SOURCES
from data_prep.split import Request, Split
from vssl_dist.data.manifest import DataError

_SPLITS = ("train", "val")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="shard.py", description=__doc__)
    top.add_argument("source", choices=sorted(SOURCES), help="layout of the raw images")
    top.add_argument("--root", type=Path, help="folder with the raw images (photos needs none)")
    top.add_argument("--out", type=Path, required=True, help="folder of the dataset to write")
    top.add_argument(
        "--split",
        choices=_SPLITS,
        help="write this split only (default: those that the source has)",
    )
    top.add_argument(
        "--shard-size", type=positive, default=Options.shard_size, help="samples per shard"
    )
    top.add_argument("--limit", type=positive, help="only so many samples of each split")
    top.add_argument(
        "--workers", type=positive, default=cpus(), help="processes (default: one per core)"
    )
    top.add_argument(
        "--download", action="store_true", help="let torchvision fetch the official archive first"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (a clear error) or 130 (Ctrl-C)."""
    args = parser().parse_args(arguments)
    splits = (args.split,) if args.split else _SPLITS
    request = Request(args.root, splits, explicit=bool(args.split), download=args.download)
    options = Options(args.shard_size, args.limit, args.workers)
    try:
        for split in SOURCES[args.source](request):
            _write(split, args.out, options)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same call goes on", file=sys.stderr)
        return 130
    return 0


def _write(split: Split, out: Path, options: Options) -> None:
    start = time.monotonic()
    total = min(len(split.labels), options.limit or len(split.labels))
    with bar(f"{split.dataset} {split.name}", total) as advance:
        built = build(split, out, options, advance)
    manifest, seconds = built.manifest, time.monotonic() - start
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    work = (
        f"{built.written} written in {seconds:.1f} s, {built.written / seconds:,.0f}/s"
        if built.written
        else "complete already"
    )
    print(
        f"{built.folder}: {manifest.samples} samples, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {size:.1f} MB ({work})"
    )


def positive(text: str) -> int:
    """An option's value that must be a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
