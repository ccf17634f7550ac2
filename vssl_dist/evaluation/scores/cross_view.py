"""Scores that need pairs of views of each image: how well one view explains the other.

Training raises, for each pair, the bound of one view's posterior on the other view, and of the
other's on the one.  That the same figures tell foreign images from familiar ones is derived: the
sources on the methods say nothing of it.  The network of an export plays both parts, posterior and
prior, where a training with a teacher has the student for one and the teacher for the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vssl_dist.evaluation.scores.variational import (
    AT_ONCE,
    ELBO,
    SELF,
    Scoring,
    double,
    rows_of,
)
from vssl_dist.methods.base import Evidence
from vssl_dist.models.heads import Gaussian

CROSS_VIEW = "s2_cross_view_likelihood"


def pair_scores(setup: Scoring, images: Tensor, views: Tensor) -> dict[str, Tensor]:
    """Scores by name, each ``(M,)`` float64; all rise with foreignness.

    - ``s2_cross_view_likelihood``: minus the log-likelihood of one view of a pair under the other's
      posterior, latents at their means.

    Of a method that cannot judge one view by itself, also:

    - ``s1_self_likelihood``: the same of the image as it is and each of its views: how well they
      explain the image itself;
    - ``s3_negative_elbo``: minus the bound that training raises, of the same pairs as ``s2``.

    Each is a mean over both directions and over the pairs.

    Args:
        setup: How.
        images: Features of each image as it is, ``(M, width)``.
        views: Features of T pairs of augmented views of it, ``(M, 2 T, width)``; views 2 t and
            2 t + 1 are a pair.
    """
    found: list[dict[str, Tensor]] = []
    some = max(1, AT_ONCE // views[0].numel())
    for own, block in zip(torch.split(images, some), torch.split(views, some), strict=True):
        each = _Side.of(setup, block.flatten(0, 1))
        still = torch.zeros(1, 1, each.target.mu.shape[-1], dtype=torch.float64)
        pair = each.rows(slice(0, None, 2)), each.rows(slice(1, None, 2))
        scores = {CROSS_VIEW: _mutual(setup, *pair, still).likelihood}
        if not setup.alone:
            itself = _Side.of(setup, own.repeat_interleave(block.shape[1], dim=0))
            scores[SELF] = _mutual(setup, itself, each, still).likelihood
            drawn = setup.draws((setup.samples, *still.shape[1:])).double()
            scores[ELBO] = _mutual(setup, *pair, drawn).bound
        found.append({name: -score.view(len(own), -1).mean(1) for name, score in scores.items()})
    return {name: torch.cat([one[name] for one in found]) for name in found[0]}


class _Side(NamedTuple):
    """One view of each pair, in both parts that it plays."""

    posterior: Gaussian
    target: Gaussian

    @classmethod
    def of(cls, setup: Scoring, features: Tensor) -> _Side:
        network = setup.posterior
        return cls(double(network.infer(features)), double(network.target(features)))

    def rows(self, which: slice) -> _Side:
        return _Side(*(rows_of(part, which) for part in self))


def _mutual(setup: Scoring, one: _Side, other: _Side, eps: Tensor) -> Evidence:
    """The mean over both directions."""
    there = setup.judge(one.posterior, other.target, eps)
    back = setup.judge(other.posterior, one.target, eps)
    return Evidence(*(0.5 * (a + b) for a, b in zip(there, back, strict=True)))
