"""VJE: Joint Embedding Variational Bayes (Oji & Fieguth, 2026), arXiv 2602.05639.

A latent-variable model whose observations are embeddings.  An inference network reads one view's
embedding and gives a diagonal Gaussian posterior; a sample of it, in polar coordinates, explains
direction and norm of the other view's embedding, which is held fixed, under Student-t likelihoods.
The posterior's variances are also the scales of the directional likelihood.  There is no projector.

Of foreign images the bound is asked, too.  Training's likelihoods are ``polar``: densities of an
embedding's direction and norm.  As densities of the embedding itself, ``cartesian``, they are
divided by the area of the sphere that it lies on.  Training never sees that term, which of D
dimensions is (D - 1) log |h| and outweighs all others: what is left is a ranking by the norm.

This was written from the abstract and public notes, not from the paper's method section.  What
those do not settle is a key below, marked DERIVED (our reading or inference) or UNKNOWN (the notes
are silent; the default is ours).  No default here is a figure of the paper.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vssl_dist.config import MethodConfig
from vssl_dist.config.fields import Float, Pair
from vssl_dist.densities import (
    Form,
    at_least_float32,
    directional_log_prob,
    gaussian_kl,
    radial_log_prob,
)
from vssl_dist.methods import monitors
from vssl_dist.methods.base import Density, Evidence, LossOutput, MicroStep, Noise, two_views
from vssl_dist.methods.views import forward_views
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Encoder, Gaussian, GaussianBranch, mlp

Positive = Annotated[Float, Field(gt=0)]
Weight = Annotated[Float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0)]
_NOTED = {"variances": "shared", "target": "stop_gradient"}
"""Keys that the public notes settle, for either version of the paper."""


class VJEConfig(MethodConfig):
    """VJE's own keys."""

    has_posterior: ClassVar[bool] = True
    has_embedding_density: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vje_derived_v3": {"form": "tangent_chord"} | _NOTED,
        "vje_derived_v1": {"form": "ambient"} | _NOTED,
    }

    name: Literal["vje"] = "vje"
    zero_init_residual: bool = False
    """UNKNOWN.  Start residual blocks as the identity; off, because embeddings near zero have no
    direction."""
    preset: Literal["vje_derived_v3", "vje_derived_v1"] | None = None
    """DERIVED.  Our reading of a version of the paper, which settles ``form``, ``variances`` and
    ``target``: v3's directional likelihood lives on the sphere itself, v1's in the space around it;
    null: each key is free."""
    form: Form = "tangent_chord"
    """UNKNOWN.  Form of the directional likelihood; ``densities.directional_log_prob`` defines
    each."""
    dof: Positive = 3.0
    """UNKNOWN.  Degrees of freedom of the directional likelihood; ``inf`` is the Gaussian."""
    dof_radial: Positive | None = None
    """UNKNOWN.  Degrees of freedom of the radial likelihood; null: equal to ``dof``."""
    radial: Literal["linear", "log"] = "linear"
    """UNKNOWN.  Whether the radial likelihood is a density of the norm or of its logarithm."""
    radial_scale: Annotated[Positive, Field(allow_inf_nan=False)] = 1.0
    """UNKNOWN.  Scale of the radial likelihood, or its initial value where it is learnt."""
    learn_radial_scale: bool = False
    """UNKNOWN.  Whether the scale of the radial likelihood is a parameter, one for all images."""
    radial_weight: Weight = 1.0
    """DERIVED.  Weight of the radial term, which is 1 in an evidence lower bound."""
    beta: Weight = 1.0
    """UNKNOWN.  Weight of the KL divergence, which is 1 in an evidence lower bound; below 1 the
    variances are rewarded for shrinking."""
    beta_warmup_epochs: Weight = 0.0
    """DERIVED.  Epochs over which the KL divergence's weight rises linearly from 0 to ``beta``; 0:
    none."""
    kl_reduce: Literal["sum", "mean"] = "sum"
    """DERIVED.  ``mean`` divides the KL divergence by the embedding's width, ``sum`` does not."""
    prior_scale: Annotated[Positive, Field(allow_inf_nan=False)] = 1.0
    """UNKNOWN.  Standard deviation of the zero-mean isotropic Gaussian prior."""
    samples: Count = 1
    """UNKNOWN.  Posterior samples per image and step."""
    location: Literal["sample", "mean"] = "sample"
    """UNKNOWN.  Whether a sample or the posterior's mean explains the other view."""
    variances: Literal["shared", "separate"] = "shared"
    """DERIVED.  Whether the squared scales of the directional likelihood are the posterior's
    variances, as the notes say, or, as a control of that claim, outputs of their own."""
    logvar_range: Pair = (-10.0, 6.0)
    """UNKNOWN.  Bounds that log-variances and log squared scales are clamped to."""
    target: Literal["stop_gradient", "ema"] = "stop_gradient"
    """DERIVED.  Network whose embedding is the observation: the student's, held fixed, or an EMA
    teacher's."""
    hidden: Count | None = None
    """UNKNOWN.  Hidden width of the inference network; null: a quarter of the embedding's width."""

    @model_validator(mode="after")
    def _ordered(self) -> VJEConfig:
        low, high = self.logvar_range
        if not low < high:
            raise ValueError(f"logvar_range=[{low}, {high}] must ascend")
        return self

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher: where the targets are those of a moving average."""
        return self.target == "ema"

    @property
    def judges_one_view(self) -> bool:
        """Whether one view suffices: always, as the observation is an embedding."""
        return True

    @property
    def draws_latents(self) -> bool:
        """Whether a sample of the posterior explains the other view, not its mean."""
        return self.location != "mean"

    def bound_logvar(self, logvar: Tensor) -> Tensor:
        """Clamp log-variances to ``logvar_range``."""
        return logvar.clamp(*self.logvar_range)

    def judge(
        self, posterior: Gaussian, observed: Gaussian, eps: Tensor, density: Density
    ) -> Evidence:
        """Tell how well posteriors explain embeddings; see `methods.base.Variational`."""
        terms = elbo(posterior, eps, observed.h, self)
        log_area: Tensor | float = 0.0
        if density == "cartesian":
            # A density of the norm's logarithm has one more factor of the norm to lose.
            powers = observed.h.shape[-1] - (self.radial == "linear")
            log_area = powers * polar(observed.h)[0].log()
        likelihood = terms.directional + self.radial_weight * terms.radial
        return Evidence(likelihood - log_area, terms.total(self) - log_area)


class VJE:
    """Student, teacher where the target is one, and the loss on two views."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: VJEConfig, image_size: int, any_size: bool = False) -> None:
        self.cfg = cfg
        backbone, width = build_backbone(
            cfg.backbone, image_size, zero_init_residual=cfg.zero_init_residual, any_size=any_size
        )
        own_scales = cfg.variances == "separate"
        outputs = (3 if own_scales else 2) * width
        self.student: nn.Module = GaussianBranch(
            backbone,
            mlp(width, cfg.hidden or max(width // 4, 1), outputs),
            own_scales=own_scales,
            radial_scale=cfg.radial_scale if cfg.learn_radial_scale else None,
        )
        self.teacher: nn.Module | None = None
        if cfg.target == "ema":
            self.teacher = Encoder(copy.deepcopy(backbone)).requires_grad_(False)

    def loss(self, views: Sequence[Tensor], micro_step: MicroStep) -> LossOutput:
        """Minus the symmetric bound: each view's posterior explains the other's embedding."""
        cfg = self.cfg
        pair = two_views(views)
        posteriors: list[Gaussian] = forward_views(self.student, pair)
        posterior_1, posterior_2 = posteriors
        # The observation is held fixed: a gradient through it would draw all embeddings together.
        target_1, target_2 = posterior_1.h.detach(), posterior_2.h.detach()
        if self.teacher is not None:
            with torch.no_grad():
                targets: list[Tensor] = forward_views(self.teacher, pair)
            target_1, target_2 = targets
        eps_1 = draw(cfg, micro_step, "posterior/1", posterior_1.mu)
        eps_2 = draw(cfg, micro_step, "posterior/2", posterior_2.mu)
        forward = elbo(posterior_1, eps_1, target_2, cfg)
        back = elbo(posterior_2, eps_2, target_1, cfg)
        epoch = micro_step.epoch
        loss = -0.5 * (forward.total(cfg, epoch) + back.total(cfg, epoch)).mean()

        def metrics() -> dict[str, Tensor]:
            figures = _metrics(posterior_1, target_2, forward, back, cfg)
            figures |= monitors.views(
                posterior_1.h, posterior_2.h, None if self.teacher is None else target_1
            )
            return figures | {"kl_weight": loss.new_full((), kl_weight(cfg, epoch))}

        return LossOutput(loss, posterior_1.h.detach(), metrics)


class Bound(NamedTuple):
    """The terms of one direction's evidence lower bound, each ``(B,)``."""

    directional: Tensor
    radial: Tensor
    kl: Tensor

    def total(self, cfg: VJEConfig, epoch: float = math.inf) -> Tensor:
        """The bound ``(B,)`` with the weights it has after ``epoch`` epochs."""
        kl = kl_weight(cfg, epoch) * self.kl
        return self.directional + cfg.radial_weight * self.radial - kl


def kl_weight(cfg: VJEConfig, epoch: float) -> float:
    """Weight of the KL divergence after ``epoch`` epochs.

    >>> [kl_weight(VJEConfig(beta=0.5, beta_warmup_epochs=10), e) for e in (0, 5, 10, 99)]
    [0.0, 0.25, 0.5, 0.5]
    """
    if epoch >= cfg.beta_warmup_epochs:
        return cfg.beta
    return cfg.beta * epoch / cfg.beta_warmup_epochs


def elbo(posterior: Gaussian, eps: Tensor, target: Tensor, cfg: VJEConfig) -> Bound:
    """Evidence lower bound of one view's embedding under the posterior of the other view.

    Args:
        posterior: Mean and unbounded log-variance ``(B, D)``, and what is learnt beside them.
        eps: Standard normal draws ``(S, B, D)``; zeros put the latent at the posterior's mean.
        target: The other view's embedding ``(B, D)``, a fixed observation: detached.
        cfg: Likelihoods and weights.
    """
    mu, logvar, eps, observed = at_least_float32(posterior.mu, posterior.logvar, eps, target)
    logvar = logvar.clamp(*cfg.logvar_range)
    scales = logvar
    if posterior.scale_logvar is not None:
        scales = posterior.scale_logvar.to(logvar.dtype).clamp(*cfg.logvar_range)
    radius, direction = polar(observed)
    latent_radius, latent_direction = polar(mu + torch.exp(0.5 * logvar) * eps)
    # With shared variances, beta 1 and the ambient form the log-determinants of likelihood and KL
    # cancel (the tangent forms leave half a log(m' S m)): no explicit reward for sigma -> 0.
    directional = directional_log_prob(direction, latent_direction, scales, cfg.dof, cfg.form)
    if cfg.radial == "log":
        radius, latent_radius = radius.log(), latent_radius.log()
    tau = cfg.radial_scale if posterior.radial_scale is None else posterior.radial_scale
    radial = radial_log_prob(radius, latent_radius, cfg.dof_radial or cfg.dof, tau)
    prior_logvar = torch.full_like(logvar, 2 * math.log(cfg.prior_scale))
    # In closed form: no sampling noise in the term that holds the variances.
    kl = gaussian_kl(mu, logvar, None, prior_logvar)
    if cfg.kl_reduce == "mean":
        kl = kl / mu.shape[-1]
    return Bound(directional.mean(0), radial.mean(0), kl)


def polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Norms ``(...,)`` and unit vectors ``(..., D)`` of ``(..., D)``.

    >>> radius, direction = polar(torch.tensor([3.0, 0.0, 4.0]))
    >>> radius.item(), [round(value, 4) for value in direction.tolist()]
    (5.0, [0.6, 0.0, 0.8])
    """
    # Not norm().clamp_min(): its gradient at zero is not a number.
    radius = (x.square().sum(-1) + torch.finfo(x.dtype).tiny).sqrt()
    return radius, x / radius.unsqueeze(-1)


def draw(cfg: VJEConfig, noise: Noise, branch: str, mu: Tensor) -> Tensor:
    """Draws ``(S, B, D)`` for means ``(B, D)``: zeros where the mean itself is the location."""
    if not cfg.draws_latents:
        return torch.zeros_like(mu).unsqueeze(0)
    return noise.normal(branch, (mu.shape[0], cfg.samples, mu.shape[1])).movedim(1, 0)


def _metrics(
    posterior: Gaussian, target: Tensor, forward: Bound, back: Bound, cfg: VJEConfig
) -> dict[str, Tensor]:
    width = posterior.mu.shape[-1]
    # A mean over D is per dimension already.
    summed_dims = 1 if cfg.kl_reduce == "mean" else width
    with torch.no_grad():
        terms = {
            name: 0.5 * (getattr(forward, name) + getattr(back, name)).mean()
            for name in Bound._fields
        }
        terms["kl_per_dim"] = terms["kl"] / summed_dims
        terms["alignment_cos"] = monitors.alignment_cos(posterior.mu, target)
        if posterior.radial_scale is not None:
            terms["radial_scale"] = posterior.radial_scale.detach()
        terms |= monitors.scale(posterior.logvar.float().clamp(*cfg.logvar_range))
        if posterior.scale_logvar is not None:
            scales = posterior.scale_logvar.float().clamp(*cfg.logvar_range)
            terms |= monitors.scale(scales, "likelihood_scale")
    return terms
