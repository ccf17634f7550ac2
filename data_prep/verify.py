"""Check a dataset against every byte of it: ``python data_prep/verify.py O``.

``O`` is the ``--out`` of ``shard.py`` or one split of it.  Prints what is wrong; the exit code
is 0 if nothing is, 1 if something is, 2 if there is no dataset to check.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.checks import check, datasets, stated_samples
from data_prep.progress import bar
from data_prep.shard import cpus, positive
from vssl_dist.data.manifest import DataError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="verify.py", description=__doc__)
    top.add_argument("out", type=Path, help="folder of a dataset or of one split of it")
    top.add_argument(
        "--workers", type=positive, default=cpus(), help="processes (default: one per core)"
    )
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1, 2 or 130 (Ctrl-C)."""
    args = parser().parse_args(arguments)
    wrong = 0
    try:
        for folder in datasets(args.out):
            with bar(f"verify {folder.name}", stated_samples(folder)) as advance:
                manifest, problems = check(folder, workers=args.workers, advance=advance)
            wrong += len(problems)
            for line in problems:
                print(f"wrong: {line}")
            if manifest is not None and not problems:
                print(
                    f"{folder}: {manifest.samples} samples in {len(manifest.shards)} shards are "
                    f"intact (fingerprint {manifest.fingerprint[:12]})"
                )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
