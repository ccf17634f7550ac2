"""Turn an exported backbone into a format that others open, and compare its features first.

    python launch/export.py runs/quickstart --format torch_export
    python launch/export.py runs/in1k_vje/export/backbone-00500400.safetensors --format onnx,timm

Of a run it is the newest export.  Each result lies beside the export, or in --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from vssl_dist.cli.program import arguments as typed
from vssl_dist.console.endings import end_in_one_line
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.run import list_exports
from vssl_dist.exports.formats import EXPORT_FORMATS, convert_export
from vssl_dist.text import say


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse what the user typed; what is wrong with it ends the program with exit code 2."""
    return typed("export", argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns 0, or 2 after one line that says what is missing."""
    args = arguments(argv)
    with end_in_one_line() as ending:
        format_names = [format_name.strip() for format_name in args.format.split(",")]
        for format_name in format_names:
            if format_name not in EXPORT_FORMATS:
                raise ConfigError(f"--format {format_name}: not one of {', '.join(EXPORT_FORMATS)}")
        export_path = list_exports(args.target)[-1]
        for format_name in format_names:
            say(str(convert_export(export_path, format_name, args.out)))
    return ending.exit_code
