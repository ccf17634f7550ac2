"""Scores of variational methods against loops over float64 numbers, and against hand-made cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from vssl_dist.evaluation.scores import detection, variational
from vssl_dist.evaluation.scores.cross_view import score_view_pairs
from vssl_dist.evaluation.scores.outliers import OutlierSetup, fit_outlier_scores
from vssl_dist.evaluation.scores.posterior import Posterior
from vssl_dist.evaluation.scores.table import LabelledFeatures
from vssl_dist.evaluation.scores.variational import (
    VariationalSetup,
    make_variational_scores,
    posterior_size,
)
from vssl_dist.methods import CONFIGS
from vssl_dist.models.heads import GaussianBranch

WIDTH = 5
VJE: list[dict[str, Any]] = [
    {},
    {"form": "ambient", "dof": 5.0, "dof_radial": 2.0, "radial_scale": 0.7, "radial_weight": 0.3},
    {"radial": "log", "beta": 0.4, "prior_scale": 1.5, "kl_reduce": "mean"},
    {"location": "mean", "dof": math.inf, "logvar_range": [-0.5, 0.5]},
]
VSSL: list[dict[str, Any]] = [
    {},
    {"cosine": "none", "denoising": "B", "beta": 0.5, "logvar_bound": "clamp"},
    {"cosine": "C3", "variance_weight": 0.2},
    {"cosine": "C2", "denoising": "B", "evaluated": "student"},
]
Vector = NDArray[np.float64]


def setup(name: str, keys: dict[str, Any], **how: Any) -> VariationalSetup:
    torch.manual_seed(5)
    cfg = CONFIGS[name].model_validate({"name": name, **keys})
    predictor = nn.Linear(WIDTH, WIDTH) if keys.get("evaluated") == "student" else None
    branch = GaussianBranch(nn.Identity(), nn.Linear(WIDTH, 2 * WIDTH), predictor).eval()
    return VariationalSetup(
        Posterior(branch, cfg), **({"draw_count": 3, "posterior_count": 100} | how)
    )


def rows(count: int, seed: int) -> Tensor:
    return 1.5 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def weighted(layer: Any, rows: list[Vector]) -> list[Vector]:
    weight, bias = (p.detach().double().numpy() for p in layer.parameters())
    return [weight @ row + bias for row in rows]


def inferred(made: VariationalSetup, h: Tensor, predict: bool = True) -> list[tuple[Vector, ...]]:
    """Embedding, mean and unbounded log-variance of each image."""
    branch, rows = made.posterior.branch, list(h.double().numpy())
    both = weighted(branch.posterior, rows)
    means, logvars = [one[:WIDTH] for one in both], [one[WIDTH:] for one in both]
    if predict and branch.predictor is not None:
        means = weighted(branch.predictor, means)
    return list(zip(rows, means, logvars, strict=True))


def student(squared: float, dof: float, width: int) -> float:
    if math.isinf(dof):
        return -0.5 * (width * math.log(2 * math.pi) + squared)
    top, bottom = math.lgamma((dof + width) / 2), math.lgamma(dof / 2)
    return (
        top
        - bottom
        - width / 2 * math.log(dof * math.pi)
        - (dof + width) / 2 * math.log1p(squared / dof)
    )


def directional(u: Vector, m: Vector, variance: Vector, dof: float, form: str) -> float:
    if form == "ambient":
        squared = sum((u[d] - m[d]) ** 2 / variance[d] for d in range(WIDTH))
        return student(squared, dof, WIDTH) - 0.5 * sum(math.log(v) for v in variance)
    c = float(u @ m)
    v = u - c * m
    y = math.sqrt(2 - 2 * c) * v / np.linalg.norm(v)
    squared = sum(y[d] ** 2 / variance[d] for d in range(WIDTH))
    along = math.log(sum(m[d] ** 2 * variance[d] for d in range(WIDTH)))
    return student(squared, dof, WIDTH - 1) - 0.5 * sum(map(math.log, variance)) + 0.5 * along


def vje_terms(made: VariationalSetup, one: Any, other: Any, eps: Vector) -> tuple[float, float]:
    """Log-likelihood of the other's embedding under one draw, and the bound."""
    cfg: Any = made.posterior.cfg
    (_, mu, logvar), h = one, other[0]
    logvar = np.clip(logvar, *cfg.logvar_range)
    z = mu + np.exp(logvar / 2) * eps
    r, s = np.linalg.norm(h), np.linalg.norm(z)
    found = directional(h / r, z / s, np.exp(logvar), cfg.dof, cfg.form)
    a, b = (math.log(r), math.log(s)) if cfg.radial == "log" else (r, s)
    tau, dof = cfg.radial_scale, cfg.dof_radial or cfg.dof
    found += cfg.radial_weight * (student(((a - b) / tau) ** 2, dof, 1) - math.log(tau))
    if made.density == "cartesian":  # dh = r^(D-1) dr du, and dr = r d(log r)
        found -= (WIDTH - 1 + (cfg.radial == "log")) * math.log(r)
    p = cfg.prior_scale**2
    kl = 0.5 * sum((mu[d] ** 2 + math.exp(logvar[d])) / p - 1 - logvar[d] for d in range(WIDTH))
    kl += 0.5 * WIDTH * math.log(p)
    return found, found - cfg.beta * kl / (WIDTH if cfg.kl_reduce == "mean" else 1)


