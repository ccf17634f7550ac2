"""Mistakes in how a run is judged, kept and continued."""

from __future__ import annotations

import math

from vssl_dist.config import KnnConfig, RunConfig
from vssl_dist.linter.rule import Facts, Rule

_WINDOW = 256
_FEWEST_PER_GPU = 64
"""Images per GPU and pass below which a step's launches last longer than its arithmetic."""
_ACCURACIES = ("knn", "linear", "finetune", "uncertainty")


def held_out(cfg: RunConfig, facts: Facts) -> str | None:
    """Measures of collapse on the images that were trained on.

    Evaluations that compare labels refuse this; see `vssl_dist.jobs.preflight`.
    """
    train, val = cfg.data.train, cfg.data.val
    if val is None or not cfg.evaluations or any("bank" in t.limits for t in cfg.evaluations):
        return None
    if val == train or facts.held_out_is_train:
        return f"data.val is data.train ({val}), which proves nothing: give the held-out split"
    return None


def one_class(cfg: RunConfig, facts: Facts) -> str | None:
    """Accuracies where there is one class to choose from."""
    tasks = [task.task for task in cfg.evaluations if task.task in _ACCURACIES]
    if facts.classes != 1 or not tasks:
        return None
    return (
        f"data.train has one class, so that {' and '.join(tasks)} are right whatever the features "
        "are; of one class collapse and ood (its distances, not its largest probability) can tell "
        "something"
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


def images_per_gpu(cfg: RunConfig, facts: Facts) -> str | None:
    """So few images per GPU that it waits for launches and collectives."""
    if not facts.gpus_per_node or facts.ranks == 1:
        return None
    images = cfg.optim.global_batch // (cfg.optim.accumulate * facts.ranks)
    if images >= _FEWEST_PER_GPU:
        return None
    return (
        f"{images} images per GPU and pass (optim.global_batch={cfg.optim.global_batch} over "
        f"{facts.ranks} ranks) leave it waiting for launches and collectives: "
        + _fitting_size(cfg, facts)
    )


def _fitting_size(cfg: RunConfig, facts: Facts) -> str:
    """The most nodes, or GPUs of one, that have enough images each."""
    per_node = facts.gpus_per_node
    fitting = [ranks for ranks in range(1, facts.ranks) if _has_enough_images(cfg, ranks)]
    nodes = max((ranks // per_node for ranks in fitting if ranks % per_node == 0), default=0)
    if nodes:
        images = cfg.micro_batch(nodes * per_node)
        return f"--nodes {nodes} gives them {images}, or use a larger batch"
    if not fitting:
        return "use a larger batch"
    ranks = max(fitting)
    gpus = f"{ranks} GPU{'s' if ranks > 1 else ''}"
    return f"{gpus} of one node would have {cfg.micro_batch(ranks)}, or use a larger batch"


def _has_enough_images(cfg: RunConfig, ranks: int) -> bool:
    try:
        return cfg.micro_batch(ranks) >= _FEWEST_PER_GPU
    except ValueError:
        return False


def window(cfg: RunConfig, facts: Facts) -> str | None:
    """A shuffle so local that the same images keep meeting."""
    window_size = cfg.data.window
    stream_length = None if facts.samples is None else facts.samples / cfg.data.streams
    if window_size >= _WINDOW or (stream_length is not None and window_size >= stream_length):
        return None
    return (
        f"data.window={window_size} shuffles so few images at a time that pairs meet again epoch "
        "after epoch: 1024 or more"
    )


RULES = (
    Rule("held_out", held_out, "an image that finds itself is always right"),
    Rule("one_class", one_class, "an accuracy of 100 % by construction"),
    Rule("knn_vote", knn_vote, "lightly PR 1254: 49.9 or 65.7 %, partly by the protocol"),
    Rule("no_evaluations", no_evaluations, "lightly#1000, dinov2#479: which checkpoint?"),
    Rule("no_checkpoints", no_checkpoints, "submitit#1708: a task that dies in its requeue"),
    Rule("streams", streams, "the order is frozen by data.streams: docs/shuffle.md"),
    Rule(
        "images_per_gpu",
        images_per_gpu,
        "in1k_vje at 64 ranks: thousands of launches a step, counted; docs/gpu.md",
    ),
    Rule("window", window, "docs/shuffle.md: 1.7 times chance at 256, 4.2 at 1"),
)
