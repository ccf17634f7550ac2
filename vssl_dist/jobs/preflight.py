"""The checks of a run before anything of it is written or submitted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vssl_dist.config import OodConfig, RunConfig
from vssl_dist.data.loader import refuse_other_classes, refuse_unlabelled
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.errors import ConfigError, DataError
from vssl_dist.evaluation.splits import check_bank_and_queries, check_not_empty, check_not_own_split
from vssl_dist.installed import has_dali
from vssl_dist.jobs import (
    machine,
    private,
    slurm,
)
from vssl_dist.jobs.resources import Launch
from vssl_dist.linter import Facts
from vssl_dist.methods import build_method
from vssl_dist.models.backbones import check_sides, shapes_only
from vssl_dist.text import say
from vssl_dist.tracker import TrackingReport, check_tracking, probe_tracking, why_no_locks

_PROGRAM_NAME = "submit.py"
"""Who waits, in messages about storage that does not answer."""


def with_installed_backend(cfg: RunConfig) -> RunConfig:
    """Give a run the data backend that this installation has; says so where it is another one.

    A backend that the user named stays: `Preflight` says if it is missing.
    """
    if cfg.data.backend != "dali" or "backend" in cfg.data.model_fields_set or has_dali():
        return cfg
    say(
        "data.backend=reference: DALI is not installed, so images are decoded by Pillow on the CPU "
        "(pip install '.[cuda13]', or cuda12, brings it)",
        to_stderr=True,
    )
    data = cfg.data.model_copy(update={"backend": "reference"})
    return cfg.model_copy(update={"data": data})


def check_backbone(cfg: RunConfig) -> None:
    """Refuse a backbone that is unknown or cannot take the views; no weights are allocated.

    Raises:
        ConfigError: One line that names the key and the remedy.
    """
    data = cfg.data
    with shapes_only():
        method = build_method(cfg.method, data.image_size, data.sides)
    check_sides(method.student.get_submodule("backbone"), data.image_size, data.sides)


class Preflight:
    """The checks of one submission, which opens each dataset once."""

    def __init__(self, cfg: RunConfig, launch: Launch) -> None:
        self._cfg = cfg
        self._launch = launch
        self._datasets_by_folder: dict[Path, Dataset] = {}
        self._errors_by_folder: dict[Path, str] = {}
        """Why a dataset could not be opened, by its folder."""

    def problems(self) -> Iterator[str]:
        """Yield what machine, data and tracking lack for this run, one line each.

        A check runs when its turn comes: storage that does not answer takes its time.
        """
        yield from _run_folder_problems(self._cfg)
        yield from _cluster_problems(self._launch)
        yield from _machine_problems(self._launch)
        yield from _backend_problems(self._cfg)
        yield from self._dataset_problems()
        yield from _tracking_problems(self._cfg, self._launch)

    def facts(self) -> Facts:
        """Collect the facts that the linter judges by; fewer where a dataset cannot be opened."""
        data = self._cfg.data
        val_dataset = None if data.val is None else self._open_dataset(data.val)
        launch = self._launch
        return Facts.of(
            launch.world_size,
            self._open_dataset(data.train),
            val_dataset,
            gpus_per_node=launch.ranks_per_node if launch.device == "cuda" else 0,
        )

    @property
    def train(self) -> Dataset:
        """The training dataset.

        Raises:
            DataError: It cannot be opened.
        """
        dataset = self._open_dataset(self._cfg.data.train)
        if dataset is None:
            raise DataError(self._errors_by_folder[self._cfg.data.train])
        return dataset

    def _dataset_problems(self) -> Iterator[str]:
        """Yield what is wrong with the folders of shards, and with what is to be done with them."""
        for key, folder in _dataset_folders(self._cfg).items():
            if self._open_dataset(folder) is None:
                yield f"{key}: {self._errors_by_folder[folder]}"
        if train_dataset := self._open_dataset(self._cfg.data.train):
            yield from self._training_problems(train_dataset)
        unlabelled_problems = list(self._unlabelled_problems())
        yield from unlabelled_problems
        yield from dict.fromkeys(self._evaluation_problems(has_all_labels=not unlabelled_problems))

    def _training_problems(self, train_dataset: Dataset) -> Iterator[str]:
        optim = self._cfg.optim
        try:
            self._run_check(train_dataset, partial(refuse_other_classes, self._cfg, train_dataset))
        except DataError as error:
            yield f"data.train: {error}"
        if train_dataset.samples < optim.global_batch and optim.max_steps is None:
            yield (
                f"optim.global_batch={optim.global_batch} is more than the {train_dataset.samples} "
                f"images of {train_dataset.folder}: an image would be in a batch twice; make it "
                "smaller, or give optim.max_steps if that is meant"
            )

    def _unlabelled_problems(self) -> Iterator[str]:
        """Yield the splits with images of no class, if an evaluation compares labels."""
        data = self._cfg.data
        labelled_tasks = [task.task for task in self._cfg.evaluations if "bank" in task.limits]
        folder_by_key = {"data.bank" if data.bank else "data.train": data.bank or data.train}
        folder_by_key |= {"data.val": data.val} if data.val else {}
        for key, folder in folder_by_key.items() if labelled_tasks else ():
            dataset = self._open_dataset(folder)
            purpose = f"task {labelled_tasks[0]} compares labels (data.bank, data.val)"
            try:
                if dataset is not None:
                    self._run_check(dataset, partial(refuse_unlabelled, dataset, purpose))
            except DataError as error:
                yield f"{key}: {error}"

    def _evaluation_problems(self, *, has_all_labels: bool) -> Iterator[str]:
        """Yield what the evaluations would refuse, hours later, of the datasets that were opened.

        Args:
            has_all_labels: Whether each image of a split that is compared has a label.
        """
        data = self._cfg.data
        folder_by_split = {"bank": data.bank or data.train, "queries": data.val}
        for task in self._cfg.evaluations:
            dataset_by_split = {
                split: self._open_dataset(folder_by_split[split] or data.train)
                for split in task.limits
            }
            opened_splits = {
                split: dataset for split, dataset in dataset_by_split.items() if dataset is not None
            }
            try:
                for dataset in opened_splits.values():
                    check_not_empty(dataset, task)
                if len(opened_splits) == len(dataset_by_split) and has_all_labels:
                    check_bank_and_queries(opened_splits, task, data.timeout_s)
                for name, folder in task.ood.items() if isinstance(task, OodConfig) else ():
                    if (ood_dataset := self._open_dataset(folder)) is not None:
                        check_not_empty(ood_dataset, task)
                        check_not_own_split(name, ood_dataset, opened_splits)
            except DataError as error:
                yield f"evaluations: {error}"

    def _open_dataset(self, folder: Path) -> Dataset | None:
        if folder not in self._datasets_by_folder and folder not in self._errors_by_folder:
            try:
                self._datasets_by_folder[folder] = open_watched(
                    folder, timeout_s=self._cfg.data.timeout_s, who=_PROGRAM_NAME, share=slice(None)
                )
            except DataError as error:
                self._errors_by_folder[folder] = str(error)
        return self._datasets_by_folder.get(folder)

    def _run_check(self, dataset: Dataset, check: Callable[[], None]) -> None:
        run_with_timeout(
            dataset.watch, check, timeout_s=self._cfg.data.timeout_s, who=_PROGRAM_NAME
        )


def _run_folder_problems(cfg: RunConfig) -> Iterator[str]:
    """Yield why a run folder that is there cannot be used: it is a link or not this user's."""
    try:
        private.survey_permissions(cfg.dir)
        private.refuse_linked_run(cfg.dir)
    except ConfigError as error:
        yield str(error)


