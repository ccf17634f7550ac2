"""What a step asks of a GPU and of the network, counted where there is neither: see `fake_step`.

For each recipe, as rank 0 of 1, 2, 8 and 64: launches (calls of ATen that are no views), the
collectives of batch norm, the gradient, the optimizer and the loss with the bytes that a rank puts
into them, and how often the host waits for the GPU; each beside the reference, which is the same
loss on torch's own means.  bench/launches.yaml holds what the reference takes and how much of it a
step may take: the budget that tests hold.

    python -m bench.launches configs/in1k_vje.yaml --ranks 64
    python -m bench.launches --markdown         # docs/speed.md's table
    python -m bench.launches --write            # the references anew
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import yaml

from bench.fake_step import PURPOSES, StepCount, count_step, fake_ranks
from bench.launch_counter import Traffic
from vssl_dist import config, durable
from vssl_dist.config import RunConfig
from vssl_dist.config.paths import path_argument
from vssl_dist.console import tables
from vssl_dist.errors import ConfigError
from vssl_dist.methods import CONFIGS
from vssl_dist.text import say

ROOT = Path(__file__).parents[1]
BUDGET_PATH = ROOT / "bench" / "launches.yaml"
RANKS = (1, 2, 8, 64)
_WORDS = {
    "norm": "batch norm", "gradient": "gradient", "optimizer": "optimizer", "loss": "loss",
}  # fmt: skip
_HEAD = """\
# What a step of each recipe takes in the reference of bench/fake_step.py, and what share of it a
# step of this project may take.  Written by `python -m bench.launches --write`; the goals by hand.
"""


@dataclass(frozen=True)
class Goals:
    """What a step may take."""

    launches: float
    """As a share of the reference's."""
    norm_of_two_views: float
    """Collectives of batch norm as a share of the reference's, which runs two views in turn."""
    host_syncs: int
    sharded_lars: int
    """Collectives of a LARS step at ZeRO stages 1 and 2: one of norms, one of weights."""


@cache
def read_budget() -> dict[str, Any]:
    """The committed file."""
    budget: dict[str, Any] = yaml.safe_load(BUDGET_PATH.read_text())
    return budget


def goals() -> Goals:
    """The committed goals."""
    return Goals(**read_budget()["goals"])


def reference_of(name: str, ranks: int) -> dict[str, int]:
    """The committed counts of the reference of a recipe."""
    counts: dict[str, int] = read_budget()["reference"][name][ranks]
    return counts


def load_recipe(path: Path, ranks: int, *overrides: str) -> RunConfig:
    """A recipe as ``ranks`` would run it: with a stream for each where it has fewer."""
    cfg = config.load(path, overrides, methods=CONFIGS)
    if cfg.data.streams % ranks:
        cfg = config.load(path, [*overrides, f"data.streams={ranks}"], methods=CONFIGS)
    return cfg


def as_counts(count: StepCount) -> dict[str, int]:
    """The figures of a step that the committed file holds of a reference."""
    counts = {"launches": count.launches, "host_syncs": count.host_syncs}
    for purpose in PURPOSES:
        traffic = count.traffic[purpose]
        counts |= {purpose: traffic.count, f"{purpose}_bytes": traffic.num_bytes}
    return counts


def broken_goals(
    cfg: RunConfig, ranks: int, count: StepCount, reference: dict[str, int]
) -> dict[str, str]:
    """A line for each goal that a step misses; that of launches names the operators, too."""
    goal = goals()
    lines: dict[str, str] = {}
    most = goal.launches * reference["launches"]
    if count.launches > most:
        operators = ", ".join(f"{op} {n}" for op, n in list(count.by_op.items())[:8])
        lines["launches"] = (
            f"{count.launches} launches, {most:.0f} allowed ({goal.launches} x "
            f"{reference['launches']}); most are {operators}"
        )
    has_two_passes = len(cfg.data.sides) == 2 and cfg.method.name != "dino"  # which batches them
    share = goal.norm_of_two_views if has_two_passes else 1.0
    if count.traffic["norm"].count > share * reference["norm"]:
        lines["norm_of_two_views"] = (
            f"{count.traffic['norm'].count} collectives of batch norm, "
            f"{share * reference['norm']:.0f} allowed ({share} x {reference['norm']})"
        )
    if count.host_syncs > goal.host_syncs:
        lines["host_syncs"] = f"{count.host_syncs} host synchronisations, {goal.host_syncs} allowed"
    updating = count.traffic["optimizer"].count
    is_sharded = ranks > 1 and cfg.engine.zero_stage > 0
    if cfg.optim.name == "lars" and is_sharded and updating > goal.sharded_lars:
        lines["sharded_lars"] = (
            f"{updating} collectives of the optimizer, {goal.sharded_lars} allowed"
        )
    return {name: f"{cfg.name} on {ranks} ranks: {line}" for name, line in lines.items()}


def table_line(
    name: str, ranks: int, count: StepCount, reference: dict[str, int]
) -> tables.TableLine:
    """One recipe at one number of ranks; where two figures stand, the reference's is second."""
    figures = {
        "launches": f"{count.launches:,} / {reference['launches']:,}",
        "ratio": f"{count.launches / reference['launches']:.2f}",
    }
    for purpose, word in _WORDS.items():
        own = count.traffic[purpose]
        other = Traffic(reference[purpose], reference[f"{purpose}_bytes"])
        figures[word] = f"{_short(own)} / {_short(other)}"
    figures["host waits"] = f"{count.host_syncs} / {reference['host_syncs']}"
    return f"{name}, {ranks}", figures


