"""VSSL: Variational Self-Supervised Learning (Yavuz & Yanikoglu, 2025), arXiv 2504.04318.

Two encoders with Gaussian outputs and no decoder.  The teacher, an exponential moving average of
the student, sees one view and gives the prior; the student sees the other and gives the posterior.
The bound's reconstruction is replaced by denoising across the views, the KL divergence runs from
student to teacher, and both exist in cosine forms.

There is no likelihood of an embedding, only of one view's latent under another's Gaussian.  Of one
view alone it says no more than the size of the posterior does, so that evaluations ask it of pairs.

This was written from the abstract and a public review, not from the paper's method section.  What
those do not settle is a key below, marked DERIVED (our reading or inference) or UNKNOWN (the notes
are silent; the default is ours).  No default here is a figure of the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.config.fields import Float, Pair
from vssl_dist.densities import (
    at_least_float32,
    gaussian_expected_log_prob,
    gaussian_kl,
    gaussian_log_prob,
)
from vssl_dist.methods import monitors
from vssl_dist.methods.base import Density, Evidence, LossOutput, Noise, two_views
from vssl_dist.methods.views import forward_views
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Gaussian, GaussianBranch, mlp

Weight = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Width = Annotated[int, Field(gt=0)]


class VSSLConfig(MethodConfig):
    """VSSL's own keys; the teacher's decay is ``engine.ema_decay``."""

    has_posterior: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vssl_derived_gauss": {"denoising": "A", "cosine": "none", "radius": "one"},
        "vssl_derived_cos": {"denoising": "A", "cosine": "C1", "radius": "sqrt_dim"},
    }

    name: Literal["vssl"] = "vssl"
    zero_init_residual: bool = False
    """UNKNOWN.  Start every residual block as the identity."""
    preset: Literal["vssl_derived_gauss", "vssl_derived_cos"] | None = None
    """DERIVED.  Gaussian terms or cosine ones, which settles ``denoising``, ``cosine`` and
    ``radius``; null: each key is free."""
    denoising: Literal["A", "B"] = "A"
    """UNKNOWN.  Term that takes the reconstruction's place.  A: expected log-density of the
    teacher's Gaussian under the student's, in closed form.  B: the student's log-density of the
    teacher's latent.  Form C3 of ``cosine`` brings its own."""
    cosine: Literal["none", "C1", "C2", "C3"] = "C1"
    """UNKNOWN.  Where cosines replace distances.  C1: unit means in both terms.  C2: the squared
    distance of the means becomes ``2 - 2 cos`` over the mean variance.  C3: cosines of latents,
    means and standard deviations."""
    radius: Literal["one", "sqrt_dim"] = "one"
    """DERIVED.  Length of C1's means.  ``sqrt_dim``: the square root of ``dim``, so that a variance
    of 1 is of the size of a mean's entry; at ``one`` it drowns the means until the variances have
    shrunk."""
    latent: Literal["sample", "mean"] = "sample"
    """UNKNOWN.  Whether form B (of the teacher) and form C3 (of the student) use a sample of the
    latent or its mean."""
    beta: Weight = 1.0
    """UNKNOWN.  Weight of the KL divergence."""
    logvar_bound: Literal["soft", "clamp"] = "soft"
    """DERIVED.  Form of the log-variances' bounds.  ``soft``: a tanh between the bounds, so that a
    variance near its floor still has a gradient; ``clamp`` is a cliff."""
    logvar_range: Pair = (-6.0, 3.0)
    """UNKNOWN.  Bounds of the log-variances: without them they shrink without end."""
    variance_weight: Weight = 0.0
    """DERIVED.  Weight of the divergence of the student's variances from 1.  Form A rewards small
    variances whatever the means do: at weight 1 they still shrink, ever more slowly; above 1 they
    rest at ``1 - 1 / weight`` (``beta: 1``)."""
    hidden: Width = 4096
    """UNKNOWN.  Width of the hidden layers of the head and of the predictor."""
    head_layers: Literal[2, 3] = 3
    """UNKNOWN.  Number of linear layers of the head."""
    dim: Width = 256
    """UNKNOWN.  Width of the Gaussians."""
    predictor: bool = True
    """UNKNOWN.  Whether the student predicts the teacher's mean through one more network."""
    evaluated: Literal["student", "teacher"] = "teacher"
    """UNKNOWN.  Network whose backbone is exported and judged."""

    @model_validator(mode="after")
    def _consistent(self) -> VSSLConfig:
        low, high = self.logvar_range
        if not low < high:
            raise ValueError(f"logvar_range=[{low}, {high}] must ascend")
        if self.cosine == "C3" and self.denoising == "B":
            raise ValueError("denoising=B has no meaning under cosine=C3, which brings its own")
        if self.radius != "one" and self.cosine != "C1":
            raise ValueError(f"radius={self.radius} is of cosine=C1, not of cosine={self.cosine}")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: VSSL always has one."""
        return True

    @property
    def judges_one_view(self) -> bool:
        """Whether one view suffices: never, as the observation is another view's Gaussian."""
        return False

    @property
    def draws_latents(self) -> bool:
        """Whether the denoising term has a latent that is no mean: form A is in closed form."""
        return self.latent == "sample" and (self.denoising != "A" or self.cosine == "C3")

    def bound_logvar(self, logvar: Tensor) -> Tensor:
        """Bring log-variances into ``logvar_range``."""
        return bounded(logvar, self)

    def judge(
        self, posterior: Gaussian, observed: Gaussian, eps: Tensor, density: Density
    ) -> Evidence:
        """Tell how well posteriors meet other views' Gaussians; see `methods.base.Variational`."""
        terms = [bound(posterior, observed, draws, self) for draws in eps]
        return Evidence(
            torch.stack([term.denoising for term in terms]).mean(0),
            torch.stack([term.total(self) for term in terms]).mean(0),
        )


