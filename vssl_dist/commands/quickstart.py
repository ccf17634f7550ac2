"""The whole path once, on real photographs, in minutes:  make quickstart

Shards patches of photographs, pretrains VJE with k-NN evaluations beside it, and compares the
result with raw pixels and with the untrained network.  A second call reuses what is there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vssl_dist.cli.places import code_folder
from vssl_dist.commands.subcommand import call
from vssl_dist.console import tables
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import print_printable

ROOT = code_folder()
RUN = Path("runs/quickstart")
LEAST_GAIN = 15.0
"""Points above the random network that a healthy installation reaches."""


class Stopwatch:
    """Times phases; `seconds` has them in their order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time what runs inside."""
        print_printable(f"== {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def run(command: str, *words: str) -> None:
    """Run a command of `vssl` as a user would; ends the program with its exit code if it fails."""
    if code := call(command, *words):
        raise SystemExit(code)


def accuracies() -> dict[str, float]:
    """Read top-1 in percent of raw pixels, the random network and each export, in this order.

    Every file holds the same grid of (k, temperature); its first point is the one shown.
    """
    exports = RunFolder(ROOT / RUN).export_folder
    baselines = json.loads(exports.baselines_path("knn").read_text())["results"]
    grids = {name.replace("_", " "): grid for name, grid in baselines.items()}
    for path, name in exports.find_results(stem="knn").items():
        grids[f"step {name.step}"] = json.loads(path.read_text())["results"]
    return {name: 100 * next(iter(grid.values()))["top1"] for name, grid in grids.items()}


def summarise(seconds: dict[str, float]) -> int:
    """Print times and accuracies; returns 1 if the accuracy is worse than it should be."""
    stamp = ROOT / ".venv" / "installed"
    phases = {"install (once)": stamp.read_text().strip()} if stamp.exists() else {}
    phases |= {name: f"{value:.0f}" for name, value in seconds.items()}
    print_printable("")
    tables.print_tables("phase", [(name, {"seconds": value}) for name, value in phases.items()])

    top1 = accuracies()
    print_printable("", "k-NN top-1 on patches that training never saw")
    tables.print_tables("features", [(name, {"%": f"{value:.1f}"}) for name, value in top1.items()])

    gain = list(top1.values())[-1] - top1["random network"]
    print_printable(f"VJE ends {gain:.1f} points above the random network")
    print_printable(f"run folder  {RUN}", "next        .venv/bin/mlflow ui")
    if gain < LEAST_GAIN:
        print_printable(f"error: at least {LEAST_GAIN:g} points were expected", to_stderr=True)
        return 1
    return 0


def main() -> int:
    """Run the whole path; returns 0, 1 if the result is too bad, or a failed command's code."""
    os.chdir(ROOT)
    watch = Stopwatch()
    with watch.phase("shard the photographs"):
        run("shard", "photos", "--out", "data/photos")
    with watch.phase("pretrain VJE, evaluations beside it"):
        run("submit", "--local", "configs/quickstart.yaml")
    with watch.phase("finish the evaluations, compare with baselines"):
        run("evaluate", str(RUN), "--baselines")
    return summarise(watch.seconds)
