"""Log-densities and divergences of the losses: pure functions, shapes in, shapes out.

Half precision is promoted to float32, float64 stays.  Nothing here draws random numbers.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

Form = Literal[
    "ambient", "factorised", "tangent_chord", "tangent_log", "tangent_stereographic"
]  # fmt: skip


def at_least_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, or in float32 where that one is narrower."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(tensor.to(dtype) for tensor in tensors)


def gaussian_kl(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor | None = None, logvar_p: Tensor | None = None
) -> Tensor:
    """Kullback-Leibler divergence ``KL(q || p)`` of diagonal Gaussians, in nats.

    Args:
        mu_q, logvar_q: Mean and log-variance of ``q``, ``(..., D)``.
        mu_p, logvar_p: Those of ``p``, broadcast; None is 0, hence both None is the
            standard normal.

    Returns:
        ``(...,)``, summed over ``D``; never negative.

    >>> gaussian_kl(torch.zeros(3), torch.zeros(3)).item()
    0.0
    """
    mu_p = torch.zeros_like(mu_q) if mu_p is None else mu_p
    logvar_p = torch.zeros_like(logvar_q) if logvar_p is None else logvar_p
    mu_q, logvar_q, mu_p, logvar_p = at_least_float32(mu_q, logvar_q, mu_p, logvar_p)
    log_ratio = logvar_q - logvar_p
    scaled = (mu_q - mu_p) * torch.exp(-0.5 * logvar_p)
    # expm1(x) - x keeps the digits that exp(x) - 1 - x loses near x = 0.
    return 0.5 * (torch.expm1(log_ratio) - log_ratio + scaled.square()).sum(-1)


def gaussian_log_prob(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian; all ``(..., D)`` and broadcast -> ``(...,)``.

    >>> round(gaussian_log_prob(torch.zeros(1), torch.zeros(1), torch.zeros(1)).item(), 4)
    -0.9189
    """
    x, mu, logvar = at_least_float32(x, mu, logvar)
    scaled = (x - mu) * torch.exp(-0.5 * logvar)
    return -0.5 * (math.log(2 * math.pi) + logvar + scaled.square()).sum(-1)


def gaussian_expected_log_prob(
    mu_q: Tensor, logvar_q: Tensor, mu_p: Tensor, logvar_p: Tensor
) -> Tensor:
    """``E_q[log p]`` of diagonal Gaussians in closed form: minus entropy of q minus KL(q || p).

    Args:
        mu_q, logvar_q, mu_p, logvar_p: ``(..., D)``, broadcast against each other.

    Returns:
        ``(...,)``.
    """
    mu_q, logvar_q, mu_p, logvar_p = at_least_float32(mu_q, logvar_q, mu_p, logvar_p)
    scaled = (mu_q - mu_p) * torch.exp(-0.5 * logvar_p)
    second_moment = scaled.square() + torch.exp(logvar_q - logvar_p)
    return -0.5 * (math.log(2 * math.pi) + logvar_p + second_moment).sum(-1)


def directional_log_prob(
    u: Tensor, m: Tensor, logvar: Tensor, dof: float, form: Form = "tangent_chord"
) -> Tensor:
    """Heavy-tailed log-likelihood of a direction ``u`` around a direction ``m``.

    Five readings of a Student-t with a diagonal scale on the unit sphere:

    - ``ambient``: the multivariate t of the surrounding space, evaluated at ``u``;
    - ``factorised``: a product of ``D`` univariate t's, evaluated at ``u``;
    - ``tangent_chord``, ``tangent_log``, ``tangent_stereographic``: a ``D - 1`` dimensional t in
      the tangent space at ``m``, at the point that the chart sends ``u`` to, at distance
      ``2 sin(a/2)``, ``a`` or ``2 tan(a/2)`` for an angle ``a`` between ``u`` and ``m``.

    The first two are no densities on the sphere: their integral may exceed 1.  The tangent forms
    leave out the chart's Jacobian, which is at most 1 (chord: for ``D >= 3``), so theirs may not.

    Gradients are finite everywhere, at ``u == m`` and ``u == -m`` included; at ``-m``, where the
    direction of the tangent vector is undefined, its Mahalanobis length uses the mean precision.

    Args:
        u, m: Unit vectors ``(..., D)``, broadcast against each other.
        logvar: Logarithms of the squared scales ``(..., D)``; ``[-40, 40]`` in float32.
        dof: Degrees of freedom, positive; ``math.inf`` is the Gaussian.
        form: One of the five readings.

    Returns:
        ``(...,)`` in nats.

    Raises:
        ValueError: Unknown ``form``, or ``dof`` is not positive.

    >>> u, m = torch.tensor([0.6, 0.0, 0.8]), torch.tensor([0.0, 0.0, 1.0])
    >>> logvar = torch.tensor([0.25, 1.0, 4.0]).log()
    >>> [round(directional_log_prob(u, m, logvar, 3.0, form).item(), 4) for form in FORMS]
    [-3.734, -3.7934, -2.2133, -2.2438, -2.3081]
    """
    if form not in FORMS:
        raise ValueError(f"form {form!r} is not one of {', '.join(FORMS)}")
    u, m, logvar = at_least_float32(u, m, logvar)
    if form not in ("ambient", "factorised"):
        return _tangent_log_prob(u, m, logvar, dof, form)
    squares = ((u - m) * torch.exp(-0.5 * logvar)).square()
    if form == "ambient":
        log_prob = _student_t(squares.sum(-1), dof, u.shape[-1])
    else:
        log_prob = _student_t(squares, dof, 1).sum(-1)
    return log_prob - 0.5 * logvar.sum(-1)