def vssl_terms(made: VariationalSetup, one: Any, other: Any, eps: Vector) -> tuple[float, float]:
    """The denoising term, student ``one`` and teacher ``other``, and the bound."""
    cfg: Any = made.posterior.cfg
    low, high = cfg.logvar_range

    def bounded(v: Vector) -> Vector:
        if cfg.logvar_bound == "clamp":
            return np.clip(v, low, high)
        half = (high - low) / 2
        return (low + high) / 2 + half * np.tanh((v - (low + high) / 2) / half)

    (_, ms, ls), (_, mt, lt) = one, other
    ls, lt = bounded(ls), bounded(lt)
    spread = sum(0.5 * (math.exp(v) - 1 - v) for v in ls)

    def cos(a: Vector, b: Vector) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    if cfg.cosine == "C3":
        denoising = cos(ms + np.exp(ls / 2) * eps, mt)
        kl = 2 - cos(ms, mt) - cos(np.exp(ls / 2), np.exp(lt / 2))
        return denoising, denoising - cfg.beta * kl - cfg.variance_weight * spread
    if cfg.cosine == "C2":
        return c2_terms(cfg, (ms, ls), (mt, lt), eps, spread)
    if cfg.cosine == "C1":
        ms, mt = ms / np.linalg.norm(ms), mt / np.linalg.norm(mt)
    denoising = kl = 0.0
    for d in range(WIDTH):
        gap = (ms[d] - mt[d]) ** 2
        kl += 0.5 * (lt[d] - ls[d] + (math.exp(ls[d]) + gap) / math.exp(lt[d]) - 1)
        if cfg.denoising == "A":
            inside = math.log(2 * math.pi) + lt[d] + (gap + math.exp(ls[d])) / math.exp(lt[d])
        else:
            latent = mt[d] + math.exp(lt[d] / 2) * eps[d]
            inside = math.log(2 * math.pi) + ls[d] + (latent - ms[d]) ** 2 / math.exp(ls[d])
        denoising -= 0.5 * inside
    return denoising, denoising - cfg.beta * kl - cfg.variance_weight * spread


def c2_terms(cfg: Any, s: Any, t: Any, eps: Vector, spread: float) -> tuple[float, float]:
    """Form B, the squared distances those of unit vectors over a mean variance."""
    (ms, ls), (mt, lt) = s, t
    latent = mt + np.exp(lt / 2) * eps

    def apart(a: Vector, b: Vector) -> float:
        return float(np.square(a / np.linalg.norm(a) - b / np.linalg.norm(b)).sum())

    denoising = -0.5 * sum(math.log(2 * math.pi) + v for v in ls)
    denoising -= 0.5 * apart(ms, latent) / np.mean([math.exp(v) for v in ls])
    kl = sum(0.5 * (b - a + math.exp(a - b) - 1) for a, b in zip(ls, lt, strict=True))
    kl += 0.5 * apart(ms, mt) / np.mean([math.exp(v) for v in lt])
    return denoising, denoising - cfg.beta * kl - cfg.variance_weight * spread


def cases() -> list[Any]:
    vje: list[Any] = [("vje", vje_terms, keys, "cartesian") for keys in VJE]
    vje += [("vje", vje_terms, VJE[0], "polar"), ("vje", vje_terms, VJE[2], "polar")]
    each = vje + [("vssl", vssl_terms, keys, "polar") for keys in VSSL]
    return [pytest.param(*one, id=f"{one[0]} {one[2]} {one[3]}") for one in each]


