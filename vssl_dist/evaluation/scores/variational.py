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

from vssl_dist.console.bars import progress_bar
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.table import Features
from vssl_dist.methods.base import Density, Evidence
from vssl_dist.models.heads import Gaussian

Score = Callable[[Tensor], Tensor]
"""Features ``(M, D)`` to float64 ``(M,)`` on the CPU; higher is more anomalous."""
SELF, ELBO = "s1_self_likelihood", "s3_negative_elbo"
AT_ONCE = 1 << 22
"""Numbers of a posterior that are worked on at a time."""
_ROWS = 64


@dataclass(frozen=True)
class Scoring:
    """A posterior and how its scores are computed."""

    posterior: Posterior
    density: Density = "polar"
    samples: int = 8
    """Draws behind an expectation over a posterior, the same for every image."""
    posteriors: int = 256
    """Training images whose posteriors explain an image."""

    def judge(self, posterior: Gaussian, observed: Gaussian, eps: Tensor) -> Evidence:
        """Tell how well posteriors explain what was observed, by the method's own terms."""
        return self.posterior.cfg.judge(posterior, observed, eps, self.density)

    @property
    def alone(self) -> bool:
        """Whether an image of which there is one view can be judged."""
        return self.posterior.cfg.judges_one_view

    def draws(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal draws, the same each time; zeros if the method needs none."""
        if not self.posterior.cfg.draws_latents:
            return torch.zeros(1, *shape[1:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def variational_scores(setup: Scoring, bank: Features) -> dict[str, Score]:
    """The scores that need one look at each image, by name; all rise with foreignness.

    - ``s1_self_likelihood``, where one view can be judged: minus the log-likelihood of what was
      observed under the image's own posterior, its latent at the mean.
    - ``s3_negative_elbo``, likewise: minus the bound of the image on itself.
    - ``s4_posterior_size``: the sum of the log-variances.
    - ``s5_bank_likelihood``: minus the logarithm of the mean likelihood under latents that were
      drawn from the posteriors of training images, one from each of ``setup.posteriors``.
    """
    width = bank.features.shape[1]

    def by_block(score: Callable[[Gaussian], Tensor], samples: int = 1) -> Score:
        rows = max(1, AT_ONCE // (samples * width))

        def whole(features: Tensor) -> Tensor:
            blocks = torch.split(features, rows)
            return torch.cat([score(setup.posterior.infer(block)) for block in blocks])

        return whole

    scores: dict[str, Score] = {}
    if setup.alone:
        count = setup.samples
        scores[SELF] = by_block(lambda found: -_alone(setup, found).likelihood)
        scores[ELBO] = by_block(lambda found: -_alone(setup, found, count).bound, count)
    scores["s4_posterior_size"] = partial(posterior_size, setup.posterior)
    scores["s5_bank_likelihood"] = _bank_likelihood(setup, bank)
    return scores


def posterior_size(posterior: Posterior, features: Tensor) -> Tensor:
    """The sum of the log-variances of each image ``(M, width)``: ``(M,)`` float64."""
    blocks = torch.split(features, max(1, AT_ONCE // features.shape[1]))
    return torch.cat([logvars(posterior, posterior.infer(block)).sum(-1) for block in blocks])


def logvars(posterior: Posterior, found: Gaussian) -> Tensor:
    """Log-variances within the method's bounds, ``(M, D)`` float64."""
    return posterior.cfg.bound_logvar(found.logvar.double())


def _alone(setup: Scoring, found: Gaussian, samples: int = 0) -> Evidence:
    """How well each image explains itself, latents at the mean or drawn."""
    exact = double(found)
    still = torch.zeros(1, 1, exact.mu.shape[-1], dtype=torch.float64)
    eps = setup.draws((samples, 1, exact.mu.shape[-1])).double() if samples else still
    return setup.judge(exact, exact, eps)


def _bank_likelihood(setup: Scoring, bank: Features) -> Score:
    count = min(setup.posteriors, len(bank.labels))
    order = torch.randperm(len(bank.labels), generator=torch.Generator().manual_seed(0))
    known = setup.posterior.infer(bank.features[order[:count].sort().values])
    eps = setup.draws((1, count, 1, known.mu.shape[-1]))
    widest = max(known.h.shape[-1], known.mu.shape[-1])
    some = max(1, AT_ONCE // (_ROWS * widest))

    def score(observed: Gaussian) -> Tensor:
        parts = []
        for first in range(0, count, some):
            taken = slice(first, first + some)
            posterior = each(rows_of(known, taken), lambda field: field.unsqueeze(1))
            likelihood = setup.judge(posterior, observed, eps[:, taken]).likelihood
            parts.append(likelihood.double().logsumexp(0))
        return math.log(count) - torch.stack(parts).logsumexp(0)

    def whole(features: Tensor) -> Tensor:
        found = []
        with progress_bar() as shown:
            task = shown.add_task(f"likelihoods under {count} posteriors", total=len(features))
            for block in torch.split(features, _ROWS):
                found.append(score(setup.posterior.target(block)))
                shown.update(task, advance=len(block))
        return torch.cat(found)

    return whole


def double(found: Gaussian) -> Gaussian:
    """The same in float64."""
    given = {name: field for name, field in found._asdict().items() if field is not None}
    return found._replace(**{name: field.double() for name, field in given.items()})


def rows_of(found: Gaussian, rows: slice) -> Gaussian:
    """Some of the images."""
    return each(found, lambda field: field[rows])


def each(found: Gaussian, change: Callable[[Tensor], Tensor]) -> Gaussian:
    """Change what there is of each image, not what is learnt for all of them."""
    own = {n: field for n, field in found._asdict().items() if field is not None and field.dim()}
    return found._replace(**{name: change(field) for name, field in own.items()})
