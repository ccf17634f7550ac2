"""A variational method says itself how its posterior judges, so that another one is one file."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from torch import Tensor, nn

from tests.support.exports import by_hand
from tests.support.heads import exported_branch
from tests.support.photos import three_splits
from vssl_dist.config import MethodConfig, OodConfig, UncertaintyConfig
from vssl_dist.evaluation.run import evaluate
from vssl_dist.evaluation.scores import detection, variational
from vssl_dist.evaluation.scores.posterior import load_posterior, posterior_method_names
from vssl_dist.exports.read import load_export
from vssl_dist.methods import CONFIGS, METHODS, LossOutput, MicroStep, vje, vssl
from vssl_dist.methods.base import Density, Evidence, Variational
from vssl_dist.models.backbones import build_backbone
from vssl_dist.models.heads import Gaussian, GaussianBranch

ROOM = Path(variational.__file__).parents[1]
FLOOR, WIDTH = -1.0, 6


class ThirdConfig(MethodConfig):
    """A method that is written here and nowhere else."""

    has_posterior: ClassVar[bool] = True

    name: Literal["third"] = "third"
    penalty: float = 0.5

    @property
    def judges_one_view(self) -> bool:
        return True

    @property
    def draws_latents(self) -> bool:
        return True

    def bound_logvar(self, logvar: Tensor) -> Tensor:
        return logvar.clamp_min(FLOOR)

    def judge(
        self, posterior: Gaussian, observed: Gaussian, eps: Tensor, density: Density
    ) -> Evidence:
        """The observed mean is a draw of the posterior, plus noise of variance 1."""
        logvar = self.bound_logvar(posterior.logvar)
        latent = posterior.mu + (0.5 * logvar).exp() * eps
        squared = (observed.mu - latent).square().sum(-1).mean(0)
        likelihood = -0.5 * (squared + posterior.mu.shape[-1] * math.log(2 * math.pi))
        return Evidence(likelihood, likelihood - self.penalty * logvar.exp().sum(-1))


class ThirdWithPairs(ThirdConfig):
    """It sees nothing in one view."""

    name: Literal["third_pairs"] = "third_pairs"  # type: ignore[assignment]

    @property
    def judges_one_view(self) -> bool:
        return False


class Third:
    """Its networks; it is never trained."""

    evaluated: Literal["student", "teacher"] = "student"

    def __init__(self, cfg: ThirdConfig, image_size: int, any_size: bool = False) -> None:
        backbone, width = build_backbone(cfg.backbone, image_size, any_size=any_size)
        self.student: nn.Module = GaussianBranch(backbone, nn.Linear(width, 2 * WIDTH))
        self.teacher: nn.Module | None = None

    def loss(self, views: Sequence[Tensor], now: MicroStep, /) -> LossOutput:
        raise NotImplementedError


@pytest.fixture
def third(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two lines that ``methods/__init__.py`` would have, for one test."""
    for config in (ThirdConfig, ThirdWithPairs):
        name = config().name
        monkeypatch.setitem(METHODS, name, (config, Third))
        monkeypatch.setitem(CONFIGS, name, config)


def test_a_third_variational_method_is_evaluated_by_its_own_judgement(
    third: None, tmp_path: Path
) -> None:
    data = three_splits(tmp_path / "data", foreign=32)
    path, branch = exported_branch(tmp_path / "export", data, {"name": "third"})
    ood = OodConfig(ood={"foreign": data / "foreign"}, k=3, bootstrap=0, pairs=1, posteriors=9)
    found = evaluate(path, ood)
    scores = found["results"]["foreign"]
    assert {name for name in scores if name.startswith("s")} == {
        "s1_self_likelihood", "s2_cross_view_likelihood", "s3_negative_elbo", "s4_posterior_size",
        "s5_bank_likelihood",
    }  # fmt: skip
    assert "density" not in found, "its likelihoods are not of an embedding"

    backbone, _ = load_export(path)
    sizes, selves = [], []
    for part in ("val", "foreign"):
        with torch.inference_mode():
            seen = branch.infer(backbone(by_hand(data / part)[0]))
        sizes.append(seen.logvar.double().clamp_min(FLOOR).sum(-1).numpy())
        constant = 0.5 * WIDTH * math.log(2 * math.pi)  # the mean explains itself without a gap
        selves.append(torch.full((len(seen.mu),), constant, dtype=torch.float64).numpy())
    for name, by_hand_scores in (("s4_posterior_size", sizes), ("s1_self_likelihood", selves)):
        auroc = detection.compute_detection(by_hand_scores[0], by_hand_scores[1]).auroc
        assert scores[name]["auroc"] == pytest.approx(auroc, abs=1e-6), name

    task = UncertaintyConfig(k=3, max_corrupted=4, shown=2)
    told = evaluate(path, task)["results"]
    assert {"posterior_size", "knn_distance"} == told["risk"].keys()
    assert told["most_certain"] == sizes[0].argsort(kind="stable")[:2].tolist()


