"""Golden values were computed by hand or quadrature; the rest is held against scipy and torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor
from torch import distributions as D

from vssl_dist import densities
from vssl_dist.densities import (
    FORMS,
    Form,
    directional_log_prob,
    gaussian_expected_log_prob,
    gaussian_kl,
    gaussian_log_prob,
    radial_log_prob,
)

TANGENT: tuple[Form, ...] = ("tangent_chord", "tangent_log", "tangent_stereographic")
INF = math.inf


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


U, M = f64(0.6, 0.0, 0.8), f64(0.0, 0.0, 1.0)
LOGVAR = f64(0.25, 1.0, 4.0).log()


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("form", "dof", "want"),
    [
        ("ambient", 1, -4.0816358208),
        ("ambient", 3, -3.7339592661),
        ("ambient", 10, -3.5665943793),
        ("ambient", INF, -3.4818155996),
        ("factorised", 1, -4.3361380277),
        ("factorised", 3, -3.7934063046),
        ("factorised", 10, -3.5771092196),
        ("factorised", INF, -3.4818155996),
        ("tangent_log", 1, -2.6101733),
        ("tangent_log", 3, -2.2437921),
        ("tangent_log", 10, -2.0643386),
        ("tangent_log", INF, -1.9729172),
        ("tangent_chord", 1, -2.5779971),
        ("tangent_chord", 3, -2.2133399),
        ("tangent_chord", 10, -2.0352499),
        ("tangent_stereographic", 1, -2.6772067),
        ("tangent_stereographic", 3, -2.3081380),
        ("tangent_stereographic", 10, -2.1265064),
    ],
)
def test_directional_forms_have_their_golden_values(form: Form, dof: float, want: float) -> None:
    assert directional_log_prob(U, M, LOGVAR, dof, form).item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("dof", "want"),
    [(1, -3.4473149788), (3, -3.7734775719), (10, -4.4740937261), (INF, -5.4189385332)],
)
def test_radial_term_has_its_golden_values(dof: float, want: float) -> None:
    assert radial_log_prob(f64(5.0), f64(2.0), dof).item() == pytest.approx(want, rel=1e-6)


def test_gaussian_terms_have_their_golden_values() -> None:
    mu_s, logvar_s = f64(1, 2), f64(0.25, 1).log()
    mu_t, logvar_t = f64(0, 2), f64(1, 4).log()
    want = {
        1.1362943611: gaussian_kl(mu_s, logvar_s, mu_t, logvar_t),
        3.6137056389: gaussian_kl(mu_t, logvar_t, mu_s, logvar_s),
        -3.2810242470: gaussian_expected_log_prob(mu_s, logvar_s, mu_t, logvar_t),
        -3.1447298858: gaussian_log_prob(mu_t, mu_s, logvar_s),
        3.125: gaussian_kl(f64(0, 0, 2), LOGVAR),
        2.125: gaussian_kl(f64(1, -1), f64(4, 0.25).log()),
        -2.1447298858: gaussian_expected_log_prob(mu_s, logvar_s, mu_s, logvar_s),
    }
    for value, got in want.items():
        assert got.item() == pytest.approx(value, rel=1e-6)
    assert gaussian_kl(f64(0, 0), f64(0, 0)).item() == 0


def test_kl_gradients_have_their_golden_values() -> None:
    mu, logvar = f64(1, 2).requires_grad_(), f64(0.25, 1).log().requires_grad_()
    gaussian_kl(mu, logvar, f64(0, 2), f64(1, 4).log()).backward()
    torch.testing.assert_close(mu.grad, f64(1, 0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(logvar.grad, f64(-0.375, -0.375), rtol=1e-9, atol=1e-12)


def test_kl_agrees_with_torch_and_with_sampling() -> None:
    generator = torch.Generator().manual_seed(1)
    mu_q, mu_p, lq, lp = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    q, p = D.Normal(mu_q, (0.5 * lq).exp()), D.Normal(mu_p, (0.5 * lp).exp())
    got = gaussian_kl(mu_q, lq, mu_p, lp)
    torch.testing.assert_close(got, D.kl_divergence(q, p).sum(-1))
    eps = torch.randn(40_000, 5, 6, generator=generator, dtype=torch.float64)
    z = mu_q + (0.5 * lq).exp() * eps
    sampled = (gaussian_log_prob(z, mu_q, lq) - gaussian_log_prob(z, mu_p, lp)).mean(0)
    torch.testing.assert_close(sampled, got, rtol=0.05, atol=0.05)


def test_kl_is_never_negative_in_float32() -> None:
    mu = torch.randn(200, 64)
    logvar = torch.randn(200, 64)
    near = gaussian_kl(mu, logvar, mu + 1e-5, logvar + 1e-5)
    assert (near >= 0).all()
    assert (gaussian_kl(mu, logvar, mu, logvar) == 0).all()


@pytest.mark.parametrize("dof", [1.0, 3.0, 10.0, 300.0])
def test_ambient_form_is_scipys_multivariate_t(dof: float) -> None:
    u, m = unit(4, 7), unit(4, 7, seed=1)
    logvar = torch.linspace(-2, 2, 7, dtype=torch.float64)
    shape = np.diag(logvar.exp().numpy())
    want = [
        stats.multivariate_t(loc=b.numpy(), shape=shape, df=dof).logpdf(a.numpy())
        for a, b in zip(u, m, strict=True)
    ]
    got = directional_log_prob(u, m, logvar, dof, "ambient")
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_factorised_and_radial_forms_are_torchs_univariate_t() -> None:
    u, m = unit(4, 7), unit(4, 7, seed=1)
    logvar = torch.linspace(-2, 2, 7, dtype=torch.float64)
    want = D.StudentT(f64(5), m, (0.5 * logvar).exp()).log_prob(u).sum(-1)
    torch.testing.assert_close(directional_log_prob(u, m, logvar, 5.0, "factorised"), want)
    r, s = f64(0.1, 3, 40), f64(1, 3, 2)
    want = D.StudentT(f64(2.5), s, f64(0.7)).log_prob(r)
    torch.testing.assert_close(radial_log_prob(r, s, 2.5, scale=0.7), want)


@pytest.mark.parametrize("form", TANGENT)
def test_tangent_forms_agree_with_charts_written_out_in_a_basis_of_the_tangent_space(
    form: Form,
) -> None:
    dim, dof = 5, 3.0
    u, m = unit(dim), unit(dim, seed=1)
    variances = torch.linspace(0.1, 4, dim, dtype=torch.float64)
    angle = torch.arccos(u @ m)
    length = {
        "tangent_chord": 2 * torch.sin(angle / 2),
        "tangent_log": angle,
        "tangent_stereographic": 2 * torch.tan(angle / 2),
    }[form]
    y = length * (u - (u @ m) * m) / torch.sin(angle)
    basis = torch.linalg.svd(m.unsqueeze(0)).Vh[1:]  # (D - 1, D), orthogonal to m
    precision = basis @ torch.diag(1 / variances) @ basis.T
    shape = torch.linalg.inv(precision).numpy()
    want = stats.multivariate_t(shape=shape, df=dof).logpdf((basis @ y).numpy())
    got = directional_log_prob(u, m, variances.log(), dof, form)
    assert got.item() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_large_dof_tends_to_the_gaussian_limit(form: Form) -> None:
    u, m = unit(3, 2048), unit(3, 2048, seed=1)
    logvar = torch.zeros(2048, dtype=torch.float64)
    limit = directional_log_prob(u, m, logvar, INF, form)
    for dof, tolerance in ((1e8, 1e-4), (1e12, 1e-8), (1e30, 1e-10)):
        got = directional_log_prob(u, m, logvar, dof, form)
        torch.testing.assert_close(got, limit, rtol=tolerance, atol=0)


def test_log_gamma_ratio_is_continuous_where_its_formula_changes() -> None:
    for a in (0.5, 64.0, 1024.0):
        below = math.lgamma(2e4 + a) - math.lgamma(2e4)
        assert densities._log_gamma_ratio(2e4, a) == pytest.approx(below, rel=1e-11)


def _on_the_sphere(form: Form, variances: Tensor, steps: int = 800, dof: float = 3.0) -> float:
    """Integral of the density over S^2 around the north pole, by the midpoint rule.

    The angle is the square of the variable, so that the points crowd where the density peaks.
    """
    root = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    theta = math.pi * root.square()
    phi = (torch.arange(240, dtype=torch.float64) + 0.5) * 2 * math.pi / 240
    t, f = theta[:, None], phi[None, :]
    u = torch.stack([t.sin() * f.cos(), t.sin() * f.sin(), t.cos().expand(-1, 240)], dim=-1)
    density = directional_log_prob(u, M, variances.log(), dof, form).exp()
    area = 2 * math.pi * root[:, None] / steps * 2 * math.pi / 240
    return float((density * t.sin() * area).sum())


@pytest.mark.parametrize(
    ("form", "variances", "want"),
    [
        ("ambient", (0.25, 1.0, 4.0), 0.277),
        ("ambient", (0.01, 0.02, 0.05), 1.674),
        ("ambient", (0.0025, 0.0025, 0.0025), 7.351),
        ("tangent_log", (0.25, 1.0, 4.0), 0.7237),
        ("tangent_chord", (0.25, 1.0, 4.0), 0.8242),
        ("tangent_stereographic", (0.25, 1.0, 4.0), 0.5908),
        ("tangent_log", (0.0025, 0.0025, 0.0025), 0.9976),
        ("tangent_chord", (0.0025, 0.0025, 0.0025), 0.9999),
        ("tangent_stereographic", (0.0025, 0.0025, 0.0025), 0.9934),
    ],
)
def test_integrals_over_the_sphere_are_those_of_quadrature(
    form: Form, variances: tuple[float, ...], want: float
) -> None:
    assert _on_the_sphere(form, f64(*variances)) == pytest.approx(want, abs=6e-4)


@pytest.mark.parametrize("dof", [1.0, 3.0, INF])
@pytest.mark.parametrize("form", TANGENT)
def test_tangent_forms_are_sub_densities_on_the_sphere(form: Form, dof: float) -> None:
    for scales in ((0.01, 0.02, 0.05), (100.0, 1.0, 0.01), (1e-3, 1e-3, 10.0), (9.0, 9.0, 9.0)):
        assert _on_the_sphere(form, f64(*scales), dof=dof) <= 1 + 1e-6


@pytest.mark.parametrize("dof", [1.0, 3.0, INF])
def test_radial_form_is_a_density_of_the_line_and_less_of_what_a_norm_can_be(dof: float) -> None:
    for centre, scale in ((0.5, 1.0), (2.0, 0.3), (8.0, 4.0)):

        def density(r: float, centre: float = centre, scale: float = scale) -> float:
            return math.exp(radial_log_prob(f64(r), f64(centre), dof, scale).item())

        negative, _ = integrate.quad(density, -INF, 0)
        norms, _ = integrate.quad(density, 0, INF)
        assert negative + norms == pytest.approx(1, abs=1e-6)
        t = stats.norm if dof == INF else stats.t(dof)
        assert norms == pytest.approx(1 - t.cdf(-centre / scale), abs=1e-6)


def test_a_radial_scale_may_be_a_tensor_and_has_the_gradient_of_finite_differences() -> None:
    r, s, scale = f64(0.1, 3, 40), f64(1, 3, 2), f64(0.7, 2, 1).requires_grad_()
    for dof in (2.5, INF):
        got = radial_log_prob(r, s, dof, scale)
        for value, *rest in zip(got, r, s, scale, strict=True):
            want = radial_log_prob(rest[0], rest[1], dof, rest[2].item())
            torch.testing.assert_close(value, want)
        assert torch.autograd.gradcheck(lambda x, d=dof: radial_log_prob(r, s, d, x), (scale,))


def test_shared_variances_cancel_between_the_ambient_form_and_the_kl() -> None:
    mu, variances = f64(0.3, -0.2, 0.7, 1.1), f64(0.5, 0.1, 2, 0.9)
    u = f64(1, 2, -1, 0.5)
    u, m = u / u.norm(), mu / mu.norm()
    got = directional_log_prob(u, m, variances.log(), 3.0, "ambient") - gaussian_kl(
        mu, variances.log()
    )
    delta = ((u - m) ** 2 / variances).sum()
    constant = math.lgamma(3.5) - math.lgamma(1.5) - 2 * math.log(3 * math.pi)
    without_logarithms = (
        constant - 3.5 * torch.log1p(delta / 3) - 0.5 * (mu**2 + variances - 1).sum()
    )
    assert got.item() == pytest.approx(-8.9313348872, rel=1e-6)
    assert without_logarithms.item() == pytest.approx(-8.9313348872, rel=1e-6)


def test_residuals_are_weighted_by_the_bounded_influence_of_the_t() -> None:
    for dof, want in ((3.0, (2.3333, 1.75, 0.5385, 0.0680)), (1e6, (1.0, 1.0, 1.0, 0.9999))):
        for delta, weight in zip((0.0, 1.0, 10.0, 100.0), want, strict=True):
            e = f64(max(delta, 1e-12), 0, 0, 0).sqrt()
            m = torch.zeros(4, dtype=torch.float64, requires_grad=True)
            directional_log_prob(e, m, torch.zeros_like(e), dof, "ambient").backward()
            assert m.grad is not None
            assert (m.grad[0] / e[0]).item() == pytest.approx(weight, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_finite_at_the_poles_and_at_extreme_variances(
    form: Form, dtype: torch.dtype
) -> None:
    directions = unit(6, 16).to(dtype)
    for dof in (1.0, 3.0, INF):
        for level in (-40.0, 0.0, 40.0):
            for target in (directions, -directions, directions.roll(1, 0)):
                m = directions.clone().requires_grad_()
                logvar = torch.full((16,), level, dtype=dtype).requires_grad_()
                value = directional_log_prob(target, m, logvar, dof, form)
                value.sum().backward()
                for tensor in (value, m.grad, logvar.grad):
                    assert tensor is not None
                    assert torch.isfinite(tensor).all(), (form, dof, level)


@pytest.mark.parametrize("form", TANGENT)
def test_tangent_forms_are_continuous_at_the_poles_and_lowest_at_the_antipode(form: Form) -> None:
    m = f64(0, 0, 1)
    logvar = torch.full((3,), -1.0, dtype=torch.float64)
    angles = torch.cat([f64(0, 1e-9, 1e-6), torch.linspace(0.01, 3.13, 60).double()])
    angles = torch.cat([angles, f64(math.pi - 1e-4, math.pi - 1e-6, math.pi)])
    u = torch.stack([angles.sin(), torch.zeros_like(angles), angles.cos()], dim=-1)
    values = directional_log_prob(u, m, logvar, 3.0, form)
    assert (values.diff() <= 1e-9).all()
    torch.testing.assert_close(values[0], values[2], rtol=0, atol=1e-9)
    if form != "tangent_stereographic":  # which goes to minus infinity there
        torch.testing.assert_close(values[-1], values[-2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: Form) -> None:
    u, logvar = unit(3, 6), torch.randn(3, 6, dtype=torch.float64).requires_grad_()
    z = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()

    def value(z: Tensor, logvar: Tensor) -> Tensor:
        return directional_log_prob(u, z / z.norm(dim=-1, keepdim=True), logvar, 3.0, form)

    assert torch.autograd.gradcheck(value, (z, logvar))


@pytest.mark.parametrize("form", FORMS)
def test_samples_broadcast_against_the_batch_and_features_may_be_permuted(form: Form) -> None:
    u, m, logvar = unit(3, 6), unit(2, 3, 6, seed=1), unit(3, 6, seed=2)
    got = directional_log_prob(u, m, logvar, 3.0, form)
    want = torch.stack([directional_log_prob(u, one, logvar, 3.0, form) for one in m])
    torch.testing.assert_close(got, want)
    order = torch.randperm(6)
    again = directional_log_prob(u[..., order], m[..., order], logvar[..., order], 3.0, form)
    torch.testing.assert_close(again, got)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_is_promoted_and_float32_is_accurate(form: Form) -> None:
    u, m, logvar = unit(8, 256), unit(8, 256, seed=1), unit(8, 256, seed=2)
    exact = directional_log_prob(u, m, logvar, 3.0, form)
    narrow = directional_log_prob(u.float(), m.float(), logvar.float(), 3.0, form)
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-5, atol=0)
    half = directional_log_prob(u.bfloat16(), m.bfloat16(), logvar.bfloat16(), 3.0, form)
    assert half.dtype == torch.float32
    assert gaussian_kl(u.half(), logvar.half()).dtype == torch.float32
    assert radial_log_prob(u.half(), m.half(), 3.0).dtype == torch.float32


def test_what_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'polar' is not one of ambient"):
        directional_log_prob(U, M, LOGVAR, 3.0, "polar")
    with pytest.raises(ValueError, match="dof=0"):
        directional_log_prob(U, M, LOGVAR, 0)
