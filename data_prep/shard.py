"""Turn raw images into shards: ``python data_prep/shard.py cifar10 --root R --out O``.

Writes ``O/train`` and ``O/val``, and ``O/test`` where there is a third.  A call that was killed is
continued by the same call; the bytes depend on the images and the options, not on ``--workers``
nor on interruptions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()
    from vssl_dist.cli.program import script

    sys.exit(script("shard", sys.argv[1:], "shard.py"))

from vssl_dist.cli.program import arguments as parse_arguments
from vssl_dist.console.bars import show_sample_bar
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.errors import DataError
from vssl_dist.text import say

from .archives.unpack import archive_unpacker
from .images.examine import MAX_PIXELS, ImageRules
from .sharding.dataset import (
    BuildOptions,
    BuiltSplit,
    build_dataset,
)
from .sharding.decisions import ImagePolicy
from .sharding.split_folder import REJECTS_NAME
from .sources import SOURCES
from .sources.base import SourceRequest, describe_counts_by_kind

_SPLIT_ALIASES = {"test": "val", "unlabelled": "unlabeled", "train+unlabelled": "train+unlabeled"}
_MAX_DECODER_PIXELS = 178_956_970
"""Pixels beyond which Pillow refuses an image, also later, when it is trained on."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake in it ends the program with exit code 2."""
    return parse_arguments("shard", sys.argv[1:] if words is None else words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (a clear error) or 130 (Ctrl-C)."""
    args = arguments(words)
    start = time.monotonic()
    with end_in_one_line(
        args.out, "interrupted: finished shards are kept, the same call goes on"
    ) as ending:
        options, request = _make_build_options(args), _make_request(args)
        with archive_unpacker(args.out) as unpack:
            splits = SOURCES[args.source].read(replace(request, unpack=unpack))
            for built_split in build_dataset(splits, args.out, options, show_sample_bar):
                say(_summarise_split(built_split, time.monotonic() - start))
    return ending.exit_code


def _make_request(args: argparse.Namespace) -> SourceRequest:
    """Make the request to the source; refuses options and splits that it does not have."""
    source = SOURCES[args.source]
    for option in ("--root", "--classes", "--download", "--resize-short", "--quality",
                   "--max-pixels", "--on-bad", "--image-field", "--label-field"):  # fmt: skip
        value = getattr(args, option.removeprefix("--").replace("-", "_"))
        if value not in (None, False) and option not in source.options:
            raise DataError(f"{args.source} has no {option}")
    split = (
        args.split if args.split in source.splits else _SPLIT_ALIASES.get(args.split, args.split)
    )
    if split is not None and split not in source.splits:
        raise DataError(f"{args.source} has no split {split}, only {', '.join(source.splits)}")
    splits = (split,) if split else source.default_splits
    return SourceRequest(
        args.root,
        splits,
        bool(split),
        args.download,
        args.classes,
        args.on_bad or ImagePolicy.on_bad,
        args.image_field,
        args.label_field,
    )


def _make_build_options(args: argparse.Namespace) -> BuildOptions:
    quality = args.quality or ImageRules.quality
    max_pixels = args.max_pixels or MAX_PIXELS
    if quality > 100:
        raise DataError(f"--quality {quality}: is at most 100")
    if max_pixels > _MAX_DECODER_PIXELS:
        raise DataError(
            f"--max-pixels {max_pixels}: no decoder here takes more than {_MAX_DECODER_PIXELS}"
        )
    on_bad = args.on_bad or ImagePolicy.on_bad
    rules = ImageRules(max_pixels, args.resize_short, quality, salvage=on_bad == "reencode")
    return BuildOptions(
        args.shard_size, args.limit, args.workers, rules, ImagePolicy(on_bad, args.dedup)
    )


def _summarise_split(built_split: BuiltSplit, seconds: float) -> str:
    manifest = built_split.manifest
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    progress_text = (
        f"{built_split.num_samples_written} written in {seconds:.1f} s, "
        f"{built_split.num_samples_written / seconds:,.0f}/s"
        if built_split.num_samples_written
        else "complete already"
    )
    decisions_text = ", ".join(
        f"{count} {decision}" for decision, count in built_split.count_by_decision.items()
    )
    left_out = describe_counts_by_kind(built_split.split.left_out)
    notes = [
        f"{decisions_text}: see {REJECTS_NAME}" if decisions_text else "",
        f"left out: {left_out}" if left_out else "",
        built_split.split.remark,
    ]
    return (
        f"{built_split.folder}: {manifest.samples} samples, {len(manifest.classes)} classes, "
        f"{len(manifest.shards)} shards, {size:.1f} MB ({progress_text})"
        + "".join(f"; {note}" for note in notes if note)
    )


def positive_int(text: str) -> int:
    """Parse an option's value that must be a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