@pytest.mark.parametrize(("name", "terms", "keys", "density"), cases())
def test_each_score_is_that_of_a_naive_loop(
    name: str,
    terms: Callable[..., tuple[float, float]],
    keys: dict[str, Any],
    density: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, still = setup(name, keys, density=density), np.zeros(WIDTH)
    bank, queries = LabelledFeatures(rows(11, 1), torch.zeros(11, dtype=torch.int64)), rows(7, 2)
    images, known = inferred(made, queries), inferred(made, bank.features)
    targets = inferred(made, queries, predict=False)
    each = made.draw_noise((3, 1, WIDTH)).double().numpy()[:, 0]
    latents = made.draw_noise((1, 11, 1, WIDTH)).double().numpy()[0, :, 0]
    posteriors = list(zip(known, latents, strict=True))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).sort().values
    assert order.tolist() == list(range(11)), "a bank smaller than asked for is used whole"
    low, high = made.posterior.cfg.logvar_range  # type: ignore[attr-defined]
    half, middle = (high - low) / 2, (low + high) / 2
    soft = getattr(made.posterior.cfg, "logvar_bound", "clamp") == "soft"
    wanted = {
        "s1_self_likelihood": [-terms(made, x, x, still)[0] for x in images],
        "s3_negative_elbo": [-np.mean([terms(made, x, x, e)[1] for e in each]) for x in images],
        "s4_posterior_size": [
            sum(
                middle + half * math.tanh((v - middle) / half) if soft else min(max(v, low), high)
                for v in x[2]
            )
            for x in images
        ],
        "s5_bank_likelihood": [
            -math.log(np.mean([math.exp(terms(made, z, x, e)[0]) for z, e in posteriors]))
            for x in targets
        ],
    }
    if name == "vssl":  # alone, an image says no more than the size of its posterior does
        del wanted["s1_self_likelihood"], wanted["s3_negative_elbo"]
    for at_once in (1 << 22, 40):  # whole, and image by image
        monkeypatch.setattr(variational, "MAX_POSTERIOR_NUMBERS", at_once)
        monkeypatch.setattr(variational, "_IMAGES_PER_LIKELIHOOD_BLOCK", 64 if at_once > 40 else 2)
        found = make_variational_scores(made, bank)
        assert list(found) == list(wanted)
        for kind, score in found.items():
            ours = score(queries)
            assert ours.dtype == torch.float64
            assert ours.shape == (7,)
            assert ours.numpy() == pytest.approx(wanted[kind], rel=2e-5, abs=2e-5), kind


