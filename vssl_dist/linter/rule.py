"""The type of a rule, and the facts that one may use besides the configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vssl_dist.config import RunConfig
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.models import backbones


class Facts(NamedTuple):
    """Facts about a run besides its configuration; None: not known here."""

    ranks: int = 1
    samples: int | None = None
    """Images of ``data.train``."""
    dataset: str | None = None
    """The name that the training shards give themselves, such as ``cifar10``."""
    classes: int | None = None
    """Classes of ``data.train``."""
    held_out_is_train: bool = False
    """Whether ``data.val`` holds the very shards of ``data.train``."""
    gpus_per_node: int = 0
    """GPUs, one per rank, that a node has; 0: the ranks compute on CPUs."""

    @classmethod
    def of(
        cls, ranks: int, train: Dataset | None, val: Dataset | None, gpus_per_node: int = 0
    ) -> Facts:
        """Collect the facts that launch and datasets state; without ``train`` the launch's only."""
        if train is None:
            return cls(ranks, gpus_per_node=gpus_per_node)
        return cls(
            ranks,
            samples=train.samples,
            dataset=train.manifest.name,
            classes=len(train.classes),
            held_out_is_train=val is not None and val.fingerprint == train.fingerprint,
            gpus_per_node=gpus_per_node,
        )

    def steps(self, cfg: RunConfig) -> int | None:
        """Optimizer steps of the run."""
        return None if self.samples is None else cfg.total_steps(self.samples)


class Rule(NamedTuple):
    """One known mistake."""

    name: str
    """Name by which ``silence`` hides the rule."""
    check: Callable[[RunConfig, Facts], str | None]
    """A pure function: what is wrong and what to do about it in one line, or None."""
    evidence: str
    """Source that has met the mistake: a paper, a public issue, or a measurement of ours."""


class Finding(NamedTuple):
    """A rule that fired."""

    rule: Rule
    message: str

    def line(self) -> str:
        """The warning as it is printed."""
        name = self.rule.name
        return f"{name}: {self.message} [{self.rule.evidence}; silence=[{name}] hides this]"


def self_supervised(cfg: RunConfig) -> bool:
    """Whether no label is seen in training."""
    return cfg.method.classes_wanted is None


def is_vit(cfg: RunConfig) -> bool:
    """Whether the backbone is a vision transformer."""
    return backbones.is_vit(cfg.method.backbone, cfg.data.image_size)
