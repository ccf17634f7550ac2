"""What to measure first on a GPU, in nine minutes: ``python bench/gpu_first.py --out FOLDER``.

Sections run in order of value, each in a process of its own with a time of its own, so that one
that fails, hangs or breaks its CUDA context stops no other.  After each one FOLDER/gpu_first.json
is written anew; FOLDER is ``$OUT`` where that is set.  The first sections need torch (2.11 or
newer) and nothing else; the others say which package they lack.  docs/gpu.md says what each
figure means.  ``--device cpu --dry`` only shows that every section runs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILE_NAME = "gpu_first.json"
TOTAL_S = 540
"""Seconds that all sections may take together."""
_MARK = "section-result "
"""Begins each line of a section's output that holds a result."""
_LEFT_TO_END_S = 4.0
"""Seconds before its limit at which a section begins nothing more."""
_PROJECT = ("pydantic", "yaml", "torchvision", "timm", "safetensors", "psutil")
_PICTURES = ("nvidia.dali", "PIL", "skimage", "numpy", *_PROJECT)


class Section(NamedTuple):
    """One question to a GPU."""

    name: str
    function: str
    """``MODULE:FUNCTION`` of a generator of results, its first argument after another colon."""
    limit_s: int
    packages: tuple[str, ...] = ()
    """What it needs besides torch."""


SECTIONS = (
    Section("machine", "bench.gpu.kernels:measure_machine", 20),
    Section("sync_bn", "bench.gpu.kernels:compare_sync_bn", 50),
    Section("launches", "bench.gpu.kernels:count_launches", 50),
    Section("bits", "bench.gpu.steps:compare_bits", 40),
    Section("in1k_vje", "bench.gpu.recipes:measure_recipe:in1k_vje", 60, ("deepspeed", *_PROJECT)),
    Section("models", "bench.gpu.steps:measure_models", 90),
    Section("pictures", "bench.gpu.pictures:compare_pictures", 35, _PICTURES),
    Section("decoding", "bench.gpu.pictures:time_decoding", 40, _PICTURES),
    Section("feeding", "bench.gpu.recipes:measure_feeding", 50, ("deepspeed", *_PICTURES)),
    Section("in1k_byol", "bench.gpu.recipes:measure_recipe:in1k_byol", 40,
            ("deepspeed", *_PROJECT)),
    Section("in1k_moco_v3_vit_s", "bench.gpu.recipes:measure_recipe:in1k_moco_v3_vit_s", 40,
            ("deepspeed", *_PROJECT)),
    Section("lars", "bench.gpu.kernels:time_lars", 25),
)  # fmt: skip
"""In order of value; their limits together are no more than `TOTAL_S`."""
BY_NAME = {section.name: section for section in SECTIONS}


def first_missing(packages: Sequence[str]) -> str | None:
    """The first of ``packages`` that is not installed."""
    for package in packages:
        try:
            is_there = find_spec(package) is not None
        except ModuleNotFoundError:  # of a package inside one that is missing
            is_there = False
        if not is_there:
            return package
    return None


def section_results(section: Section, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Run a section in this process."""
    from bench.gpu.section import Setting

    module, function, *names = section.function.split(":")
    setting = Setting(args.device, args.dry, time.monotonic() + args.seconds - _LEFT_TO_END_S)
    run = getattr(import_module(module), function)
    yield from run(*names, setting)


def run_section(section: Section, args: argparse.Namespace) -> int:
    """Run a section and print its results as lines; returns the exit code of its process."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"{_MARK}{json.dumps(['error', 'there is no CUDA device'])}", flush=True)
        return 1
    try:
        for name, value in section_results(section, args):
            print(f"{_MARK}{json.dumps([name, value])}", flush=True)
    except Exception as error:  # whatever it is, the other sections run
        traceback.print_exc()
        line = f"{type(error).__name__}: {error}".partition("\n")[0]
        print(f"{_MARK}{json.dumps(['error', line])}", flush=True)
        return 1
    return 0


def measure_section(section: Section, args: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run a section in a process of its own.

    Args:
        section: What to run.
        args: The command line.
        limit_s: Seconds after which it is killed; what it has found by then is kept.

    Returns:
        ``status``: ``ok``, ``missing``, ``failed`` or ``out of time``; ``seconds``; ``results`` by
        name; and where it failed the end of what it wrote on stderr.
    """
    if missing := first_missing(section.packages):
        return {"status": "missing", "reason": f"{missing} is not installed"}
    command = [sys.executable, __file__, "--section", section.name, "--device", args.device]
    command += ["--seconds", str(limit_s)] + ["--dry"] * args.dry
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    is_out_of_time = False
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        is_out_of_time = True
    finally:
        _kill_session(process)  # also what a section that ended has left behind
    if is_out_of_time:
        out, err = process.communicate()
    status = "out of time" if is_out_of_time else "failed" if process.returncode else "ok"
    report: dict[str, Any] = {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "results": dict(
            json.loads(line.removeprefix(_MARK))
            for line in out.splitlines()
            if line.startswith(_MARK)
        ),
    }
    return report if status == "ok" else report | {"stderr": err[-2000:]}


def _kill_session(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _path(text: str) -> Path:
    return Path(os.path.expandvars(text)).expanduser()


def argument_parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="gpu_first.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--out", type=_path, default=Path(os.environ.get("OUT", ".")))
    top.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    top.add_argument("--dry", action="store_true", help="tiny sizes: whether every section runs")
    top.add_argument("--only", nargs="+", choices=list(BY_NAME), default=list(BY_NAME))
    top.add_argument("--seconds", type=float, default=TOTAL_S, help="that all may take together")
    top.add_argument("--section", choices=list(BY_NAME), help=argparse.SUPPRESS)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0, or 1 where a section failed or ran out of time."""
    args = argument_parser().parse_args(argv)
    if args.section:
        return run_section(BY_NAME[args.section], args)
    from vssl_dist.durable import write_durably

    end_s = time.monotonic() + args.seconds
    reports: dict[str, Any] = {}
    for section in SECTIONS:
        if section.name not in args.only:
            continue
        left_s = end_s - time.monotonic()
        limit_s = left_s if args.dry else min(section.limit_s, left_s)
        if limit_s < 2 * _LEFT_TO_END_S:
            reports[section.name] = {"status": "out of time", "seconds": 0.0, "results": {}}
        else:
            reports[section.name] = measure_section(section, args, limit_s)
        write_durably(args.out / FILE_NAME, json.dumps(reports, indent=1).encode())
        print(f"{section.name}: {reports[section.name]['status']}", file=sys.stderr, flush=True)
    return int(any(r["status"] in ("failed", "out of time") for r in reports.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
