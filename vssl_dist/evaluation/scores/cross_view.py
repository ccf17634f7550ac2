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
    MAX_POSTERIOR_NUMBERS,
    NEGATIVE_ELBO_NAME,
    SELF_LIKELIHOOD_NAME,
    VariationalSetup,
    select_images,
    to_float64,
)
from vssl_dist.methods.base import Evidence
from vssl_dist.models.heads import Gaussian

CROSS_VIEW_SCORE_NAME = "s2_cross_view_likelihood"


def score_view_pairs(
    setup: VariationalSetup, image_features: Tensor, view_features: Tensor
) -> dict[str, Tensor]:
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
        image_features: Features of each image as it is, ``(M, width)``.
        view_features: Features of T pairs of augmented views of it, ``(M, 2 T, width)``; views 2 t
            and 2 t + 1 are a pair.
    """
    scores_by_block: list[dict[str, Tensor]] = []
    block_images = max(1, MAX_POSTERIOR_NUMBERS // view_features[0].numel())
    for image_block, view_block in zip(
        torch.split(image_features, block_images),
        torch.split(view_features, block_images),
        strict=True,
    ):
        every_view = _ViewGaussians.infer(setup, view_block.flatten(0, 1))
        zero_noise = torch.zeros(1, 1, every_view.observed.mu.shape[-1], dtype=torch.float64)
        first_views = every_view.select(slice(0, None, 2))
        second_views = every_view.select(slice(1, None, 2))
        scores = {
            CROSS_VIEW_SCORE_NAME: _symmetric_evidence(
                setup, first_views, second_views, zero_noise
            ).likelihood
        }
        if not setup.judges_one_view:
            # Each image once per view of it, so that rows of both stand opposite each other.
            repeated_images = image_block.repeat_interleave(view_block.shape[1], dim=0)
            image_gaussians = _ViewGaussians.infer(setup, repeated_images)
            scores[SELF_LIKELIHOOD_NAME] = _symmetric_evidence(
                setup, image_gaussians, every_view, zero_noise
            ).likelihood
            eps = setup.draw_noise((setup.draw_count, *zero_noise.shape[1:])).double()
            scores[NEGATIVE_ELBO_NAME] = _symmetric_evidence(
                setup, first_views, second_views, eps
            ).bound
        image_count = len(image_block)
        scores_by_block.append(
            {name: -score.view(image_count, -1).mean(1) for name, score in scores.items()}
        )
    return {
        name: torch.cat([scores[name] for scores in scores_by_block]) for name in scores_by_block[0]
    }


class _ViewGaussians(NamedTuple):
    """One view of each of some images, in both roles that it plays."""

    posterior: Gaussian
    """What explains the other view."""
    observed: Gaussian
    """What the other view's posterior explains."""

    @classmethod
    def infer(cls, setup: VariationalSetup, features: Tensor) -> _ViewGaussians:
        """Infer both roles of views from their features ``(M, width)``."""
        posterior = setup.posterior
        return cls(to_float64(posterior.infer(features)), to_float64(posterior.target(features)))

    def select(self, rows: slice) -> _ViewGaussians:
        """Select some of the images."""
        return _ViewGaussians(*(select_images(gaussian, rows) for gaussian in self))


def _symmetric_evidence(
    setup: VariationalSetup, first_views: _ViewGaussians, second_views: _ViewGaussians, eps: Tensor
) -> Evidence:
    """Mean over both directions: L = 1/2 [L(1 -> 2) + L(2 -> 1)], as both methods train."""
    first_explains_second = setup.judge(first_views.posterior, second_views.observed, eps)
    second_explains_first = setup.judge(second_views.posterior, first_views.observed, eps)
    return Evidence(
        *(
            0.5 * (forward_term + backward_term)
            for forward_term, backward_term in zip(
                first_explains_second, second_explains_first, strict=True
            )
        )
    )
