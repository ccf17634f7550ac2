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
from vssl_dist.text import say

ROOT = code_folder()
RUN = Path("runs/quickstart")
LEAST_GAIN = 15.0
"""Points above the random network that a healthy installation reaches."""


class Stopwatch:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time what runs inside."""
        say(f"== {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def run(command: str, *words: str) -> None:
    """Run a command of `vssl` as a user would; leave with its code if it fails."""
    if code := call(command, *words):
        raise SystemExit(code)


def accuracies() -> dict[str, float]:
    """Top-1 in percent of raw pixels, the random network and each export, in this order.

    Every file holds the same grid of (k, temperature); its first point is the one shown.
    """
    exports = RunFolder(ROOT / RUN).exports
    found = json.loads(exports.baselines("knn").read_text())["results"]
    named = {name.replace("_", " "): grid for name, grid in found.items()}
    for path, name in exports.results(stem="knn").items():
        named[f"step {name.step}"] = json.loads(path.read_text())["results"]
    return {name: 100 * next(iter(grid.values()))["top1"] for name, grid in named.items()}


def summarise(seconds: dict[str, float]) -> int:
    """Print what came of it; the exit code says whether it is what it should be."""
    stamp = ROOT / ".venv" / "installed"
    install = {"install (once)": stamp.read_text().strip()} if stamp.exists() else {}
    spent = install | {name: f"{value:.0f}" for name, value in seconds.items()}
    say("")
    tables.show("phase", [(name, {"seconds": value}) for name, value in spent.items()])

    found = accuracies()
    say("", "k-NN top-1 on patches that training never saw")
    tables.show("features", [(name, {"%": f"{value:.1f}"}) for name, value in found.items()])

    gain = list(found.values())[-1] - found["random network"]
    say(f"VJE ends {gain:.1f} points above the random network")
    say(f"run folder  {RUN}", "next        .venv/bin/mlflow ui")
    if gain < LEAST_GAIN:
        say(f"error: at least {LEAST_GAIN:g} points were expected", error=True)
        return 1
    return 0


def main() -> int:
    """Exit code 0, 1 if the result is worse than it should be, or that of a failed command."""
    os.chdir(ROOT)
    watch = Stopwatch()
    with watch.phase("shard the photographs"):
        run("shard", "photos", "--out", "data/photos")
    with watch.phase("pretrain VJE, evaluations beside it"):
        run("submit", "--local", "configs/quickstart.yaml")
    with watch.phase("finish the evaluations, compare with baselines"):
        run("evaluate", str(RUN), "--baselines")
    return summarise(watch.seconds)