def _cluster_problems(launch: Launch) -> Iterator[str]:
    if launch.cluster == "slurm" and (reason := slurm.why_no_slurm()):
        yield f"{reason}: --local [N] runs on this machine instead"


def _machine_problems(launch: Launch) -> Iterator[str]:
    """Yield why torch cannot use this machine's GPUs, if the ranks run here.

    On a cluster each rank checks for itself: a login node may have no GPU.
    """
    if launch.cluster == "local" and launch.device == "cuda":
        reason = machine.why_no_cuda(machine.read_wheel(), machine.read_driver())
        yield from [reason] if reason else []


def _backend_problems(cfg: RunConfig) -> Iterator[str]:
    if cfg.data.backend == "dali" and not has_dali():
        yield (
            "data.backend=dali: DALI is not installed: pip install '.[cuda13]' (or cuda12), or use "
            "data.backend=reference"
        )


def _dataset_folders(cfg: RunConfig) -> dict[str, Path]:
    """Return the folders of shards that a run reads, by their keys in the config."""
    folder_by_key = {
        "data.train": cfg.data.train,
        "data.val": cfg.data.val,
        "data.bank": cfg.data.bank,
    }
    given_folders = {key: folder for key, folder in folder_by_key.items() if folder is not None}
    for task in cfg.evaluations:
        if isinstance(task, OodConfig):
            given_folders |= {f"evaluations: ood {name}": path for name, path in task.ood.items()}
    return given_folders


def _tracking_problems(cfg: RunConfig, launch: Launch) -> Iterator[str]:
    # Evaluations are jobs of their own, on a node of their own.
    num_hosts = launch.nodes + (1 if cfg.evaluations else 0) if launch.cluster == "slurm" else 1
    if reason := check_tracking(launch.tracking_uri, num_hosts):
        yield reason
    if reason := why_no_locks(cfg.dir):
        yield f"out: {reason}, which keep two jobs out of one run: use another folder"


def probe_run_tracking(cfg: RunConfig, launch: Launch) -> TrackingReport:
    """Ask MLflow whether it will take the curves: writes nothing and takes seconds at most."""
    if check_tracking(launch.tracking_uri, num_hosts=1):
        return TrackingReport()  # `problems` has that line
    return probe_tracking(launch.tracking_uri, cfg.dir)
