"""Scores of how foreign an image is to a variational method, from its own bounds.

What such a method trains on says how well one Gaussian explains what was observed; here it is asked
of images that may be foreign.  How it judges, the method's own file says: see
`vssl_dist.methods.base.Variational`.

A method that cannot judge one view has its likelihood and its bound asked of pairs of views: see
`vssl_dist.evaluation.scores.cross_view`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vssl_dist.console.bars import make_progress_bar
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.methods.base import Density, Evidence
from vssl_dist.models.heads import Gaussian

ScoreFunction = Callable[[Tensor], Tensor]
"""Features ``(M, D)`` to float64 ``(M,)`` on the CPU; higher is more anomalous."""
SELF_LIKELIHOOD_NAME = "s1_self_likelihood"
NEGATIVE_ELBO_NAME = "s3_negative_elbo"
MAX_POSTERIOR_NUMBERS = 1 << 22
"""Numbers of a posterior that are worked on at a time."""
_IMAGES_PER_LIKELIHOOD_BLOCK = 64


@dataclass(frozen=True)
class VariationalSetup:
    """A posterior and how its scores are computed."""

    posterior: Posterior
    density: Density = "polar"
    draw_count: int = 8
    """Draws behind an expectation over a posterior, the same for every image."""
    posterior_count: int = 256
    """Training images whose posteriors explain an image."""

    def judge(self, posterior: Gaussian, observed: Gaussian, eps: Tensor) -> Evidence:
        """Tell how well posteriors explain what was observed, by the method's own terms."""
        return self.posterior.cfg.judge(posterior, observed, eps, self.density)

    @property
    def judges_one_view(self) -> bool:
        """Whether an image of which there is one view can be judged."""
        return self.posterior.cfg.judges_one_view

    def draw_noise(self, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers, the same each time; zeros if the method needs none."""
        if not self.posterior.cfg.draws_latents:
            return torch.zeros(1, *shape[1:])
        # One seed for all: images are compared under the same draws, and results repeat.
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_variational_scores(
    setup: VariationalSetup, bank: LabelledFeatures
) -> dict[str, ScoreFunction]:
    """Make the scores that need one look at each image, by name; all rise with foreignness.

    - ``s1_self_likelihood``, where one view can be judged: minus the log-likelihood of what was
      observed under the image's own posterior, its latent at the mean.
    - ``s3_negative_elbo``, likewise: minus the bound of the image on itself.
    - ``s4_posterior_size``: the sum of the log-variances.
    - ``s5_bank_likelihood``: minus the logarithm of the mean likelihood under latents that were
      drawn from the posteriors of training images, one from each of ``setup.posteriors``.
    """
    width = bank.features.shape[1]

    def score_by_block(score: Callable[[Gaussian], Tensor], samples: int = 1) -> ScoreFunction:
        block_rows = max(1, MAX_POSTERIOR_NUMBERS // (samples * width))

        def score_features(features: Tensor) -> Tensor:
            blocks = torch.split(features, block_rows)
            return torch.cat([score(setup.posterior.infer(block)) for block in blocks])

        return score_features

    scores: dict[str, ScoreFunction] = {}
    if setup.judges_one_view:
        samples = setup.draw_count
        scores[SELF_LIKELIHOOD_NAME] = score_by_block(
            lambda gaussian: -_judge_by_own_posterior(setup, gaussian).likelihood
        )
        scores[NEGATIVE_ELBO_NAME] = score_by_block(
            lambda gaussian: -_judge_by_own_posterior(setup, gaussian, samples).bound, samples
        )
    scores["s4_posterior_size"] = partial(posterior_size, setup.posterior)
    scores["s5_bank_likelihood"] = _make_bank_likelihood_score(setup, bank)
    return scores


def posterior_size(posterior: Posterior, features: Tensor) -> Tensor:
    """Sum the log-variances of each image ``(M, width)`` to ``(M,)`` float64."""
    blocks = torch.split(features, max(1, MAX_POSTERIOR_NUMBERS // features.shape[1]))
    return torch.cat(
        [bounded_logvar(posterior, posterior.infer(block)).sum(-1) for block in blocks]
    )


def bounded_logvar(posterior: Posterior, gaussian: Gaussian) -> Tensor:
    """Bring log-variances into the method's bounds, ``(M, D)`` float64."""
    return posterior.cfg.bound_logvar(gaussian.logvar.double())


def _judge_by_own_posterior(
    setup: VariationalSetup, gaussian: Gaussian, samples: int = 0
) -> Evidence:
    """Tell how well each image explains itself, with so many draws or the latent at its mean."""
    float64_gaussian = to_float64(gaussian)
    # eps = 0 puts z = mu + sigma * eps at the mean.
    eps = torch.zeros(1, 1, float64_gaussian.mu.shape[-1], dtype=torch.float64)
    if samples:
        eps = setup.draw_noise((samples, 1, float64_gaussian.mu.shape[-1])).double()
    return setup.judge(float64_gaussian, float64_gaussian, eps)


def _make_bank_likelihood_score(setup: VariationalSetup, bank: LabelledFeatures) -> ScoreFunction:
    """Score by ``-log(1/N sum_n p(h | z_n))``, z_n drawn from the posteriors of N bank images."""
    posterior_count = min(setup.posterior_count, len(bank.labels))
    random_rows = torch.randperm(len(bank.labels), generator=torch.Generator().manual_seed(0))
    bank_posteriors = setup.posterior.infer(
        bank.features[random_rows[:posterior_count].sort().values]
    )
    eps = setup.draw_noise((1, posterior_count, 1, bank_posteriors.mu.shape[-1]))
    largest_width = max(bank_posteriors.h.shape[-1], bank_posteriors.mu.shape[-1])
    block_posteriors = max(
        1, MAX_POSTERIOR_NUMBERS // (_IMAGES_PER_LIKELIHOOD_BLOCK * largest_width)
    )

    def score_block(observed: Gaussian) -> Tensor:
        log_sums = []
        for first_posterior in range(0, posterior_count, block_posteriors):
            selected_posteriors = slice(first_posterior, first_posterior + block_posteriors)
            # (N, 1, D) against the images' (M, D): every posterior meets every image.
            posterior = map_image_fields(
                select_images(bank_posteriors, selected_posteriors),
                lambda field: field.unsqueeze(1),
            )
            likelihood = setup.judge(posterior, observed, eps[:, selected_posteriors]).likelihood
            log_sums.append(likelihood.double().logsumexp(0))
        # In logarithms throughout: likelihoods of wide embeddings are beyond any float's range.
        return math.log(posterior_count) - torch.stack(log_sums).logsumexp(0)

    def score_features(features: Tensor) -> Tensor:
        scores = []
        with make_progress_bar() as progress:
            bar_id = progress.add_task(
                f"likelihoods under {posterior_count} posteriors", total=len(features)
            )
            for feature_block in torch.split(features, _IMAGES_PER_LIKELIHOOD_BLOCK):
                scores.append(score_block(setup.posterior.target(feature_block)))
                progress.update(bar_id, advance=len(feature_block))
        return torch.cat(scores)

    return score_features


def to_float64(gaussian: Gaussian) -> Gaussian:
    """Convert every field of a Gaussian to float64."""
    fields = {name: field for name, field in gaussian._asdict().items() if field is not None}
    return gaussian._replace(**{name: field.double() for name, field in fields.items()})


def select_images(gaussian: Gaussian, rows: slice) -> Gaussian:
    """Select some of the images of a Gaussian."""
    return map_image_fields(gaussian, lambda field: field[rows])


def map_image_fields(gaussian: Gaussian, change_field: Callable[[Tensor], Tensor]) -> Gaussian:
    """Change the fields that there are of each image, not what is learnt for all of them."""
    # A learnt scale has no dimension of images: it is ().
    image_fields = {
        name: field
        for name, field in gaussian._asdict().items()
        if field is not None and field.dim()
    }
    return gaussian._replace(**{name: change_field(field) for name, field in image_fields.items()})
