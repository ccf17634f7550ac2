"""Check a dataset against every byte of it: ``python data_prep/verify.py O``.

``O`` is the ``--out`` of ``shard.py`` or one split of it.  Prints what is wrong; the exit code
is 0 if nothing is, 1 if something is, 2 if there is no dataset to check.
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

    sys.exit(script("verify", sys.argv[1:], "verify.py"))

from vssl_dist.cli.program import arguments as parse_arguments
from vssl_dist.console.bars import show_sample_bar
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.text import say

from .checks import check_split, find_sharded_splits, num_stated_samples


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; a mistake in it ends the program with exit code 2."""
    return parse_arguments("verify", sys.argv[1:] if words is None else words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2 or 130 (Ctrl-C)."""
    args = arguments(words)
    with end_in_one_line(args.out) as ending:
        for folder in find_sharded_splits(args.out):
            with show_sample_bar(f"verify {folder.name}", num_stated_samples(folder)) as advance:
                manifest, problems = check_split(folder, workers=args.workers, advance=advance)
            if problems:
                ending.exit_code = 1
            for line in problems:
                say(f"wrong: {line}")
            if manifest is not None and not problems:
                say(
                    f"{folder}: {manifest.samples} samples in "
                    f"{len(manifest.shards)} shards are intact (fingerprint "
                    f"{manifest.fingerprint[:12]})"
                )
    return ending.exit_code