FORMS: tuple[Form, ...] = get_args(Form)


def radial_log_prob(r: Tensor, s: Tensor, dof: float, scale: float | Tensor = 1.0) -> Tensor:
    """Log-density of a univariate Student-t at ``r``, centred at ``s``.

    Args:
        r, s: Any shapes that broadcast.
        dof: Degrees of freedom, positive; ``math.inf`` is the Gaussian.
        scale: Scale of the t, positive; a tensor broadcasts too, and gets its gradient.

    Returns:
        The broadcast shape, in nats.

    >>> round(radial_log_prob(torch.tensor(5.0), torch.tensor(2.0), dof=3.0).item(), 4)
    -3.7735
    """
    r, s = at_least_float32(r, s)
    log_scale = scale.log() if isinstance(scale, Tensor) else math.log(scale)
    return _student_t(((r - s) / scale).square(), dof, 1) - log_scale


def _student_t(squared: Tensor, dof: float, width: int) -> Tensor:
    """Unit-scale t in ``width`` dimensions at a squared Mahalanobis distance."""
    if not dof > 0:
        raise ValueError(f"dof={dof} must be positive (inf is the Gaussian)")
    if math.isinf(dof):
        return -0.5 * (width * math.log(2 * math.pi) + squared)
    constant = _log_gamma_ratio(dof / 2, width / 2) - 0.5 * width * math.log(dof * math.pi)
    return constant - 0.5 * (dof + width) * torch.log1p(squared / dof)


def _log_gamma_ratio(x: float, a: float) -> float:
    """``lgamma(x + a) - lgamma(x)``, also where both are so large that nothing would be left."""
    if x < 1e4:
        return math.lgamma(x + a) - math.lgamma(x)
    # Stirling's series, of which only the terms that differ are ever formed.
    leading = (x - 0.5) * math.log1p(a / x) + a * math.log(x + a) - a
    return leading - a / (12 * x * (x + a))


def _tangent_log_prob(u: Tensor, m: Tensor, logvar: Tensor, dof: float, form: Form) -> Tensor:
    """The t in the tangent space at ``m``, without the chart's Jacobian."""
    squared = _tangent_mahalanobis(u, m, torch.exp(-0.5 * logvar), form)
    # det(S^-1 restricted to the complement of m) = det(S^-1) * m' S m, for a unit vector m.
    top = logvar.detach().amax(-1, keepdim=True)
    along_m = (m.square() * torch.exp(logvar - top)).sum(-1)
    log_along_m = along_m.clamp_min(torch.finfo(m.dtype).tiny).log() + top.squeeze(-1)
    return _student_t(squared, dof, u.shape[-1] - 1) + 0.5 * (log_along_m - logvar.sum(-1))


def _tangent_mahalanobis(u: Tensor, m: Tensor, precision: Tensor, form: Form) -> Tensor:
    """Squared Mahalanobis length of the chart's tangent vector at ``m`` that stands for ``u``."""
    minus, plus = u - m, u + m
    # sin^2 and cos^2 of half the angle: each keeps its digits where it is small.
    sin2 = 0.25 * minus.square().sum(-1, keepdim=True)
    cos2 = 0.25 * plus.square().sum(-1, keepdim=True)
    # u - <u, m> m, of length sin(angle) = 2 sqrt(sin2 * cos2), without cancellation at both ends.
    tangent = cos2 * minus + sin2 * plus
    floor = torch.finfo(u.dtype).eps
    cos2 = cos2 + floor
    # (chart length / sin(angle))^2 = stretch / cos2.
    if form == "tangent_chord":
        stretch = torch.ones_like(cos2)
    elif form == "tangent_stereographic":
        stretch = 1 / cos2
    else:
        stretch = _squared_angle_over_chord(sin2, cos2)
    # At -m the tangent vanishes and the floor takes over, with the precision of no direction.
    isotropic = 4 * sin2.squeeze(-1) * floor * precision.square().mean(-1)
    squared = (tangent * precision).square().sum(-1) + isotropic
    return (stretch / cos2).squeeze(-1) * squared


def _squared_angle_over_chord(sin2: Tensor, cos2: Tensor) -> Tensor:
    """``(angle / chord)^2`` from the squared sine and cosine of half the angle."""
    near = sin2 < 1e-4
    series = 1 + sin2 / 3 + 8 * sin2**2 / 45 + 4 * sin2**3 / 35
    safe = torch.where(near, torch.ones_like(sin2), sin2)  # sqrt has no derivative at 0
    angle = 2 * torch.atan2(safe.sqrt(), cos2.sqrt())
    return torch.where(near, series, angle.square() / (4 * safe))