@pytest.mark.parametrize(("name", "terms", "keys", "density"), cases())
def test_scores_of_pairs_are_means_over_pairs_and_directions(
    name: str,
    terms: Callable[..., tuple[float, float]],
    keys: dict[str, Any],
    density: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, still = setup(name, keys, density=density), np.zeros(WIDTH)
    plain, views = rows(4, 8), rows(4 * 6, 3).reshape(4, 6, WIDTH)
    draws = made.draw_noise((3, 1, WIDTH)).double().numpy()[:, 0]
    wanted: dict[str, list[float]] = {"s2_cross_view_likelihood": []}
    if name == "vssl":
        wanted |= {"s1_self_likelihood": [], "s3_negative_elbo": []}

    def both(a: Any, b: Any, eps: Vector, which: int) -> float:
        """Minus the mean of both directions; each is a posterior and a target."""
        return -0.5 * (terms(made, a[0], b[1], eps)[which] + terms(made, b[0], a[1], eps)[which])

    for image, own in zip(views, plain, strict=True):
        sides = list(zip(inferred(made, image), inferred(made, image, predict=False), strict=True))
        itself = inferred(made, own[None])[0], inferred(made, own[None], predict=False)[0]
        pairs = [(sides[2 * t], sides[2 * t + 1]) for t in range(3)]
        found = {
            "s2_cross_view_likelihood": [both(a, b, still, 0) for a, b in pairs],
            "s1_self_likelihood": [both(itself, a, still, 0) for a in sides],
            "s3_negative_elbo": [both(a, b, eps, 1) for a, b in pairs for eps in draws],
        }
        for kind, values in wanted.items():
            values.append(float(np.mean(found[kind])))
    for at_once in (1 << 22, 10):  # whole, and image by image
        monkeypatch.setattr("vssl_dist.evaluation.scores.cross_view.MAX_POSTERIOR_NUMBERS", at_once)
        ours = score_view_pairs(made, plain, views)
        assert ours.keys() == wanted.keys()
        for kind, values in wanted.items():
            assert ours[kind].dtype == torch.float64
            assert ours[kind].numpy() == pytest.approx(values, rel=1e-5, abs=1e-5), kind


def test_of_one_view_vssl_knows_the_size_of_its_posterior_and_of_pairs_more() -> None:
    made, images = setup("vssl", {}), rows(60, 9)
    alone = made.posterior.infer(images)
    size = posterior_size(made.posterior, images)
    for evidence in made.judge(alone, alone, torch.zeros(1, 1, WIDTH)):
        assert abs(spearmanr(-evidence, size)[0]) > 0.9999
    views = images[:, None] + 0.4 * rows(60 * 8, 10).view(60, 8, WIDTH)
    found = list(score_view_pairs(made, images, views).values())
    for number, one in enumerate(found):
        for other in [size, *found[:number]]:
            assert abs(spearmanr(one, other)[0]) < 0.995


def test_polar_densities_lack_the_area_of_the_sphere() -> None:
    bank, queries = LabelledFeatures(rows(9, 1), torch.zeros(9, dtype=torch.int64)), rows(6, 2)
    radius = queries.double().norm(dim=1).log()
    for radial, powers in (("linear", WIDTH - 1), ("log", WIDTH)):
        polar, cartesian = (
            make_variational_scores(setup("vje", {"radial": radial}, density=density), bank)
            for density in ("polar", "cartesian")
        )
        for name in ("s1_self_likelihood", "s3_negative_elbo", "s5_bank_likelihood"):
            gap = cartesian[name](queries) - polar[name](queries)
            assert gap.numpy() == pytest.approx((powers * radius).numpy(), abs=1e-4), name
        assert torch.equal(
            cartesian["s4_posterior_size"](queries), polar["s4_posterior_size"](queries)
        )


class Handmade(nn.Module):
    """Mean: the features themselves.  Log-variances: all the first feature."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([h, h[:, :1].expand_as(h)], dim=1)


@pytest.mark.parametrize("name", ["vje", "vssl"])
def test_a_foreign_image_scores_higher_an_alike_one_the_same_a_familiar_one_lower(
    name: str,
) -> None:
    """AUROC 1, 0.5 and 0: foreign is what has a wide posterior, far from the bank's."""
    cfg = CONFIGS[name].model_validate({"name": name})
    made = VariationalSetup(Posterior(GaussianBranch(nn.Identity(), Handmade()), cfg))
    noise = 0.05 * rows(120, 4)
    familiar = noise[:40] + torch.tensor([-2.0, 3, 0, 0, 0])
    alike = familiar.clone()
    foreign = noise[40:80] + torch.tensor([2.0, 0, 3, 0, 0])
    bank = LabelledFeatures(
        noise[80:] + torch.tensor([-2.0, 3, 0, 0, 0]), torch.zeros(40, dtype=torch.int64)
    )
    scores = fit_outlier_scores(OutlierSetup(bank, num_classes=1, k=5, l2=1e-3, variational=made))
    del scores["norm"]  # they differ in direction alone
    alone = {"vje": ["s1_self_likelihood", "s3_negative_elbo"], "vssl": []}[name]
    assert [kind for kind in scores if kind.startswith("s")] == [
        *alone,
        "s4_posterior_size",
        "s5_bank_likelihood",
    ]

    def of_pairs(kind: str) -> Callable[[Tensor], Tensor]:
        return lambda h: score_view_pairs(made, h, torch.stack([h, h + 0.01], dim=1))[kind]

    of_both = score_view_pairs(made, familiar, familiar[:, None].repeat(1, 2, 1))
    scores |= {kind: of_pairs(kind) for kind in of_both}
    assert len([kind for kind in scores if kind.startswith("s")]) == 5
    for kind, score in scores.items():
        inside = score(familiar).numpy()
        assert detection.compute_detection(inside, score(foreign).numpy()).auroc == 1, kind
        assert detection.compute_detection(inside, score(alike).numpy()).auroc == 0.5, kind
        assert detection.compute_detection(score(foreign).numpy(), inside).auroc == 0, kind


def test_the_bank_may_be_larger_than_what_explains() -> None:
    bank = LabelledFeatures(rows(500, 6), torch.zeros(500, dtype=torch.int64))
    made = setup("vje", {}, posterior_count=20)
    taken = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:20].sort().values
    few = LabelledFeatures(bank.features[taken], bank.labels[:20])
    queries = rows(5, 7)
    one, other = (make_variational_scores(made, b)["s5_bank_likelihood"] for b in (bank, few))
    assert torch.equal(one(queries), other(queries))
    half = LabelledFeatures(bank.features.half(), bank.labels)
    close = make_variational_scores(made, half)["s5_bank_likelihood"](queries.half())
    assert close.numpy() == pytest.approx(one(queries).numpy(), rel=1e-2)
