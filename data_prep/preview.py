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
    from vssl_dist.cli.program import script

    sys.exit(script("preview", sys.argv[1:], "preview.py"))

from vssl_dist import config
from vssl_dist.cli.program import arguments as parse_arguments
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS
from vssl_dist.preview.sheet import write_augmentation_sheet
from vssl_dist.text import say


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake in it ends the program with exit code 2."""
    return parse_arguments("preview", sys.argv[1:] if words is None else words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 (refused) or 130 (Ctrl-C)."""
    args = arguments(words)
    with end_in_one_line(args.out) as ending:
        if args.out.is_dir():
            raise ConfigError(f"--out {args.out}: is a folder; name a file, such as sheet.png")
        cfg = config.load(args.config, args.overrides, methods=CONFIGS)
        sheet = write_augmentation_sheet(cfg, args.out, args.rows, who="preview.py")
        say(str(sheet))
    return ending.exit_code
