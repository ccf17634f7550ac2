from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor, nn

from tests.support.views import NoNoise, SameNoise, at, two_views
from vssl_dist.densities import FORMS
from vssl_dist.methods import GlobalNoise, build_method
from vssl_dist.methods.monitors import CHECK_EVERY, CollapseAlarm, embedding, spread
from vssl_dist.methods.vje import VJE, Bound, VJEConfig, draw, elbo, polar
from vssl_dist.models.heads import Gaussian, GaussianBranch, mlp


def f64(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


TARGET = f64(3, 0, 4)
MU, LOGVAR = f64(0, 0, 2), f64(0.25, 1, 4).log()
NO_EPS = torch.zeros(1, 1, 3, dtype=torch.float64)


def config(**keys: Any) -> VJEConfig:
    return VJEConfig(**{"backbone": "resnet18_c16", "dof": 3.0} | keys)


def golden(cfg: VJEConfig, mu: Tensor = MU, logvar: Tensor = LOGVAR) -> Bound:
    return elbo(Gaussian(TARGET, mu, logvar), NO_EPS, TARGET, cfg)


@pytest.mark.parametrize(
    ("form", "want"), [("ambient", -10.6324368380), ("tangent_log", -9.1422697004)]
)
def test_bound_has_its_golden_value(form: str, want: float) -> None:
    cfg = config(form=form)
    bound = golden(cfg)
    assert bound.total(cfg).item() == pytest.approx(want, rel=1e-6)
    assert bound.kl.item() == pytest.approx(3.125, rel=1e-6)
    assert bound.radial.item() == pytest.approx(-3.7734775719, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "d_mu", "d_logvar"),
    [
        ("ambient", (1.6179775281, 0, -1), (0.8457865169, -0.5, -1.9932584270)),
        ("tangent_log", (1.3819787907, 0, -1), (0.7643048841, -0.5, -1.5)),
    ],
)
def test_bound_has_its_golden_gradients(
    form: str, d_mu: tuple[float, ...], d_logvar: tuple[float, ...]
) -> None:
    cfg = config(form=form)
    mu, logvar = MU.clone().requires_grad_(), LOGVAR.clone().requires_grad_()
    golden(cfg, mu, logvar).total(cfg).sum().backward()
    torch.testing.assert_close(mu.grad, f64(*d_mu), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(logvar.grad, f64(*d_logvar), rtol=1e-6, atol=1e-9)


class Fixed(nn.Module):
    """A student that answers with prepared Gaussians, whatever the view shows."""

    def __init__(self, *answers: Gaussian) -> None:
        super().__init__()
        self.answers = list(answers)

    def forward(self, _: Tensor) -> Gaussian:
        return self.answers.pop(0)


def test_loss_is_minus_half_of_both_bounds_averaged_over_the_batch() -> None:
    cfg = config(form="ambient", location="mean")
    method = VJE(cfg, 32)
    other = Gaussian(TARGET, f64(1, -1, 0.5), f64(0, 0.3, -0.2))
    one = Gaussian(f64(-1, 2, 2), MU, LOGVAR)
    method.student = Fixed(one, other)
    back = elbo(other, NO_EPS, one.h, cfg).total(cfg)
    loss = method.loss(two_views(1), at(0, NoNoise())).loss
    assert loss.item() == pytest.approx(-0.5 * (-10.6324368380 + back.item()), rel=1e-6)


def test_tail_weight_and_scale_of_each_factor_are_separate_keys() -> None:
    direction = golden(config(form="ambient", dof=10.0, dof_radial=3.0))
    assert direction.directional.item() == pytest.approx(-3.5665943793, rel=1e-6)
    assert direction.radial.item() == pytest.approx(-3.7734775719, rel=1e-6)
    limit = golden(config(form="ambient", dof=math.inf))
    assert limit.directional.item() == pytest.approx(-3.4818155996, rel=1e-6)
    assert limit.radial.item() == pytest.approx(-5.4189385332, rel=1e-6)
    wide = golden(config(radial_scale=2.0))
    t = torch.distributions.StudentT(3.0, 2.0, 2.0)
    assert wide.radial.item() == pytest.approx(t.log_prob(torch.tensor(5.0)).item(), rel=1e-6)
    log = golden(config(radial="log"))
    t = torch.distributions.StudentT(3.0, math.log(2), 1.0)
    want = t.log_prob(torch.tensor(math.log(5))).item()
    assert log.radial.item() == pytest.approx(want, rel=1e-6)


def test_weights_and_prior_enter_the_bound_where_they_should() -> None:
    strict = golden(config())
    cfg = config(beta=0.1, radial_weight=0.0)
    want = strict.directional - 0.1 * strict.kl
    torch.testing.assert_close(golden(cfg).total(cfg), want)
    assert golden(config(kl_reduce="mean")).kl.item() == pytest.approx(3.125 / 3)
    prior = torch.distributions.Normal(torch.zeros(3).double(), 2.0)
    posterior = torch.distributions.Normal(MU, (0.5 * LOGVAR).exp())
    want = torch.distributions.kl_divergence(posterior, prior).sum(-1)
    torch.testing.assert_close(golden(config(prior_scale=2.0)).kl, want)


def test_the_weight_of_the_kl_rises_linearly_to_beta_and_nothing_else_changes() -> None:
    strict, cfg = golden(config()), config(beta=0.4, beta_warmup_epochs=8.0)
    bound = golden(cfg)
    for epoch, weight in ((0.0, 0.0), (2.0, 0.1), (4.0, 0.2), (8.0, 0.4), (500.0, 0.4)):
        want = strict.directional + strict.radial - weight * strict.kl
        torch.testing.assert_close(bound.total(cfg, epoch), want)
        assert golden(config(beta=0.4)).total(config(beta=0.4), epoch) == bound.total(cfg)


def test_a_loss_in_the_warm_up_weighs_the_kl_by_the_epoch_it_is_told() -> None:
    torch.manual_seed(0)
    method = VJE(config(location="mean", beta=0.4, beta_warmup_epochs=8.0), 32)
    views = two_views(4)
    start, late = (method.loss(views, at(epoch, NoNoise())) for epoch in (0.0, 6.0))
    torch.testing.assert_close(late.loss - start.loss, 0.3 * late.metrics["kl"])
    assert late.metrics["kl_weight"].item() == pytest.approx(0.3)
    torch.testing.assert_close(start.metrics["kl"], late.metrics["kl"])


@pytest.mark.parametrize("radial", ["linear", "log"])
def test_the_learnt_radial_scale_has_the_gradient_of_the_closed_form(radial: str) -> None:
    cfg = config(radial=radial, radial_scale=0.7, dof_radial=2.5, learn_radial_scale=True)
    torch.manual_seed(0)
    student = VJE(cfg, 32).student.double().eval()
    target = torch.randn(5, 128, dtype=torch.float64)
    posterior = student.infer(torch.randn(5, 128, dtype=torch.float64))
    elbo(posterior, torch.zeros(1, 5, 128), target, cfg).total(cfg).sum().backward()
    pair = [x.norm(dim=1).detach() for x in (target, posterior.mu)]
    r, s = (x.log() for x in pair) if radial == "log" else pair
    squared = ((r - s) / 0.7) ** 2
    want = (3.5 * squared / (2.5 + squared) - 1).sum()  # d/dlog(scale) of the log-density
    gradient = student.get_parameter("log_radial_scale").grad
    assert gradient is not None
    torch.testing.assert_close(gradient, want[None], rtol=1e-6, atol=0)


def test_a_radial_scale_that_is_learnt_begins_as_the_fixed_one() -> None:
    outs = []
    for learn in (False, True):
        torch.manual_seed(0)
        method = VJE(config(radial_scale=1.7, learn_radial_scale=learn), 32)
        outs.append(method.loss(two_views(4), at(0, GlobalNoise(0, 0, 0))))
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    assert outs[1].metrics["radial_scale"].item() == pytest.approx(1.7)
    assert "radial_scale" not in outs[0].metrics


def test_separate_scales_replace_the_variances_in_the_directional_term_alone() -> None:
    cfg, scales = config(form="ambient"), f64(0.5, 2, 3)
    shared = golden(cfg)
    same = elbo(Gaussian(TARGET, MU, LOGVAR, LOGVAR), NO_EPS, TARGET, cfg)
    assert same == shared
    apart = elbo(Gaussian(TARGET, MU, LOGVAR, scales.log()), NO_EPS, TARGET, cfg)
    assert (apart.kl, apart.radial) == (shared.kl, shared.radial)
    t = stats.multivariate_t(loc=[0, 0, 1], shape=np.diag(scales[0].numpy()), df=3)
    assert apart.directional.item() == pytest.approx(t.logpdf([0.6, 0, 0.8]), rel=1e-9)
    far = elbo(Gaussian(TARGET, MU, LOGVAR, f64(-50, 0, 50)), NO_EPS, TARGET, cfg)
    edge = elbo(Gaussian(TARGET, MU, LOGVAR, f64(-10, 0, 6)), NO_EPS, TARGET, cfg)
    assert far == edge


def test_separate_scales_are_outputs_of_the_inference_network_with_a_gradient_of_their_own() -> (
    None
):
    method = VJE(config(variances="separate", learn_radial_scale=True), 32)
    assert isinstance(method.student, GaussianBranch)
    one = method.student.infer(torch.randn(4, 128))
    assert one.scale_logvar is not None
    assert one.scale_logvar.shape == one.logvar.shape == (4, 128)
    out = method.loss(two_views(4), at(0, GlobalNoise(0, 0, 0)))
    out.loss.backward()
    last = method.student.get_parameter("posterior.3.weight").grad
    assert last is not None
    assert all(part.any() for part in last.chunk(3))
    assert {"likelihood_scale_mean", "likelihood_scale_min", "radial_scale"} <= set(out.metrics)
    assert not any("radial" in n for n, _ in VJE(config(), 32).student.named_parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "keys",
    [
        {"dof": math.inf},
        {"dof": math.inf, "dof_radial": 3.0},
        {"dof": math.inf, "variances": "separate", "learn_radial_scale": True, "radial": "log"},
        {"samples": 3, "beta": 0.01, "target": "ema", "beta_warmup_epochs": 2.0},
        {"location": "mean", "radial_weight": 0.0, "prior_scale": 0.3, "kl_reduce": "mean"},
    ],
    ids=str,
)
def test_switches_combine_and_every_used_weight_learns(form: str, keys: dict[str, Any]) -> None:
    torch.manual_seed(0)
    method = VJE(config(form=form, backbone="resnet10_c16", **keys), 16)
    out = method.loss(two_views(6, 16), at(0.5, GlobalNoise(0, 0, 0)))
    out.loss.backward()
    assert out.loss.isfinite()
    for name, parameter in method.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_log_variances_are_clamped_everywhere_at_once() -> None:
    inside = golden(config(logvar_range=(-1.0, 1.0)))
    outside = golden(config(logvar_range=(-1.0, 1.0)), logvar=LOGVAR.clamp(-1, 1))
    assert inside == outside


def test_rescaling_the_target_moves_only_the_radial_term() -> None:
    cfg = config()
    bound = elbo(Gaussian(TARGET, MU, LOGVAR), NO_EPS, 7 * TARGET, cfg)
    want = golden(cfg)
    torch.testing.assert_close(bound.directional, want.directional)
    torch.testing.assert_close(bound.kl, want.kl)
    assert bound.radial != want.radial


def test_samples_are_averaged_and_their_first_noise_dimension_is_the_batch() -> None:
    mu, cfg = torch.randn(4, 6), config(samples=3)
    eps = draw(cfg, GlobalNoise(0, 1, 2), "a", mu)
    assert eps.shape == (3, 4, 6)
    halves = [
        draw(cfg, GlobalNoise(0, 1, 2, rank, 2), "a", mu[2 * rank : 2 * rank + 2])
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(halves, dim=1), eps)
    posterior, target = Gaussian(mu, mu, torch.zeros(4, 6)), torch.randn(4, 6)
    together = elbo(posterior, eps, target, cfg).total(cfg)
    apart = [elbo(posterior, one[None], target, cfg).total(cfg) for one in eps]
    torch.testing.assert_close(together, torch.stack(apart).mean(0))
    assert not draw(config(location="mean"), GlobalNoise(0, 1, 2), "a", mu).any()


def test_bfloat16_inputs_give_a_float32_bound_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    posterior = Gaussian(*torch.randn(3, 16, 256))
    eps, target = torch.randn(1, 16, 256), torch.randn(16, 256)
    cfg = config()
    exact = elbo(posterior, eps, target, cfg).total(cfg).mean()
    narrow = Gaussian(*(t.bfloat16() for t in posterior[:3]))
    half = elbo(narrow, eps, target.bfloat16(), cfg).total(cfg).mean()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=1e-3, atol=0)


