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
from vssl_dist.commands.subcommand import run_command
from vssl_dist.console import tables
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import say

CODE_FOLDER = code_folder()
RUN_FOLDER = Path("runs/quickstart")
MIN_GAIN_POINTS = 15.0
"""Points above the random network that a healthy installation reaches."""


class Stopwatch:
    """Times phases; `seconds` has them in their order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce and time what runs inside."""
        say(f"== {name}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def run_or_exit(command: str, *words: str) -> None:
    """Run a command of `vssl` as a user would; ends the program with its exit code if it fails."""
    if code := run_command(command, *words):
        raise SystemExit(code)


def read_top1_percents() -> dict[str, float]:
    """Read top-1 in percent of raw pixels, the random network and each export, in this order.

    Every file holds the same grid of (k, temperature); its first point is the one shown.
    """
    exports = RunFolder(CODE_FOLDER / RUN_FOLDER).export_folder
    baseline_grids = json.loads(exports.baselines_path("knn").read_text())["results"]
    grids_by_name = {name.replace("_", " "): grid for name, grid in baseline_grids.items()}
    for path, name in exports.find_results(stem="knn").items():
        grids_by_name[f"step {name.step}"] = json.loads(path.read_text())["results"]
    return {name: 100 * next(iter(grid.values()))["top1"] for name, grid in grids_by_name.items()}


def print_summary(seconds: dict[str, float]) -> int:
    """Print times and accuracies; returns 1 if the accuracy is worse than it should be."""
    install_time_file = CODE_FOLDER / ".venv" / "installed"
    seconds_by_phase = (
        {"install (once)": install_time_file.read_text().strip()}
        if install_time_file.exists()
        else {}
    )
    seconds_by_phase |= {name: f"{value:.0f}" for name, value in seconds.items()}
    say("")
    tables.print_tables(
        "phase", [(name, {"seconds": value}) for name, value in seconds_by_phase.items()]
    )

    top1_percents = read_top1_percents()
    say("", "k-NN top-1 on patches that training never saw")
    tables.print_tables(
        "features", [(name, {"%": f"{value:.1f}"}) for name, value in top1_percents.items()]
    )

    gain_points = list(top1_percents.values())[-1] - top1_percents["random network"]
    say(f"VJE ends {gain_points:.1f} points above the random network")
    say(f"run folder  {RUN_FOLDER}", "next        .venv/bin/mlflow ui")
    if gain_points < MIN_GAIN_POINTS:
        say(f"error: at least {MIN_GAIN_POINTS:g} points were expected", to_stderr=True)
        return 1
    return 0


def main() -> int:
    """Run the whole path; returns 0, 1 if the result is too bad, or a failed command's code."""
    os.chdir(CODE_FOLDER)
    stopwatch = Stopwatch()
    with stopwatch.phase("shard the photographs"):
        run_or_exit("shard", "photos", "--out", "data/photos")
    with stopwatch.phase("pretrain VJE, evaluations beside it"):
        run_or_exit("submit", "--local", "configs/quickstart.yaml")
    with stopwatch.phase("finish the evaluations, compare with baselines"):
        run_or_exit("evaluate", str(RUN_FOLDER), "--baselines")
    return print_summary(stopwatch.seconds)
