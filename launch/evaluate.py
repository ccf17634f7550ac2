"""Evaluate the exports of a run, or one export, by hand: the same code as beside the training.

    python launch/evaluate.py runs/quickstart --baselines
    python launch/evaluate.py runs/quickstart/export/backbone-00000600.safetensors

Results lie beside the exports and are not computed twice.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout
from rich.console import Console
from rich.table import Table

from vssl_dist.config import ConfigError, KnnConfig
from vssl_dist.data.shards import DataError
from vssl_dist.evaluation.features import read_card
from vssl_dist.evaluation.task import baselines, evaluate
from vssl_dist.jobs.dispatch import lock_of
from vssl_dist.jobs.evaluation import Due, evaluate_one
from vssl_dist.jobs.resources import Device


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the user typed; argparse itself exits with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("target", type=Path, metavar="RUN|EXPORT")
    parser.add_argument("--task", choices=["knn"], default="knn")
    parser.add_argument(
        "--data", metavar="TRAIN,VAL", help="other shard folders than the run's, as bank,queries"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="the GPU if there is one")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (2)")
    parser.add_argument(
        "--baselines", action="store_true", help="also raw pixels and the untrained network"
    )
    return parser.parse_args(argv)


def exports(target: Path) -> list[Path]:
    """The export, or the exports of a run, oldest first.

    Raises:
        ConfigError: There is none.
    """
    if target.suffix == ".safetensors":
        return [target.absolute()]
    found = sorted(target.absolute().glob("export/backbone-*.safetensors"))
    if not found:
        raise ConfigError(f"{target}: no export/backbone-STEP.safetensors in this folder yet")
    return found


def task_of(card: dict[str, Any], name: str) -> KnnConfig:
    """The run's own settings of a task, or the task's defaults."""
    for settings in card.get("config", {}).get("evaluations", ()):
        if settings.get("task") == name:
            return KnnConfig.model_validate(settings)
    return KnnConfig()


def rows(args: argparse.Namespace, found: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and results of each line of the table."""
    task = task_of(read_card(found[-1]), args.task)
    train, val = _folders(args.data)
    device, threads = args.device or _device(), args.threads
    if args.baselines:
        known = baselines(found[-1], task, device=device, threads=threads, train=train, val=val)
        for name, results in known["results"].items():
            yield name.replace("_", " "), results
    for export in found:
        one = Due(export, read_card(export)["step"], task)
        run = export.parent.parent
        if (run / "config.yaml").exists() and train is None and not one.done():
            result = evaluate_one(run, one, device, threads)  # onto the run's curve, too
        else:
            result = evaluate(export, task, device=device, threads=threads, train=train, val=val)
        yield f"step {one.step}", result["results"]


def _folders(data: str | None) -> tuple[Path | None, Path | None]:
    if data is None:
        return None, None
    train, comma, val = data.partition(",")
    if not (train and comma and val):
        raise ConfigError(f"--data {data}: two folders, as TRAIN,VAL")
    return Path(train).absolute(), Path(val).absolute()


def _device() -> Device:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def table(lines: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    """Top-1 accuracy of each line at each point of the grid."""
    shown = Table()
    shown.add_column("k-NN top-1 %")
    for point in lines[0][1]:
        shown.add_column(point.replace("_", " "), justify="right")
    for name, results in lines:
        shown.add_row(name, *(f"{100 * point['top1']:.1f}" for point in results.values()))
    return shown


def main(argv: Sequence[str]) -> int:
    """Exit code 0, or 2 with one line that says what is missing."""
    args = arguments(argv)
    try:
        found = exports(args.target)
        with _alone(args.target):
            lines = list(rows(args, found))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
        return 2
    Console().print(table(lines))
    return 0


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let the evaluations in the background finish: their results are then there already."""
    if target.suffix == ".safetensors":
        yield
        return
    lock = lock_of(target)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("waiting for the evaluation in the background", flush=True)
    with lock:
        yield


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