def test_zero_embeddings_and_zero_latents_give_finite_gradients() -> None:
    cfg = config()
    h = torch.zeros(2, 8, requires_grad=True)
    bound = elbo(Gaussian(h, h, h), torch.zeros(1, 2, 8), torch.zeros(2, 8), cfg)
    bound.total(cfg).sum().backward()
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()
    assert torch.isfinite(polar(torch.zeros(3))[1]).all()


def test_no_gradient_flows_into_the_observed_embedding() -> None:
    method = VJE(config(), 32)
    leaves = [torch.randn(2, 8, requires_grad=True) for _ in range(6)]
    method.student = Fixed(Gaussian(*leaves[:3]), Gaussian(*leaves[3:]))
    method.loss(two_views(2), at(0, NoNoise())).loss.backward()
    assert [leaf.grad is None for leaf in leaves] == [True, False, False] * 2


def test_every_weight_learns_and_a_teacher_is_a_frozen_part_of_the_student() -> None:
    for target in ("stop_gradient", "ema"):
        method = VJE(config(target=target), 32)
        method.loss(two_views(4), at(0, GlobalNoise(0, 0, 0))).loss.backward()
        assert all(p.grad is not None for p in method.student.parameters())
        assert (method.teacher is None) == (target == "stop_gradient")
        if method.teacher is not None:
            same = dict(method.student.named_parameters())
            for name, parameter in method.teacher.named_parameters():
                assert torch.equal(parameter, same[name])
                assert not parameter.requires_grad


