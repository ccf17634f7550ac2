"""Names of curves: those of a training are ``train/...``, of an evaluation ``TASK/...``.

Methods and monitors call a figure by a short name (``alignment_cos``); here it becomes that of its
curve (``train/alignment_cos``), which docs/monitors.md explains.  Here, too, stand the names that
earlier versions gave, so that a run which they began goes on under the names of today.
"""

from __future__ import annotations

from collections.abc import Mapping

NAMES = 2
"""Version of the names; 1 had no ``train/``.  A change of any name makes it one more."""
EPOCH = "epoch"
"""Curve of how often the training images have been seen, the last time in part."""

_TRAINING = "train/"
_FIGURES = {
    "alignment": "alignment_cos",
    "online/top1": "online_top1",
    "train_accuracy": "accuracy",
}
_COLLAPSE = {
    "effective_rank": "effective_rank_centred",
    "rankme_centred": "effective_rank_centred",
}


def training_curves(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures of a training step by the names of their curves.

    >>> training_curves({"loss": 0.5, "epoch": 1.25})
    {'train/loss': 0.5, 'epoch': 1.25}
    """
    return {_training_curve(name): value for name, value in figures.items()}


def current_curve(name: str, *, of_training: bool) -> str:
    """The name of a curve today, whatever version has named it; one of today stays as it is.

    Args:
        name: Name under which the curve was written.
        of_training: Whether the trainer wrote it, not an evaluation or the machine's sampler.

    >>> [current_curve(n, of_training=True) for n in ("loss", "alignment", "train/loss", "epoch")]
    ['train/loss', 'train/alignment_cos', 'train/loss', 'epoch']
    >>> current_curve("collapse/effective_rank", of_training=False)
    'collapse/effective_rank_centred'
    """
    if of_training:
        return _training_curve(current_figure(name))
    task, _, figure = name.partition("/")
    return f"{task}/{current_collapse_figure(figure)}" if task == "collapse" else name


def current_figure(name: str) -> str:
    """The name of a figure of the training today, which cards of earlier exports give another."""
    return _FIGURES.get(name, name)


def current_collapse_figure(name: str) -> str:
    """The name of a figure of task ``collapse`` today, which earlier results give another."""
    return _COLLAPSE.get(name, name)


def _training_curve(figure: str) -> str:
    is_curve = figure == EPOCH or figure.startswith(_TRAINING)
    return figure if is_curve else f"{_TRAINING}{figure}"
