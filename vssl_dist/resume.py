"""What a run leaves on disk so that it can go on, and the check that it is the same run."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from vssl_dist import __version__, checkpoint, config, dist, sealed, state
from vssl_dist.config import RunConfig
from vssl_dist.config.differences import differences, named
from vssl_dist.data.damage.training_log import SubstitutionLog, max_bad_images
from vssl_dist.data.loader import Loader
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.engine import Engine
from vssl_dist.errors import CheckpointError, ConfigError
from vssl_dist.exports.card import WeightsOrigin
from vssl_dist.installed import commit
from vssl_dist.methods import CONFIGS
from vssl_dist.online_probe import NoOnlineProbe, OnlineProbe
from vssl_dist.run_folder import RunFolder
from vssl_dist.text import printable

_log = logging.getLogger(__name__)
_OTHER_NAME_REMEDY = "give this run another name, with name=..."


class CheckpointSaver:
    """Checkpoints of one run: what goes in, when they are due, and how a run continues."""

    def __init__(
        self, cfg: RunConfig, engine: Engine, loader: Loader, probe: OnlineProbe | NoOnlineProbe
    ) -> None:
        self.cfg, self.engine, self.loader, self.probe = cfg, engine, loader, probe
        self.checkpoints_folder = RunFolder(cfg.dir).checkpoints_folder
        self.code_versions = dist.broadcast(package_versions() if dist.rank() == 0 else {})
        self.last_save_time = time.monotonic()
        allowed_bad_images = max_bad_images(loader.samples, cfg.data.max_bad)
        self.substitution_log = SubstitutionLog(cfg.dir, allowed_bad_images)

    def restore(self) -> None:
        """Continue from the newest whole checkpoint, or start at step 0 if there is none."""
        newest_checkpoint = checkpoint.find_newest_checkpoint(self.checkpoints_folder)
        if newest_checkpoint is not None:
            path, device = newest_checkpoint.path, self.engine.device
            check_same_experiment(
                self.cfg, newest_checkpoint.run_facts, dist.world_size(), self.loader.fingerprint
            )
            self.engine.load(path)
            checkpoint.load_on_all_ranks(path, lambda: self.probe.load(path, device))
            position = newest_checkpoint.step * self.cfg.optim.global_batch
            if (self.engine.step, newest_checkpoint.run_facts.get("position")) != (
                newest_checkpoint.step,
                position,
            ):
                raise CheckpointError(
                    f"{path} is not of one piece, its parts are of other steps: "
                    f"{sealed.CHECKPOINT_REMEDY}"
                )
            self.loader.position = position
        self.substitution_log.restore(self.loader.position)

    def weights_origin(self) -> WeightsOrigin:
        """Return the origin of the weights: training data's digest, and versions of the code."""
        return {"fingerprint": self.loader.fingerprint, "versions": self.code_versions}

    def is_due(self) -> bool:
        """Whether a periodic checkpoint is due after this step, the same answer on all ranks."""
        checkpoint_rules, step = self.cfg.checkpoint, self.engine.step
        if checkpoint_rules.every_steps and step % checkpoint_rules.every_steps == 0:
            return True
        minutes_since_save = (time.monotonic() - self.last_save_time) / 60
        is_late = (
            checkpoint_rules.every_minutes is not None
            and minutes_since_save >= checkpoint_rules.every_minutes
        )
        return step % self.cfg.vote_every == 0 and dist.any_rank(is_late)

    def save(self) -> None:
        """Commit a checkpoint; a failure is reported and training goes on from the last one."""
        self._note_substitutions()  # what a checkpoint covers is not seen again
        facts = {
            "position": self.loader.position,
            "world_size": dist.world_size(),
            "zero_stage": self.cfg.engine.zero_stage,
            "experiment": config.frozen_part(self.cfg),
            **self.weights_origin(),
        }
        try:
            checkpoint.commit_checkpoint(
                self.checkpoints_folder, step=self.engine.step, write_files=self._write, facts=facts
            )
        except CheckpointError as error:
            _log.warning("step %d is not saved: %s", self.engine.step, error)
            return
        finally:
            self.last_save_time = time.monotonic()
        checkpoint_rules = self.cfg.checkpoint
        checkpoint.delete_old_checkpoints(
            self.checkpoints_folder, checkpoint_rules.keep_last, checkpoint_rules.keep_every
        )

    def _write(self, folder: Path) -> None:
        self.engine.save(folder)
        self.probe.save(folder)

    def record_substitutions(self) -> dict[str, float]:
        """Write down the images that had to be replaced, and return their counts over all ranks."""
        self._note_substitutions()
        return self.substitution_log.totals()

    def _note_substitutions(self) -> None:
        self.substitution_log.record(self.loader.substitutions)
        self.loader.substitutions.clear()