def test_an_ema_target_is_what_the_teacher_sees() -> None:
    method = VJE(config(target="ema", location="mean"), 32)
    assert method.teacher is not None
    nn.init.constant_(method.teacher.backbone.bn1.bias, 3.0)
    views = two_views(4)
    cfg, (one, two) = method.cfg, (method.student(view) for view in views)
    seen = [method.teacher(view) for view in views]
    eps = torch.zeros(1, 4, 128)
    want = elbo(one, eps, seen[1], cfg).total(cfg) + elbo(two, eps, seen[0], cfg).total(cfg)
    torch.testing.assert_close(method.loss(views, at(0, NoNoise())).loss, -0.5 * want.mean())


@pytest.mark.parametrize("form", FORMS)
def test_swapping_the_views_leaves_the_loss(form: str) -> None:
    torch.manual_seed(0)
    method = VJE(config(form=form), 32)
    one, two = two_views(6)
    a = method.loss((one, two), at(0, SameNoise()))
    b = method.loss((two, one), at(0, SameNoise()))
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.metrics["directional"], b.metrics["directional"])


def test_loss_is_the_mean_over_equal_shards() -> None:
    torch.manual_seed(0)
    method = build_method(config(), 32)
    method.student.eval()  # each shard would have batch statistics of its own
    one, two = two_views(8)
    whole = method.loss((one, two), at(0, GlobalNoise(0, 0, 0))).loss
    shards = [
        method.loss((one[rows], two[rows]), at(0, GlobalNoise(0, 0, 0, rank, 2))).loss
        for rank, rows in enumerate((slice(0, 4), slice(4, 8)))
    ]
    torch.testing.assert_close(torch.stack(shards).mean(), whole)


