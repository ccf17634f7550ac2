"""Turn an exported backbone into a format that others open, and compare its features first.

    python launch/export.py runs/quickstart --format torch_export
    python launch/export.py runs/in1k_vje/export/backbone-00500400.safetensors --format onnx,timm

Of a run it is the newest export.  Each result lies beside the export, or in --out.
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

    sys.exit(script("export", sys.argv[1:], "export.py"))

from vssl_dist.cli.program import arguments as typed
from vssl_dist.config import ConfigError
from vssl_dist.data.shards import DataError
from vssl_dist.evaluation.portable import FORMATS, convert
from vssl_dist.evaluation.task import exports
from vssl_dist.text import say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the user typed; what is wrong with it ends the program with 2."""
    return typed("export", argv)


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 2 with one line that says what is missing."""
    args = arguments(argv)
    try:
        kinds = [kind.strip() for kind in args.format.split(",")]
        for kind in kinds:
            if kind not in FORMATS:
                raise ConfigError(f"--format {kind}: not one of {', '.join(FORMATS)}")
        export = exports(args.target)[-1]
        for kind in kinds:
            say(str(convert(export, kind, args.out)))
    except (ConfigError, DataError) as error:
        say(f"error: {error}", error=True)
        return 2
    except OSError as error:
        say(f"error: {error.filename or 'disk'}: {error.strerror or error}", error=True)
        return 2
    return 0
