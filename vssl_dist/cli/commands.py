"""The commands of `vssl` and their words.

What an option takes is written down here once more where the code that knows it is heavy: the
tests hold both against each other.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import click

from vssl_dist.cli import typos
from vssl_dist.cli.words import Command, FileWord, PathWord

TASKS = ("knn", "linear", "ood", "collapse", "uncertainty", "finetune")
FORMATS = ("torch_export", "onnx", "torchvision", "timm")
SOURCES = ("cifar10", "cifar100", "imagefolder", "imagenet", "photos", "stl10", "webdataset")
SHARD_SIZE = 2048
MAX_PIXELS = 64_000_000
NEEDS = ("gpu", "slurm")
SCHEMAS = ("config", "profile")
_PATH, _CONFIG, _PROFILE = PathWord(), FileWord("configs"), FileWord("slurm")
_POSITIVE = click.IntRange(min=1)


def cpus() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _option(name: str, *, help: str | None = None, **more: Any) -> click.Option:
    return click.Option([name], help=help, **more)


def _argument(name: str, metavar: str | None = None, type: Any = _PATH, **more: Any) -> Any:
    return click.Argument([name], metavar=metavar, type=type, **more)


def _config_and_overrides() -> list[click.Parameter]:
    changes = click.Argument(["overrides"], nargs=-1, metavar="[key=value]...")
    return [_argument("config", "CONFIG", _CONFIG), changes]


def _workers() -> click.Option:
    return _option(
        "--workers", type=_POSITIVE, default=cpus, help="processes (default: one per core)"
    )


def _baselines() -> click.Option:
    return _option("--baselines", is_flag=True, help="also raw pixels and the untrained network")


def _wrong_submit(args: Namespace) -> str | None:
    if args.nodes is not None and args.local is not None:
        return "--local: not allowed with --nodes"
    if args.nodes is not None and args.nodes < 1:
        return "--nodes: at least 1"
    if args.local is not None and args.local < 0:
        return "--local: at least 1"
    return None


def _wrong_evaluate(args: Namespace) -> str | None:
    return "--ranks: at least 1" if args.ranks < 1 else None


def _check_names(option: str, choices: tuple[str, ...]) -> Callable[[Namespace], None]:
    """Make a check of the names, with commas between, that an option takes."""

    def look(args: Namespace) -> None:
        typos.refuse_names(option, getattr(args, option.removeprefix("--")), choices)

    return look


SUBMIT = Command(
    "submit",
    "vssl_dist.commands.submit",
    "Start one run, on SLURM or on this machine.",
    [
        _option("--nodes", type=int, metavar="N", help="submit to SLURM (1)"),
        _option(
            "--local",
            type=int,
            metavar="[N]",
            help="run N ranks here, in the foreground (one per GPU, or 2 on a CPU)",
        ),
        _option("--profile", type=_PROFILE, help="slurm/default.yaml, or slurm/local.yaml"),
        _option("--dry-run", is_flag=True, help="check and print, start nothing"),
        *_config_and_overrides(),
    ],
    wrong=_wrong_submit,
    look=typos.refuse_run,
    number="--local",
)
EVALUATE = Command(
    "evaluate",
    "vssl_dist.commands.evaluate",
    "Evaluate the exports of a run, or one export, by hand.",
    [
        _argument("target", "RUN|EXPORT"),
        _option(
            "--task", default="knn", metavar="TASK,...", help=f"any of {', '.join(TASKS)} (knn)"
        ),
        _option(
            "--data",
            multiple=True,
            metavar="TRAIN,VAL|NAME=FOLDER",
            help="other shard folders than the run's: bank,queries; or one that task ood tells "
            "apart (may be repeated)",
        ),
        _option(
            "--density",
            type=click.Choice(["polar", "cartesian"]),
            help="of VJE's likelihoods in task ood, instead of the run's own setting",
        ),
        _option("--device", type=click.Choice(["cuda", "cpu"]), help="the GPU if there is one"),
        _option("--threads", type=int, default=2, help="of the CPU (2)"),
        _baselines(),
        _option(
            "--ranks",
            type=int,
            default=1,
            help="processes that share a pass over the images, each with a GPU, or --threads (1)",
        ),
    ],
    wrong=_wrong_evaluate,
    look=_check_names("--task", TASKS),
)
ONE_CLASS = Command(
    "one-class",
    "vssl_dist.commands.one_class",
    "One-class anomaly detection: a training on each class alone.",
    [
        _option("--classes", help="these only: names with commas between, or a file"),
        _option("--ranks", type=int, default=0, help="per run (one per GPU, or 2 on a CPU)"),
        _baselines(),
        *_config_and_overrides(),
    ],
    look=typos.refuse_run,
)
EXPORT = Command(
    "export",
    "vssl_dist.commands.export",
    "Turn an exported backbone into a format that others open.",
    [
        _argument("target", "RUN|EXPORT"),
        _option(
            "--format", required=True, metavar="FORMAT,...", help=f"any of {', '.join(FORMATS)}"
        ),
        _option("--out", type=_PATH, metavar="FOLDER", help="beside the export otherwise"),
    ],
    look=_check_names("--format", FORMATS),
)
TRACK = Command(
    "track",
    "vssl_dist.commands.track",
    "Send the curves of runs to where tracking points now.",
    [
        _argument("runs", "RUN...", nargs=-1, required=True),
        _option("--to", metavar="URI", help="http://HOST:PORT or sqlite:////path/mlflow.db"),
    ],
)
SHARD = Command(
    "shard",
    "data_prep.shard",
    "Turn raw images into shards.",
    [
        _argument("source", "SOURCE", click.Choice(SOURCES)),
        _option("--root", type=_PATH, help="folder of raw images (photos needs none)"),
        _option("--out", type=_PATH, required=True, help="the dataset's folder"),
        _option(
            "--split", help="write this split only, such as train or val (default: those there are)"
        ),
        _option("--shard-size", type=_POSITIVE, default=SHARD_SIZE, help="samples per shard"),
        _option("--limit", type=_POSITIVE, help="only so many samples of each split"),
        _workers(),
        _option("--classes", type=_PATH, help="file that lists the classes to keep"),
        _option(
            "--resize-short", type=_POSITIVE, help="shrink to so many pixels on the shorter side"
        ),
        _option("--quality", type=_POSITIVE, help="of JPEGs that are written anew (default: 95)"),
        _option(
            "--max-pixels", type=_POSITIVE, help=f"refuse larger images (default: {MAX_PIXELS})"
        ),
        _option(
            "--on-bad",
            type=click.Choice(["fail", "skip", "reencode"]),
            help="what to do with an image that cannot be read or decoded: stop (the default), "
            "leave it out, or keep what can be decoded of it",
        ),
        _option(
            "--image-field", metavar="FIELD", help="of a WebDataset: which member is the image"
        ),
        _option(
            "--label-field",
            metavar="FIELD[:KEY]",
            help="of a WebDataset: which member is the label, such as label.txt, or json:KEY for "
            "what a JSON member states at a key (KEY.KEY: at one within another)",
        ),
        _option(
            "--dedup",
            is_flag=True,
            help="drop exact copies, and from training what is also in val",
        ),
        _option(
            "--download", is_flag=True, help="let torchvision fetch the official archive first"
        ),
    ],
    prefixes=True,
)
VERIFY = Command(
    "verify",
    "data_prep.verify",
    "Check a dataset against every byte of it.",
    [_argument("out", "FOLDER"), _workers()],
    prefixes=True,
)
SUBSET = Command(
    "subset",
    "data_prep.subset",
    "Some classes of a sharded split as a split of their own.",
    [
        _argument("folder", "FOLDER"),
        _option(
            "--classes",
            required=True,
            help="their names with commas between, or a file that lists them",
        ),
        _option("--out", type=_PATH, required=True, help="folder of the new split"),
    ],
    prefixes=True,
)
PREVIEW = Command(
    "preview",
    "data_prep.preview",
    "See what a run would train on.",
    [
        *_config_and_overrides(),
        _option("--out", type=_PATH, required=True, help="the PNG to write"),
        _option(
            "--rows",
            type=_POSITIVE,
            default=8,
            help="images to show, at most those of a micro-step (default: 8)",
        ),
    ],
    look=typos.refuse_config,
)
KEYS = Command(
    "keys",
    "vssl_dist.commands.keys",
    "Every key of a config and of a machine's profile.",
    [click.Argument(["blocks"], nargs=-1, metavar="[BLOCK]...")],
    look=typos.refuse_blocks,
)
SCHEMA = Command(
    "schema",
    "vssl_dist.cli.schema",
    "The JSON schema of configs or of profiles, for editors.",
    [click.Argument(["kind"], type=click.Choice(SCHEMAS), default="config", metavar="KIND")],
)
DOCTOR = Command(
    "doctor",
    "vssl_dist.cli.doctor",
    "See what this machine lacks: driver, DALI, disk, SLURM, tracking.",
    [
        _option("--out", type=_PATH, default="runs", help="folder of runs to look at (runs)"),
        _option(
            "--need",
            default="",
            metavar="NEED,...",
            help=f"what must be here, too: any of {', '.join(NEEDS)}",
        ),
    ],
    look=lambda args: typos.refuse_names("--need", args.need, NEEDS) if args.need else None,
)
COMMANDS: dict[str, Command] = {
    str(command.name): command
    for command in (
        SUBMIT, EVALUATE, ONE_CLASS, EXPORT, TRACK, SHARD, VERIFY, SUBSET, PREVIEW, KEYS, SCHEMA,
        DOCTOR,
    )
}  # fmt: skip