def test_metrics_are_detached_scalars_that_add_up() -> None:
    cfg = config(beta=0.5, radial_weight=2.0)
    out = VJE(cfg, 32).loss(two_views(6), at(0, GlobalNoise(0, 0, 0)))
    got = out.metrics
    want = -(got["directional"] + 2 * got["radial"] - 0.5 * got["kl"])
    torch.testing.assert_close(out.loss.detach(), want)
    assert all(value.dim() == 0 and not value.requires_grad for value in got.values())
    assert {"directional", "radial", "kl_per_dim", "sigma_mean", "alignment_cos"} <= set(got)
    torch.testing.assert_close(got["kl_per_dim"], got["kl"] / 128)


def test_keys_that_cannot_be_are_refused() -> None:
    bad: list[dict[str, Any]] = [
        {"dof": 0.0}, {"samples": 0}, {"beta": -1.0}, {"logvar_range": (1.0, -1.0)},
        {"beta_warmup_epochs": -1.0}, {"beta_warmup_epochs": math.inf}, {"variances": "tied"},
        {"radial_scale": 0.0, "learn_radial_scale": True},
    ]  # fmt: skip
    for keys in bad:
        with pytest.raises(ValidationError):
            config(**keys)
    assert VJEConfig.model_validate({"dof": "inf"}).dof == math.inf