def package_versions() -> dict[str, str]:
    """Return the versions of what computes: packages, and the commit where there is one."""
    code_commit = commit()
    return {
        "vssl_dist": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "numpy": np.__version__,
    } | ({"commit": code_commit} if code_commit else {})


def check_same_experiment(
    cfg: RunConfig, facts: Mapping[str, Any], world_size: int, fingerprint: str
) -> None:
    """Refuse to continue a run as another experiment.

    Args:
        cfg: What was asked for now.
        facts: What the checkpoint says of the run that wrote it.
        world_size: Ranks now.
        fingerprint: Digest of the training data now.

    Raises:
        ConfigError: One line with what differs.
    """
    try:
        saved_experiment = _completed_experiment(facts["experiment"], cfg)
        changed_keys = differences(saved_experiment, config.frozen_part(cfg))
        state.require_counts(facts, ["world_size"])
        saved_fingerprint = facts["fingerprint"]
    # Whole as it is, its writer may be anybody.
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"what the newest checkpoint of run {cfg.name} says of its experiment cannot be read: "
            f"{sealed.CHECKPOINT_REMEDY}"
        ) from error
    if changed_keys:
        raise ConfigError(_refusal_of_changes(cfg, changed_keys))
    if saved_fingerprint != fingerprint:
        raise ConfigError(
            f"run {cfg.name} was started on other data ({cfg.data.train}): {_OTHER_NAME_REMEDY}"
        )
    if facts["world_size"] != world_size:
        raise ConfigError(
            f"run {cfg.name} was saved by {facts['world_size']} ranks and cannot be continued by "
            f"{world_size}: use {facts['world_size']}, or {_OTHER_NAME_REMEDY}"
        )


def check_resumable(cfg: RunConfig, world_size: int, train: Dataset) -> int:
    """Check on a login node that a run may go on, and find the step from which it will.

    Args:
        cfg: What was asked for now.
        world_size: Ranks now.
        train: The training data now.

    Returns:
        The step from which the run will continue; 0 for a new one.

    Raises:
        ConfigError: The run folder holds another experiment, or checkpoints that others may have
            written.
    """
    try:
        manifests = checkpoint.read_manifests(RunFolder(cfg.dir).checkpoints_folder)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    if not manifests:
        _check_same_as_run_folder(cfg)
        return 0
    facts = manifests[-1]["facts"]
    check_same_experiment(cfg, facts, world_size, train.fingerprint)
    return int(manifests[-1]["step"])


def _check_same_as_run_folder(cfg: RunConfig) -> None:
    """Refuse a run without checkpoints whose folder holds curves of another experiment."""
    run = RunFolder(cfg.dir)
    if not run.config_path.exists() or not run.spool_folder.exists():
        return
    written_experiment = config.frozen_part(config.load_run(cfg.dir, methods=CONFIGS))
    if changed_keys := differences(written_experiment, config.frozen_part(cfg)):
        raise ConfigError(_refusal_of_changes(cfg, changed_keys))


def _completed_experiment(experiment: dict[str, Any], cfg: RunConfig) -> dict[str, Any]:
    """Complete the experiment that a checkpoint states by the defaults of keys that came later."""
    data_settings = experiment["data"] | {"train": str(cfg.data.train)}
    experiment_yaml = yaml.safe_dump(experiment | {"name": cfg.name, "data": data_settings})
    try:
        return config.frozen_part(config.loads(experiment_yaml, methods=CONFIGS))
    except ConfigError:  # written for another schema: compared as it stands
        return experiment


def _refusal_of_changes(cfg: RunConfig, changed_keys: list[str]) -> str:
    changes = printable(named(changed_keys))
    return f"run {cfg.name} was started with other {changes}: {_OTHER_NAME_REMEDY}"