def test_a_third_method_that_sees_nothing_in_one_view_is_asked_of_pairs(
    third: None, tmp_path: Path
) -> None:
    data = three_splits(tmp_path / "data", foreign=16)
    path, _ = exported_branch(tmp_path / "export", data, {"name": "third_pairs"})
    task = OodConfig(ood={"foreign": data / "foreign"}, k=3, bootstrap=0, pairs=0, posteriors=9)
    alone = evaluate(path, task)["results"]["foreign"]
    paired = evaluate(path, task.model_copy(update={"pairs": 1}))["results"]["foreign"]
    assert paired.keys() - alone.keys() == {
        "s1_self_likelihood", "s2_cross_view_likelihood", "s3_negative_elbo"
    }  # fmt: skip


def test_nothing_of_the_third_method_is_left() -> None:
    assert posterior_method_names() == ["vje", "vssl"]
    assert METHODS.keys() == CONFIGS.keys()


def test_every_method_with_a_posterior_says_how_it_judges_and_no_other_does() -> None:
    for config in CONFIGS.values():
        assert isinstance(config(), Variational) == config.has_posterior


def test_what_evaluates_posteriors_names_no_method() -> None:
    names = re.compile("|".join(rf"(?<!_){name}(?!_dist)" for name in CONFIGS), re.IGNORECASE)
    scores = [f"scores/{name}.py" for name in ("variational", "posterior", "cross_view")]
    for file in (*scores, "tasks/ood.py", "tasks/uncertainty.py"):
        for line in (ROOM / file).read_text().splitlines():
            assert not names.search(line), f"{file}: {line}"


VJE: list[dict[str, Any]] = [{}, {"radial": "log", "beta": 0.4}, {"location": "mean"}]
VSSL: list[dict[str, Any]] = [{}, {"cosine": "none", "denoising": "B"}, {"cosine": "C3"}]


def gaussians(seed: int) -> Gaussian:
    noise = torch.Generator().manual_seed(seed)
    return Gaussian(*(torch.randn(7, WIDTH, generator=noise).double() for _ in range(3)))


@pytest.mark.parametrize("density", ["polar", "cartesian"])
@pytest.mark.parametrize("keys", VJE)
def test_vje_judges_by_the_bound_that_it_trains_on(keys: dict[str, Any], density: Density) -> None:
    cfg, eps = vje.VJEConfig(**keys), torch.randn(3, 7, WIDTH).double()
    terms = vje.elbo(gaussians(1), eps, gaussians(2).h, cfg)
    powers = WIDTH if cfg.radial == "log" else WIDTH - 1
    area = powers * gaussians(2).h.norm(dim=-1).log() if density == "cartesian" else 0.0
    likelihood, bound = cfg.judge(gaussians(1), gaussians(2), eps, density)
    expected = terms.directional + cfg.radial_weight * terms.radial
    torch.testing.assert_close(likelihood, expected - area, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(bound, terms.total(cfg) - area, rtol=1e-14, atol=1e-14)
    if density == "polar":
        assert torch.equal(likelihood, expected)
        assert torch.equal(bound, terms.total(cfg))


@pytest.mark.parametrize("keys", VSSL)
def test_vssl_judges_by_the_bound_that_it_trains_on(keys: dict[str, Any]) -> None:
    cfg, eps = vssl.VSSLConfig(**keys), torch.randn(3, 7, WIDTH).double()
    terms = [vssl.bound(gaussians(1), gaussians(2), draws, cfg) for draws in eps]
    likelihood, bound = cfg.judge(gaussians(1), gaussians(2), eps, "polar")
    assert torch.equal(likelihood, torch.stack([one.denoising for one in terms]).mean(0))
    assert torch.equal(bound, torch.stack([one.total(cfg) for one in terms]).mean(0))
    assert torch.equal(cfg.bound_logvar(eps), vssl.bounded(eps, cfg))


def test_draws_are_asked_for_exactly_where_a_judgement_depends_on_them() -> None:
    for cfg in [vje.VJEConfig(**keys) for keys in VJE] + [vssl.VSSLConfig(**keys) for keys in VSSL]:
        one, other = torch.randn(2, 1, 7, WIDTH).double()
        judged = [cfg.judge(gaussians(1), gaussians(2), eps[None], "polar") for eps in (one, other)]
        if isinstance(cfg, vje.VJEConfig) and cfg.location == "mean":
            assert not cfg.draws_latents
        else:
            assert cfg.draws_latents != torch.equal(judged[0].likelihood, judged[1].likelihood)


def test_a_head_of_a_third_method_is_loaded_with_its_own_keys(third: None, tmp_path: Path) -> None:
    path, _ = exported_branch(tmp_path / "export", tmp_path, {"name": "third", "penalty": 0.25})
    posterior = load_posterior(path)
    assert posterior is not None
    assert posterior.cfg == ThirdConfig(penalty=0.25, backbone="resnet18_c16")
