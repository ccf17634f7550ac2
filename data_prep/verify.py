"""Check a dataset against every byte of it: ``python data_prep/verify.py O``.

``O`` is the ``--out`` of ``shard.py`` or one split of it.  Prints what is wrong; the exit code
is 0 if nothing is, 1 if something is, 2 if there is no dataset to check.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from vssl_dist.installed import require_packages

    require_packages()

from data_prep.checks import check, datasets, stated_samples
from data_prep.console import one_line
from data_prep.progress import bar
from data_prep.shard import cpus, positive
from vssl_dist.config.paths import path_argument
from vssl_dist.text import CommandLine, say


def parser() -> CommandLine:
    """The command line."""
    top = CommandLine(prog="verify.py", description=__doc__)
    top.add_argument("out", type=path_argument, help="folder of a dataset or of one split of it")
    top.add_argument(
        "--workers", type=positive, default=cpus(), help="processes (default: one per core)"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2 or 130 (Ctrl-C)."""
    args = parser().parse_args(arguments)
    with one_line(args.out) as ending:
        for folder in datasets(args.out):
            with bar(f"verify {folder.name}", stated_samples(folder)) as advance:
                manifest, problems = check(folder, workers=args.workers, advance=advance)
            if problems:
                ending.code = 1
            for line in problems:
                say(f"wrong: {line}")
            if manifest is not None and not problems:
                say(
                    f"{folder}: {manifest.samples} samples in "
                    f"{len(manifest.shards)} shards are intact (fingerprint "
                    f"{manifest.fingerprint[:12]})"
                )
    return ending.code


if __name__ == "__main__":
    sys.exit(main())