def _train_on_vectors(stop_gradient: bool) -> tuple[list[float], list[int]]:
    """Spread of the embedding, and the steps at which the alarm is on, in training on two noisy
    views of class centres."""
    torch.manual_seed(0)
    centres = torch.randn(10, 64)
    student = GaussianBranch(mlp(64, 128, 64), mlp(64, 32, 128))
    optimizer = torch.optim.Adam(student.parameters(), 2e-3)
    alarm, spreads, alarms = CollapseAlarm(), [], []
    for step in range(1, 201):
        images = centres[torch.randint(10, (128,))] + 0.5 * torch.randn(128, 64)
        views = (images + torch.randn_like(images) for _ in range(2))
        one, two = (student(view) for view in views)
        targets = [h.detach() if stop_gradient else h for h in (two.h, one.h)]
        cfg, noise = config(), GlobalNoise(0, step, 0)
        bounds = [
            elbo(posterior, draw(cfg, noise, str(n), posterior.mu), target, cfg).total(cfg)
            for n, (posterior, target) in enumerate(zip((one, two), targets, strict=True))
        ]
        optimizer.zero_grad()
        (-0.5 * torch.stack(bounds).sum(0).mean()).backward()
        optimizer.step()
        spreads.append(spread(one.h).item())
        if step % CHECK_EVERY == 0:
            alarm.update(embedding(one.h), *one.h.shape)
            alarms += [step] if alarm.on else []
    return spreads, alarms


def test_the_stop_gradient_prevents_a_collapse_that_raises_the_alarm_within_200_steps() -> None:
    kept, silent = _train_on_vectors(stop_gradient=True)
    assert kept[-1] > 0.5
    assert not silent
    lost, alarms = _train_on_vectors(stop_gradient=False)
    assert lost[-1] < 0.25 * lost[0]
    assert alarms
