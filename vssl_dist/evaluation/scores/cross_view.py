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
    VariationalSetup,
    select_images,
    to_float64,
)
from vssl_dist.methods.base import Evidence
from vssl_dist.models.heads import Gaussian

CROSS_VIEW = "s2_cross_view_likelihood"


def pair_scores(setup: VariationalSetup, images: Tensor, views: Tensor) -> dict[str, Tensor]:
    """Compute scores by name, each ``(M,)`` float64; all rise with foreignness.

    - ``s2_cross_view_likelihood``: minus the log-likelihood of one view of a pair under the other's
      posterior, latents at their means.

    Of a method that cannot judge one view by itself, also:

    - ``s1_self_likelihood``: the same of the image as it is and each of its views: how well they
      explain the image itself;
    - ``s3_negative_elbo``: minus the bound that training raises, of the same pairs as ``s2``.

    Each is a mean over both directions and over the pairs.

    Args:
        setup: The posterior and how it judges.
        images: Features of each image as it is, ``(M, width)``.
        views: Features of T pairs of augmented views of it, ``(M, 2 T, width)``; views 2 t and
            2 t + 1 are a pair.
    """
    by_block: list[dict[str, Tensor]] = []
    rows = max(1, AT_ONCE // views[0].numel())
    for image_block, view_block in zip(
        torch.split(images, rows), torch.split(views, rows), strict=True
    ):
        every_view = _View.infer(setup, view_block.flatten(0, 1))
        at_mean = torch.zeros(1, 1, every_view.observed.mu.shape[-1], dtype=torch.float64)
        first = every_view.select(slice(0, None, 2))
        second = every_view.select(slice(1, None, 2))
        scores = {CROSS_VIEW: _mutual_evidence(setup, first, second, at_mean).likelihood}
        if not setup.judges_one_view:
            # Each image once per view of it, so that rows of both stand opposite each other.
            repeated = image_block.repeat_interleave(view_block.shape[1], dim=0)
            image = _View.infer(setup, repeated)
            scores[SELF] = _mutual_evidence(setup, image, every_view, at_mean).likelihood
            eps = setup.draw((setup.samples, *at_mean.shape[1:])).double()
            scores[ELBO] = _mutual_evidence(setup, first, second, eps).bound
        count = len(image_block)
        by_block.append({name: -score.view(count, -1).mean(1) for name, score in scores.items()})
    return {name: torch.cat([scores[name] for scores in by_block]) for name in by_block[0]}


class _View(NamedTuple):
    """One view of each of some images, in both roles that it plays."""

    posterior: Gaussian
    """What explains the other view."""
    observed: Gaussian
    """What the other view's posterior explains."""

    @classmethod
    def infer(cls, setup: VariationalSetup, features: Tensor) -> _View:
        """Infer both roles of views from their features ``(M, width)``."""
        posterior = setup.posterior
        return cls(to_float64(posterior.infer(features)), to_float64(posterior.target(features)))

    def select(self, rows: slice) -> _View:
        """Select some of the images."""
        return _View(*(select_images(gaussian, rows) for gaussian in self))


def _mutual_evidence(setup: VariationalSetup, first: _View, second: _View, eps: Tensor) -> Evidence:
    """Mean over both directions: L = 1/2 [L(1 -> 2) + L(2 -> 1)], as both methods train."""
    forward = setup.judge(first.posterior, second.observed, eps)
    backward = setup.judge(second.posterior, first.observed, eps)
    return Evidence(*(0.5 * (a + b) for a, b in zip(forward, backward, strict=True)))