class VSSL:
    """Student and teacher, and the loss on two views."""

    def __init__(self, cfg: VSSLConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        self.evaluated = cfg.evaluated
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        posterior = mlp(width, *[cfg.hidden] * (cfg.head_layers - 1), 2 * cfg.dim)
        predictor = mlp(cfg.dim, cfg.hidden, cfg.dim) if cfg.predictor else None
        self.student: nn.Module = GaussianBranch(backbone, posterior, predictor)
        teacher = copy.deepcopy(GaussianBranch(backbone, posterior))
        self.teacher: nn.Module | None = teacher.requires_grad_(False)

    def loss(self, views: Sequence[Tensor], noise: Noise) -> LossOutput:
        """Minus the symmetric bound: each view's posterior against the other view's prior."""
        cfg = self.cfg
        pair = two_views(views)
        assert self.teacher is not None
        with torch.no_grad():
            priors: list[Gaussian] = forward_views(self.teacher, pair)
        prior_1, prior_2 = priors
        posteriors: list[Gaussian] = forward_views(self.student, pair)
        posterior_1, posterior_2 = posteriors
        forward = bound(posterior_1, prior_2, draw(cfg, noise, "latent/1", posterior_1.mu), cfg)
        back = bound(posterior_2, prior_1, draw(cfg, noise, "latent/2", posterior_2.mu), cfg)
        loss = -0.5 * (forward.total(cfg) + back.total(cfg)).mean()

        def metrics() -> dict[str, Tensor]:
            figures = _metrics(posterior_1, prior_2, forward, back, cfg)
            return figures | monitors.views(posterior_1.h, posterior_2.h, prior_1.h)

        return LossOutput(loss, posterior_1.h.detach(), metrics)


class Bound(NamedTuple):
    """The terms of one direction's bound, each ``(B,)``."""

    denoising: Tensor
    kl: Tensor
    variance: Tensor

    def total(self, cfg: VSSLConfig) -> Tensor:
        """The bound ``(B,)``."""
        return self.denoising - cfg.beta * self.kl - cfg.variance_weight * self.variance


def bound(student: Gaussian, teacher: Gaussian, eps: Tensor, cfg: VSSLConfig) -> Bound:
    """Bound of the student's posterior of one view under the teacher's prior of the other.

    Args:
        student: Mean and unbounded log-variance ``(B, D)``.
        teacher: Mean and unbounded log-variance ``(B, D)``; no gradient flows into it.
        eps: Standard normal draws ``(B, D)`` of the latent; zeros put it at the mean.
        cfg: The form of each term.
    """
    mu_s, mu_t, raw_s, raw_t, eps = at_least_float32(
        student.mu, teacher.mu.detach(), student.logvar, teacher.logvar.detach(), eps
    )
    logvar_s, logvar_t = bounded(raw_s, cfg), bounded(raw_t, cfg)
    variance = gaussian_kl(torch.zeros_like(mu_s), logvar_s)
    if cfg.cosine == "C1":
        length = math.sqrt(mu_s.shape[-1]) if cfg.radius == "sqrt_dim" else 1.0
        mu_s, mu_t = length * F.normalize(mu_s, dim=-1), length * F.normalize(mu_t, dim=-1)
    pair = Pairing(mu_s, logvar_s, mu_t, logvar_t)
    if cfg.cosine == "C3":
        return Bound(*_pure_cosine(pair, eps), variance)
    latent = mu_t + torch.exp(0.5 * logvar_t) * eps
    if cfg.cosine == "C2":
        return Bound(_isotropic_denoising(pair, latent, cfg), _isotropic_kl(pair), variance)
    # Form A is minus the entropy of the student's Gaussian minus the KL divergence, so that the
    # bound grows without end as variances shrink: hence their bounds and `variance_weight`.
    if cfg.denoising == "A":
        denoising = gaussian_expected_log_prob(mu_s, logvar_s, mu_t, logvar_t)
    else:
        denoising = gaussian_log_prob(latent, mu_s, logvar_s)
    # From student to teacher: the review of the paper states this direction.
    return Bound(denoising, gaussian_kl(mu_s, logvar_s, mu_t, logvar_t), variance)


class Pairing(NamedTuple):
    """Student and teacher Gaussians with bounded log-variances, each ``(B, D)``."""

    mu_s: Tensor
    logvar_s: Tensor
    mu_t: Tensor
    logvar_t: Tensor


def _isotropic_kl(pair: Pairing) -> Tensor:
    """C2: Gaussian KL whose mean part is ``2 - 2 cos`` over the teacher's mean variance."""
    centred = torch.zeros_like(pair.mu_s)
    spreads = gaussian_kl(centred, pair.logvar_s, centred, pair.logvar_t)
    return spreads + 0.5 * _unit_distance(pair.mu_s, pair.mu_t) / pair.logvar_t.exp().mean(-1)


def _isotropic_denoising(pair: Pairing, latent: Tensor, cfg: VSSLConfig) -> Tensor:
    """C2: forms A and B whose squared distances are ``2 - 2 cos`` over a mean variance."""
    centred = torch.zeros_like(pair.mu_s)
    if cfg.denoising == "A":
        spreads = gaussian_expected_log_prob(centred, pair.logvar_s, centred, pair.logvar_t)
        return spreads - 0.5 * _unit_distance(pair.mu_s, pair.mu_t) / pair.logvar_t.exp().mean(-1)
    spreads = gaussian_log_prob(centred, centred, pair.logvar_s)
    return spreads - 0.5 * _unit_distance(pair.mu_s, latent) / pair.logvar_s.exp().mean(-1)


def _pure_cosine(pair: Pairing, eps: Tensor) -> tuple[Tensor, Tensor]:
    """C3: denoising and KL from cosines alone; the KL is no divergence (blind to scales)."""
    sigma_s, sigma_t = torch.exp(0.5 * pair.logvar_s), torch.exp(0.5 * pair.logvar_t)
    denoising = F.cosine_similarity(pair.mu_s + sigma_s * eps, pair.mu_t, dim=-1)
    means = F.cosine_similarity(pair.mu_s, pair.mu_t, dim=-1)
    return denoising, (1 - means) + (1 - F.cosine_similarity(sigma_s, sigma_t, dim=-1))


def _unit_distance(a: Tensor, b: Tensor) -> Tensor:
    """``|a/|a| - b/|b||^2`` of ``(B, D)`` and ``(B, D)`` -> ``(B,)``."""
    return 2 - 2 * F.cosine_similarity(a, b, dim=-1)


def bounded(logvar: Tensor, cfg: VSSLConfig) -> Tensor:
    """Bring log-variances into ``cfg.logvar_range``.

    The soft bound has slope 1 in the middle of the range and flattens towards its ends.

    >>> bounded(torch.tensor([-1.5, 100.0]), VSSLConfig()).tolist()
    [-1.5, 3.0]
    """
    low, high = cfg.logvar_range
    if cfg.logvar_bound == "clamp":
        return logvar.clamp(low, high)
    middle, half = (low + high) / 2, (high - low) / 2
    return middle + half * torch.tanh((logvar - middle) / half)


def draw(cfg: VSSLConfig, noise: Noise, branch: str, mu: Tensor) -> Tensor:
    """Draws ``(B, D)`` of the latent: zeros where the mean itself is the latent, or none is."""
    if not cfg.draws_latents:
        return torch.zeros_like(mu)
    return noise.normal(branch, mu.shape)


def _metrics(
    posterior: Gaussian, prior: Gaussian, forward: Bound, back: Bound, cfg: VSSLConfig
) -> dict[str, Tensor]:
    with torch.no_grad():
        terms = {
            name: 0.5 * (getattr(forward, name) + getattr(back, name)).mean()
            for name in Bound._fields
        }
        terms["kl_per_dim"] = terms["kl"] / posterior.mu.shape[-1]
        terms["alignment_cos"] = monitors.alignment_cos(posterior.mu, prior.mu)
        terms["projection_spread"] = monitors.spread(prior.mu)
        logvar = bounded(posterior.logvar.detach().float(), cfg)
    return terms | monitors.scale(logvar)