def _short(traffic: Traffic) -> str:
    return f"{traffic.count} ({traffic.num_bytes / 1e6:.2f})" if traffic.count else "0"


def markdown_section(
    command: str, lines: Sequence[tables.TableLine], missed: Sequence[str]
) -> Iterator[str]:
    """The section of docs/speed.md."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    goal = goals()
    yield f"""\
## Launches and collectives

`{command}`, commit {commit.strip()}; counted, not
measured, on a machine without a GPU. In each cell a step of this project stands before the
reference: the same loss with a forward pass per view, the function of nn.SyncBatchNorm,
DistributedDataParallel and a foreach optimizer on every rank. Launches are calls of ATen that are
no views; collectives have the MB that one rank puts into them; *host waits* are the times that the
host stands still until the GPU has caught up (the reference's are nn.SyncBatchNorm's masks). Loss
and gradient are counted on `meta`; DeepSpeed and the optimizer on the CPU, with the student's
parameters and a process group that only pretends.
"""
    yield from markdown_rows(lines)
    ratios = {name: float(figures["ratio"]) for name, figures in lines}
    worst = max(ratios, key=lambda name: ratios[name])
    yield f"""
The goals: launches at most {goal.launches} x the reference (worst: {worst}, {ratios[worst]:.2f}),
batch norm's collectives at most {goal.norm_of_two_views} x where there are two views (DINO batches
its views in the reference, too), host waits at most {goal.host_syncs}, collectives of LARS at ZeRO
stages 1 and 2 at most {goal.sharded_lars}. {"Not met:" if missed else "All are met."}"""
    yield from (f"* {line}" for line in missed)


def markdown_rows(lines: Sequence[tables.TableLine]) -> Iterator[str]:
    """Markdown, a row per recipe and number of ranks."""
    heads = list(lines[0][1])
    yield f"| recipe, ranks | {' | '.join(heads)} |"
    yield f"|---|{'--:|' * len(heads)}"
    for name, figures in lines:
        yield f"| {name} | {' | '.join(figures.values())} |"


def write_references(paths: Sequence[Path]) -> None:
    """Count the references of recipes at all numbers of ranks and write the committed file."""
    references = read_budget()["reference"] if BUDGET_PATH.exists() else {}
    for ranks in RANKS:
        with fake_ranks(ranks):
            for path in paths:
                cfg = load_recipe(path, ranks)
                counts = as_counts(count_step(cfg, reference=True))
                references.setdefault(cfg.name, {})[ranks] = counts
    by_name = {name: references[name] for name in sorted(references)}
    text = yaml.safe_dump(
        {"goals": read_budget()["goals"], "reference": by_name},
        sort_keys=False, default_flow_style=None, width=1000,
    )  # fmt: skip
    durable.write_durably(BUDGET_PATH, (_HEAD + text).encode())


def _number_of_ranks(text: str) -> int:
    ranks = int(text)
    if ranks < 1:
        raise argparse.ArgumentTypeError(f"{ranks} ranks: at least one counts")
    return ranks


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("configs", nargs="*", type=path_argument, help="recipes; default: all")
    parser.add_argument("--ranks", nargs="+", type=_number_of_ranks, default=RANKS)
    parser.add_argument("--markdown", action="store_true", help="a table for docs/speed.md")
    parser.add_argument("--where", action="store_true", help="launches by operator and file, too")
    parser.add_argument("--write", action="store_true", help="count the references anew")
    args = parser.parse_args(argv)
    args.configs = args.configs or sorted((ROOT / "configs").glob("*.yaml"))
    return args


def main(argv: Sequence[str]) -> int:
    """Print the table; exit code 1 where a goal is missed, 2 where a run cannot be counted."""
    args = arguments(argv)
    try:
        for ranks in args.ranks:
            for path in args.configs:
                load_recipe(path, ranks).micro_batch(ranks)
    except (ConfigError, ValueError, OSError) as error:
        say(f"error: {error}", to_stderr=True)
        return 2
    if args.write:
        write_references(args.configs)
        return 0
    return print_counts(args, argv)


def print_counts(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Count and print; see `main`."""
    lines: list[tables.TableLine] = []
    missed: list[str] = []
    counted: list[tuple[str, StepCount]] = []
    for ranks in args.ranks:
        with fake_ranks(ranks):
            for path in args.configs:
                cfg = load_recipe(path, ranks)
                count = count_step(cfg, with_places=args.where)
                reference = as_counts(count_step(cfg, reference=True))
                lines.append(table_line(cfg.name, ranks, count, reference))
                missed += broken_goals(cfg, ranks, count, reference).values()
                counted.append((f"{cfg.name}, {ranks}", count))
    if args.markdown:
        command = shlex.join(["python", "-m", "bench.launches", *argv])
        print("\n".join(markdown_section(command, lines, missed)))
    else:
        tables.print_tables("recipe, ranks", lines)
    if args.where:
        for name, count in counted:
            for launches in (count.by_op, count.by_place):
                rows = [(key, {"launches": f"{number:,}"}) for key, number in launches.items()]
                tables.print_tables(name, rows)
    if not args.markdown:
        say("\n".join(missed) or "every goal is met")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
