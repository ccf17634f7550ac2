"""See what a run would train on: ``python data_prep/preview.py CONFIG --out sheet.png``.

A row per image: the original with its crops, then each view with its parameters below it.
``key=value`` after the config changes any key, as with ``launch/submit.py``; the dataset must
be sharded, and nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()

from data_prep.console import one_line
from data_prep.shard import positive
from vssl_dist import config
from vssl_dist.config import ConfigError
from vssl_dist.config.paths import path_argument
from vssl_dist.data.sheet import augmentation_sheet
from vssl_dist.methods import CONFIGS
from vssl_dist.text import CommandLine, say


def parser() -> CommandLine:
    """The command line."""
    top = CommandLine(
        prog="preview.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("config", type=path_argument)
    top.add_argument("overrides", nargs="*", metavar="key=value")
    top.add_argument("--out", type=path_argument, required=True, help="the PNG to write")
    top.add_argument(
        "--rows",
        type=positive,
        default=8,
        help="images to show, at most those of a micro-step (default: 8)",
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (refused) or 130 (Ctrl-C)."""
    args = parser().parse_intermixed_args(arguments)
    with one_line(args.out) as ending:
        if args.out.is_dir():
            raise ConfigError(f"--out {args.out}: is a folder; name a file, such as sheet.png")
        cfg = config.load(args.config, args.overrides, methods=CONFIGS)
        sheet = augmentation_sheet(cfg, args.out, args.rows, who="preview.py")
        say(str(sheet))
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
