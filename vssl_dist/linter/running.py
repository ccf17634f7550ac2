"""Mistakes in how a run is judged, kept and continued."""

from __future__ import annotations

import math

from vssl_dist.config import KnnConfig, OodConfig, RunConfig
from vssl_dist.linter.rule import Facts, Rule

_WINDOW = 256


def held_out(cfg: RunConfig, facts: Facts) -> str | None:
    """The images that were trained on, judged as if they were not."""
    train, val = cfg.data.train, cfg.data.val
    if val is None or not cfg.evaluations:
        return None
    if val == train or facts.held_out_is_train:
        return f"data.val is data.train ({val}), which proves nothing: give the held-out split"
    if cfg.data.bank == val:
        return f"data.bank is data.val ({val}), which proves nothing: give the training split"
    return None


def strangers(cfg: RunConfig, facts: Facts) -> str | None:
    """Out-of-distribution images that are the run's own."""
    own = {cfg.data.train, cfg.data.val, cfg.data.bank}
    for task in cfg.evaluations:
        for name, folder in task.ood.items() if isinstance(task, OodConfig) else ():
            if folder in own:
                return f"evaluations: ood {name} is the run's own {folder}: give another dataset"
    return None


def unlabelled_bank(cfg: RunConfig, facts: Facts) -> str | None:
    """Neighbours without a label."""
    bank = cfg.data.bank or cfg.data.train
    learns = any("bank" in task.limits for task in cfg.evaluations)
    if not learns or not any("unlabel" in part for part in bank.parts):
        return None
    return (
        f"evaluations learn from {bank}, which has images without labels: name the labelled shards "
        "in data.bank"
    )


def knn_vote(cfg: RunConfig, facts: Facts) -> str | None:
    """k-NN by one vote alone, which no other paper's figure can be compared with."""
    for task in cfg.evaluations:
        if not isinstance(task, KnnConfig):
            continue
        finite = [t for t in task.temperature if math.isfinite(t)]
        if len(finite) == len(task.temperature):
            return "evaluations: knn has weighted votes only: add inf to temperature"
        if not finite:
            return "evaluations: knn has the unweighted vote only: add 0.07 to temperature"
    return None


def no_evaluations(cfg: RunConfig, facts: Facts) -> str | None:
    """A run of which only the loss is seen."""
    if cfg.evaluations:
        return None
    return (
        "evaluations is empty: the loss does not tell a good embedding from a collapsed one; "
        "evaluations: [{task: knn, every_epochs: 10}] and data.val"
    )


def no_checkpoints(cfg: RunConfig, facts: Facts) -> str | None:
    """A run that is saved at its end alone."""
    if cfg.checkpoint.every_minutes is not None or cfg.checkpoint.every_steps is not None:
        return None
    return (
        "checkpoint has neither every_minutes nor every_steps: whatever kills the run kills all of "
        "it; every_minutes: 15"
    )


def streams(cfg: RunConfig, facts: Facts) -> str | None:
    """Streams that only this number of ranks can share."""
    count, ranks = cfg.data.streams, facts.ranks
    smaller = any(count % fewer == 0 for fewer in range(-(-ranks // 2), ranks))
    if smaller or count % (2 * ranks) == 0:
        return None
    return (
        f"data.streams={count} can be shared by {ranks} ranks, but neither by twice as many nor by "
        "half, and can never be changed in this run: a multiple of 64 suits most clusters"
    )


def window(cfg: RunConfig, facts: Facts) -> str | None:
    """A shuffle so local that the same images keep meeting."""
    own = cfg.data.window
    stretch = None if facts.samples is None else facts.samples / cfg.data.streams
    if own >= _WINDOW or (stretch is not None and own >= stretch):
        return None
    return (
        f"data.window={own} shuffles so few images at a time that pairs meet again epoch after "
        "epoch: 1024 or more"
    )


RULES = (
    Rule("held_out", held_out, "an image that finds itself is always right"),
    Rule("strangers", strangers, "an AUROC of 0.5 by construction"),
    Rule("unlabelled_bank", unlabelled_bank, "STL-10's 100,000 images without labels"),
    Rule("knn_vote", knn_vote, "lightly PR 1254: 49.9 or 65.7 %, partly by the protocol"),
    Rule("no_evaluations", no_evaluations, "lightly#1000, dinov2#479: which checkpoint?"),
    Rule("no_checkpoints", no_checkpoints, "submitit#1708: a task that dies in its requeue"),
    Rule("streams", streams, "the order is frozen by data.streams: docs/shuffle.md"),
    Rule("window", window, "docs/shuffle.md: 1.7 times chance at 256, 4.2 at 1"),
)
