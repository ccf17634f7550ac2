from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tests.support.views import NoNoise, SameNoise, two_views
from vssl_dist.methods import GlobalNoise, build_method
from vssl_dist.methods.vssl import VSSL, Bound, VSSLConfig, bound, bounded, draw
from vssl_dist.models.heads import Gaussian


def f64(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


STUDENT = Gaussian(f64(0), f64(1, 2), f64(0.25, 1).log())
TEACHER = Gaussian(f64(0), f64(0, 2), f64(1, 4).log())
ZERO = torch.zeros(1, 2, dtype=torch.float64)
COS = 0.8944271910
FORMS = [("A", "none"), ("B", "none"), ("A", "C1"), ("B", "C1"), ("A", "C2"), ("B", "C2")]
FORMS += [("A", "C3")]


def config(**keys: Any) -> VSSLConfig:
    small = {"backbone": "resnet18_c16", "hidden": 32, "dim": 16, "logvar_bound": "clamp"}
    return VSSLConfig(**small | keys)


def golden(**keys: Any) -> Bound:
    return bound(STUDENT, TEACHER, ZERO, config(**keys))


def test_gaussian_forms_have_their_golden_values() -> None:
    form_a = golden(denoising="A", cosine="none")
    assert form_a.kl.item() == pytest.approx(1.1362943611, rel=1e-6)
    assert form_a.denoising.item() == pytest.approx(-3.2810242470, rel=1e-6)
    form_b = golden(denoising="B", cosine="none")
    assert form_b.kl.item() == pytest.approx(1.1362943611, rel=1e-6)
    assert form_b.denoising.item() == pytest.approx(-3.1447298858, rel=1e-6)


def test_unit_mean_form_has_its_golden_values() -> None:
    form = golden(denoising="A", cosine="C1")
    assert form.kl.item() == pytest.approx(0.7376875634, rel=1e-6)
    assert form.denoising.item() == pytest.approx(-2.8824174492, rel=1e-6)


@pytest.mark.parametrize("denoising", ["A", "B"])
def test_longer_means_are_unit_means_with_variances_smaller_by_the_width(denoising: str) -> None:
    width = 5
    mu_s, mu_t, log_s, log_t, eps = torch.randn(5, 3, width, dtype=torch.float64).unbind()
    keys = {"denoising": denoising, "logvar_range": (-20, 20), "dim": width}
    near = math.log(width)
    small = [Gaussian(mu, mu, v - near) for mu, v in ((mu_s, log_s), (mu_t, log_t))]
    large = [Gaussian(mu, mu, v) for mu, v in ((mu_s, log_s), (mu_t, log_t))]
    unit = bound(*small, eps, config(**keys))
    longer = bound(*large, eps, config(radius="sqrt_dim", **keys))
    torch.testing.assert_close(longer.kl, unit.kl)
    torch.testing.assert_close(longer.denoising, unit.denoising - width / 2 * near)


@pytest.mark.parametrize("weight", [1.5, 2, 4])
def test_variances_of_form_a_rest_where_the_weight_of_their_divergence_says(weight: float) -> None:
    cfg = config(variance_weight=weight)
    mu_s, mu_t = torch.randn(2, 3, 16, dtype=torch.float64)
    rest = torch.full_like(mu_s, math.log(1 - 1 / weight))

    def slope(logvar: Tensor) -> Tensor:
        """Of the loss, by the student's log-variances, if the teacher has the same."""
        own = logvar.clone().requires_grad_()
        found = bound(Gaussian(mu_s, mu_s, own), Gaussian(mu_t, mu_t, logvar), rest, cfg)
        return torch.autograd.grad(-found.total(cfg).sum(), own)[0]

    torch.testing.assert_close(slope(rest), torch.zeros_like(rest))
    assert (slope(rest - 0.1) < 0).all()
    assert (slope(rest + 0.1) > 0).all()


@pytest.mark.parametrize("layers", [2, 3])
def test_the_head_has_as_many_layers_as_asked(layers: Any) -> None:
    student = VSSL(config(head_layers=layers), image_size=32).student
    posterior = student.get_submodule("posterior")
    widths = [one.out_features for one in posterior.modules() if isinstance(one, nn.Linear)]
    assert widths == [32] * (layers - 1) + [2 * 16]


def test_isotropic_form_is_one_minus_cosine_at_unit_variances() -> None:
    student, teacher = (Gaussian(one.h, one.mu, ZERO) for one in (STUDENT, TEACHER))
    form = bound(student, teacher, ZERO, config(cosine="C2"))
    assert form.kl.item() == pytest.approx(0.1055728090, rel=1e-6)
    assert form.denoising.item() == pytest.approx(-math.log(2 * math.pi) - 1 - (1 - COS), rel=1e-6)
    form = bound(student, teacher, ZERO, config(cosine="C2", denoising="B"))
    assert form.denoising.item() == pytest.approx(-math.log(2 * math.pi) - (1 - COS), rel=1e-6)


def test_isotropic_form_is_its_formula_at_other_variances() -> None:
    form = golden(cosine="C2")
    spreads = 0.5 * sum(math.log(t / s) + s / t - 1 for s, t in ((0.25, 1), (1, 4)))
    assert form.kl.item() == pytest.approx(spreads + (1 - COS) / 2.5, rel=1e-6)
    logs = math.log(2 * math.pi) + 0.5 * (math.log(4) + 0.25 + 0.25)
    assert form.denoising.item() == pytest.approx(-logs - (1 - COS) / 2.5, rel=1e-6)
    form = golden(cosine="C2", denoising="B")
    logs = math.log(2 * math.pi) + 0.5 * math.log(0.25)
    assert form.denoising.item() == pytest.approx(-logs - (1 - COS) / 0.625, rel=1e-6)


def test_pure_cosine_form_is_its_formula() -> None:
    form = golden(cosine="C3")
    assert form.denoising.item() == pytest.approx(COS, rel=1e-6)
    # The standard deviations (0.5, 1) and (1, 2) are parallel.
    assert form.kl.item() == pytest.approx(1 - COS, rel=1e-6)
    eps = f64(0.5, -1)
    form = bound(STUDENT, TEACHER, eps, config(cosine="C3"))
    want = F.cosine_similarity(f64(1 + 0.5 * 0.5, 2 - 1), f64(0, 2))
    torch.testing.assert_close(form.denoising, want)


def test_latent_of_form_b_is_the_teachers_sample() -> None:
    eps = f64(0.5, -1)
    form = bound(STUDENT, TEACHER, eps, config(cosine="none", denoising="B"))
    latent = f64(0 + 0.5, 2 - 2)
    normal = torch.distributions.Normal(STUDENT.mu, (0.5 * STUDENT.logvar).exp())
    torch.testing.assert_close(form.denoising, normal.log_prob(latent).sum(-1))


def test_total_weighs_the_terms() -> None:
    cfg = config(beta=0.5, variance_weight=2.0)
    form = bound(STUDENT, TEACHER, ZERO, cfg)
    # The divergence of the variances (0.25, 1) from 1.
    assert form.variance.item() == pytest.approx(0.5 * (0.25 - 1 - math.log(0.25)))
    want = form.denoising - 0.5 * form.kl - 2 * form.variance
    torch.testing.assert_close(form.total(cfg), want)


@pytest.mark.parametrize(("denoising", "cosine"), FORMS)
def test_only_cosine_forms_are_blind_to_the_scale_of_the_means(denoising: str, cosine: str) -> None:
    cfg = config(denoising=denoising, cosine=cosine)
    longer = (Gaussian(one.h, 3 * one.mu, one.logvar) for one in (STUDENT, TEACHER))
    want, got = bound(STUDENT, TEACHER, ZERO, cfg), bound(*longer, ZERO, cfg)
    same = torch.allclose(want.total(cfg), got.total(cfg))
    assert same == (cosine != "none")


@pytest.mark.parametrize(("denoising", "cosine"), FORMS)
def test_kl_is_zero_between_equals_and_positive_otherwise(denoising: str, cosine: str) -> None:
    cfg = config(denoising=denoising, cosine=cosine)
    assert bound(TEACHER, TEACHER, ZERO, cfg).kl.abs().item() < 1e-12
    assert bound(STUDENT, TEACHER, ZERO, cfg).kl.item() > 0


@pytest.mark.parametrize(("denoising", "cosine"), FORMS)
def test_no_gradient_reaches_the_teacher_and_the_views_may_be_swapped(
    denoising: str, cosine: str
) -> None:
    torch.manual_seed(0)
    method = VSSL(config(denoising=denoising, cosine=cosine), 32)
    one, two = two_views(6)
    a = method.loss((one, two), SameNoise()).loss
    b = method.loss((two, one), SameNoise()).loss
    torch.testing.assert_close(a, b)
    a.backward()
    assert method.teacher is not None
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


def test_loss_crosses_the_views_and_runs_from_student_to_teacher() -> None:
    class Fixed(nn.Module):
        def __init__(self, *answers: Gaussian) -> None:
            super().__init__()
            self.answers = list(answers)

        def forward(self, _: Tensor) -> Gaussian:
            return self.answers.pop(0)

    cfg = config(cosine="none")
    method = VSSL(cfg, 32)
    method.student, method.teacher = Fixed(STUDENT, TEACHER), Fixed(STUDENT, TEACHER)
    got = method.loss(two_views(1), NoNoise())
    # View 1's student (STUDENT) meets view 2's teacher (TEACHER), and the other way round.
    want = [bound(STUDENT, TEACHER, ZERO, cfg), bound(TEACHER, STUDENT, ZERO, cfg)]
    assert got.loss.item() == pytest.approx(-0.5 * sum(b.total(cfg).item() for b in want))
    assert got.metrics["kl"].item() == pytest.approx((1.1362943611 + 3.6137056389) / 2, rel=1e-6)


def test_soft_bound_keeps_the_order_and_a_gradient_where_the_clamp_has_none() -> None:
    raw = torch.linspace(-20, 15, 71, requires_grad=True)
    soft = bounded(raw, config(logvar_bound="soft", logvar_range=(-6.0, 3.0)))
    assert soft.min() >= -6
    assert soft.max() <= 3
    assert (soft.diff() >= 0).all()
    soft.sum().backward()
    assert raw.grad is not None
    below = (raw > -12) & (raw < -7)
    assert (raw.grad[below] > 0).all()
    hard = bounded(raw.detach(), config(logvar_range=(-6.0, 3.0)))
    torch.testing.assert_close(hard, raw.detach().clamp(-6, 3))


def test_teacher_is_the_student_without_its_predictor() -> None:
    for predictor in (True, False):
        method = build_method(config(predictor=predictor), 32)
        assert method.teacher is not None
        student = dict(method.student.named_parameters())
        teacher = dict(method.teacher.named_parameters())
        assert all(torch.equal(value, student[name]) for name, value in teacher.items())
        extra = {name.partition(".")[0] for name in set(student) - set(teacher)}
        assert extra == ({"predictor"} if predictor else set())


def test_noise_is_drawn_only_where_a_latent_is_sampled() -> None:
    mu, noise = torch.zeros(4, 3), GlobalNoise(0, 0, 0)
    assert draw(config(denoising="B"), noise, "x", mu).any()
    assert draw(config(cosine="C3"), noise, "x", mu).any()
    for keys in ({"denoising": "A"}, {"denoising": "B", "latent": "mean"}):
        assert not draw(config(**keys), noise, "x", mu).any()


def test_keys_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValidationError, match="brings its own"):
        config(cosine="C3", denoising="B")
    with pytest.raises(ValidationError, match="radius=sqrt_dim is of cosine=C1, not of cosine=C2"):
        config(cosine="C2", radius="sqrt_dim")
    with pytest.raises(ValidationError, match="must ascend"):
        config(logvar_range=(3.0, -6.0))
