"""What can be known to be wrong with a run before it is written or submitted."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from vssl_dist.config import ConfigError, OodConfig, RunConfig
from vssl_dist.data.loader import check_classes, check_labelled
from vssl_dist.data.opening import open_watched
from vssl_dist.data.shards import DataError, Dataset
from vssl_dist.jobs import cluster, machine, private
from vssl_dist.jobs.resources import Launch
from vssl_dist.methods import build_method
from vssl_dist.models.backbones import check_sides
from vssl_dist.tracker import Answer, check_tracking, look, why_no_locks


def check_network(cfg: RunConfig) -> None:
    """Refuse a backbone that nobody knows, or that cannot take the views, at no cost of weights.

    Raises:
        ConfigError: One line that names the key and the remedy.
    """
    data = cfg.data
    with torch.device("meta"):
        method = build_method(cfg.method, data.image_size, data.sides)
    check_sides(method.student.get_submodule("backbone"), data.image_size, data.sides)


def problems(cfg: RunConfig, launch: Launch) -> Iterator[str]:
    """What this machine, the data and the tracking lack for this run, one line each.

    Each is looked for when it is asked for: storage that does not answer takes its time.
    """
    yield from _folder(cfg)
    yield from _cluster(launch)
    yield from _machine(launch)
    yield from _data(cfg)
    yield from _tracking(cfg, launch)


def _folder(cfg: RunConfig) -> Iterator[str]:
    """A run that is there already is this user's."""
    try:
        private.survey(cfg.dir)
    except ConfigError as error:
        yield str(error)


def _cluster(launch: Launch) -> Iterator[str]:
    if launch.cluster == "slurm" and (reason := cluster.why_no_slurm()):
        yield f"{reason}: --local [N] runs on this machine instead"


def _machine(launch: Launch) -> Iterator[str]:
    """What GPUs need; on a cluster each rank sees for itself, this may be a node without any."""
    if launch.cluster == "local" and launch.device == "cuda":
        reason = machine.why_no_cuda(machine.read_wheel(), machine.read_driver())
        yield from [reason] if reason else []


def _data(cfg: RunConfig) -> Iterator[str]:
    """Every folder of shards that the run reads is there, sound, and labelled where it must be."""
    compared = {"data.bank" if cfg.data.bank else "data.train", "data.val"}
    told = (f"task {t.task} compares labels" for t in cfg.evaluations if "bank" in t.limits)
    labels = next(told, "")
    for key, folder in _folders(cfg).items():
        purpose = f"{labels} (data.bank, data.val)" if labels and key in compared else ""
        try:
            open_watched(
                folder,
                timeout_s=cfg.data.timeout_s,
                who="submit.py",
                share=slice(None),
                check=partial(_check_labels, cfg, key, purpose),
            )
        except DataError as error:
            yield f"{key}: {error}"


def _check_labels(cfg: RunConfig, key: str, purpose: str, dataset: Dataset) -> None:
    """See that there are the labels that the method or an evaluation learns from."""
    if key == "data.train":
        check_classes(cfg, dataset)
    if purpose:
        check_labelled(dataset, purpose)


def _folders(cfg: RunConfig) -> dict[str, Path]:
    named = {"data.train": cfg.data.train, "data.val": cfg.data.val, "data.bank": cfg.data.bank}
    folders = {key: folder for key, folder in named.items() if folder is not None}
    for task in cfg.evaluations:
        if isinstance(task, OodConfig):
            folders |= {f"evaluations: ood {name}": path for name, path in task.ood.items()}
    return folders


def _tracking(cfg: RunConfig, launch: Launch) -> Iterator[str]:
    # Evaluations are jobs of their own, on a node of their own.
    hosts = launch.nodes + (1 if cfg.evaluations else 0) if launch.cluster == "slurm" else 1
    if reason := check_tracking(launch.tracking_uri, hosts):
        yield reason
    if reason := why_no_locks(cfg.dir):
        yield f"out: {reason}, which keep two jobs out of one run: use another folder"


def look_at_tracking(cfg: RunConfig, launch: Launch) -> Answer:
    """Whether MLflow will take the curves; nothing is written, and it takes seconds at most."""
    if check_tracking(launch.tracking_uri, hosts=1):
        return Answer()  # which `problems` has said
    return look(launch.tracking_uri, cfg.dir)
