"""What can be known to be wrong with a run before it is written or submitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from vssl_dist.config import OodConfig, RunConfig
from vssl_dist.data.loader import check_classes, check_labelled
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.splits import check_filled, check_foreign, check_pair
from vssl_dist.installed import has_dali
from vssl_dist.jobs import (
    machine,
    private,
    slurm,
)
from vssl_dist.jobs.resources import Launch
from vssl_dist.linter import Facts
from vssl_dist.methods import build_method
from vssl_dist.models.backbones import check_sides
from vssl_dist.text import say
from vssl_dist.tracker import Answer, check_tracking, look, why_no_locks

_WHO = "submit.py"
"""Waits for storage."""


def with_backend(cfg: RunConfig) -> RunConfig:
    """The run with the data backend that this installation has, and a line where that is another.

    A backend that the user named stays: `Preflight` says if it is missing.
    """
    if cfg.data.backend != "dali" or "backend" in cfg.data.model_fields_set or has_dali():
        return cfg
    say(
        "data.backend=reference: DALI is not installed, so images are decoded by Pillow on the CPU "
        "(pip install '.[cuda13]', or cuda12, brings it)",
        error=True,
    )
    data = cfg.data.model_copy(update={"backend": "reference"})
    return cfg.model_copy(update={"data": data})


def check_network(cfg: RunConfig) -> None:
    """Refuse a backbone that nobody knows, or that cannot take the views, at no cost of weights.

    Raises:
        ConfigError: One line that names the key and the remedy.
    """
    data = cfg.data
    with torch.device("meta"):
        method = build_method(cfg.method, data.image_size, data.sides)
    check_sides(method.student.get_submodule("backbone"), data.image_size, data.sides)


class Preflight:
    """The checks of one submission.  Each dataset is opened once, for all that ask about it."""

    def __init__(self, cfg: RunConfig, launch: Launch) -> None:
        self._cfg, self._launch = cfg, launch
        self._opened: dict[Path, Dataset] = {}
        self._unopened: dict[Path, str] = {}

    def problems(self) -> Iterator[str]:
        """What this machine, the data and the tracking lack for this run, one line each.

        Each is looked for when it is asked for: storage that does not answer takes its time.
        """
        yield from _folder(self._cfg)
        yield from _cluster(self._launch)
        yield from _machine(self._launch)
        yield from _backend(self._cfg)
        yield from self._datasets()
        yield from _tracking(self._cfg, self._launch)

    def facts(self) -> Facts:
        """What the linter may know; less where the data is not here."""
        data = self._cfg.data
        val = None if data.val is None else self._open(data.val)
        return Facts.of(self._launch.world_size, self._open(data.train), val)

    @property
    def train(self) -> Dataset:
        """The training set.

        Raises:
            DataError: It cannot be opened.
        """
        dataset = self._open(self._cfg.data.train)
        if dataset is None:
            raise DataError(self._unopened[self._cfg.data.train])
        return dataset

    def _datasets(self) -> Iterator[str]:
        """Each folder of shards is there and sound, and good for what is to be done with it."""
        for key, folder in _folders(self._cfg).items():
            if self._open(folder) is None:
                yield f"{key}: {self._unopened[folder]}"
        if train := self._open(self._cfg.data.train):
            yield from self._training(train)
        unlabelled = list(self._unlabelled())
        yield from unlabelled
        yield from dict.fromkeys(self._evaluations(labelled=not unlabelled))

    def _training(self, train: Dataset) -> Iterator[str]:
        optim = self._cfg.optim
        try:
            self._watched(train, partial(check_classes, self._cfg, train))
        except DataError as error:
            yield f"data.train: {error}"
        if train.samples < optim.global_batch and optim.max_steps is None:
            yield (
                f"optim.global_batch={optim.global_batch} is more than the {train.samples} images "
                f"of {train.folder}: an image would be in a batch twice; make it smaller, or give "
                "optim.max_steps if that is meant"
            )

    def _unlabelled(self) -> Iterator[str]:
        """Splits with images of no class, though an evaluation compares labels."""
        data = self._cfg.data
        compare = [task.task for task in self._cfg.evaluations if "bank" in task.limits]
        splits = {"data.bank" if data.bank else "data.train": data.bank or data.train}
        splits |= {"data.val": data.val} if data.val else {}
        for key, folder in splits.items() if compare else ():
            dataset = self._open(folder)
            purpose = f"task {compare[0]} compares labels (data.bank, data.val)"
            try:
                if dataset is not None:
                    self._watched(dataset, partial(check_labelled, dataset, purpose))
            except DataError as error:
                yield f"{key}: {error}"

    def _evaluations(self, *, labelled: bool) -> Iterator[str]:
        """What each evaluation would refuse, hours later, of the datasets that could be opened.

        Args:
            labelled: Whether each image of a split that is compared has a label.
        """
        data = self._cfg.data
        folders = {"bank": data.bank or data.train, "queries": data.val}
        for task in self._cfg.evaluations:
            own = {part: self._open(folders[part] or data.train) for part in task.limits}
            parts = {part: dataset for part, dataset in own.items() if dataset is not None}
            try:
                for dataset in parts.values():
                    check_filled(dataset, task)
                if len(parts) == len(own) and labelled:
                    check_pair(parts, task, data.timeout_s)
                for name, folder in task.ood.items() if isinstance(task, OodConfig) else ():
                    if (foreign := self._open(folder)) is not None:
                        check_filled(foreign, task)
                        check_foreign(name, foreign, parts)
            except DataError as error:
                yield f"evaluations: {error}"

    def _open(self, folder: Path) -> Dataset | None:
        if folder not in self._opened and folder not in self._unopened:
            try:
                self._opened[folder] = open_watched(
                    folder, timeout_s=self._cfg.data.timeout_s, who=_WHO, share=slice(None)
                )
            except DataError as error:
                self._unopened[folder] = str(error)
        return self._opened.get(folder)

    def _watched(self, dataset: Dataset, check: Callable[[], None]) -> None:
        run_with_timeout(dataset.watch, check, timeout_s=self._cfg.data.timeout_s, who=_WHO)


def _folder(cfg: RunConfig) -> Iterator[str]:
    """A run that is there already is this user's."""
    try:
        private.survey(cfg.dir)
        private.refuse_link(cfg.dir)
    except ConfigError as error:
        yield str(error)


def _cluster(launch: Launch) -> Iterator[str]:
    if launch.cluster == "slurm" and (reason := slurm.why_no_slurm()):
        yield f"{reason}: --local [N] runs on this machine instead"


def _machine(launch: Launch) -> Iterator[str]:
    """What GPUs need; on a cluster each rank sees for itself, this may be a node without any."""
    if launch.cluster == "local" and launch.device == "cuda":
        reason = machine.why_no_cuda(machine.read_wheel(), machine.read_driver())
        yield from [reason] if reason else []


def _backend(cfg: RunConfig) -> Iterator[str]:
    if cfg.data.backend == "dali" and not has_dali():
        yield (
            "data.backend=dali: DALI is not installed: pip install '.[cuda13]' (or cuda12), or use "
            "data.backend=reference"
        )


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
