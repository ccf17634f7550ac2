"""A run whose embedding collapses says so within 200 steps, and no healthy run does.

Real training of small networks on photographs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.support.photos import tiny_dataset
from tests.support.ranks import run_ranks
from vssl_dist import config
from vssl_dist.methods import CONFIGS, METHODS, LossOutput, MicroStep
from vssl_dist.methods.vje import VJE, VJEConfig, draw, elbo
from vssl_dist.train import train

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
HEAD = {"backbone": "resnet10_c16", "hidden": 256, "dim": 64}
HEALTHY: dict[str, dict[str, Any]] = {
    "vje": {"backbone": "resnet10_c16"},
    "vssl": HEAD,
    "byol": HEAD,
    "simsiam": HEAD,
    "simclr": HEAD,
    "moco_v3": HEAD,
    "barlow_twins": HEAD,
    "vicreg": HEAD,
}
Curves = list[tuple[int, dict[str, float]]]


class WithoutStopGradient(VJE):
    """VJE that may move the observation towards its explanation."""

    def loss(self, views: Sequence[Tensor], now: MicroStep) -> LossOutput:
        one, two = (self.student(view) for view in views)
        bounds = [
            elbo(seen, draw(self.cfg, now, branch, seen.mu), other.h, self.cfg).total(self.cfg)
            for branch, seen, other in (("1", one, two), ("2", two, one))
        ]
        return LossOutput(-0.5 * torch.stack(bounds).sum(0).mean(), one.h.detach())


def curves(data: Path, out: Path, name: str, steps: int, method: dict[str, Any]) -> Curves:
    """What a run logs, every 40 steps and whenever else it wants to."""
    changes = {
        "out": str(out),
        "data.train": str(data),
        "data.val": None,
        "evaluations": [],
        "data.image_size": 16,
        "data.window": 64,
        "method": method,
        "optim.global_batch": 64,
        "optim.base_lr": 0.032,
        "optim.epochs": 1000,
        "optim.warmup_epochs": 2,
        "optim.max_steps": steps,
        "log_every": 40,
        "checkpoint.every_minutes": None,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    cfg = config.load(QUICKSTART, [f"name={name}", *overrides], methods=CONFIGS)
    seen: Curves = []

    def log(metrics: Mapping[str, float], step: int) -> None:
        seen.append((step, dict(metrics)))

    train(cfg, device="cpu", should_stop=lambda: False, on_export=lambda *_: None, log=log)
    return seen


def all_curves(data: Path, out: Path) -> dict[str, Curves]:
    found = {
        name: curves(data, out, name, 60, {"name": name} | keys) for name, keys in HEALTHY.items()
    }
    vje = {"name": "vje"} | HEALTHY["vje"]
    with mock.patch.dict(METHODS, vje=(VJEConfig, WithoutStopGradient)):
        found["collapsing"] = curves(data, out, "collapsing", 150, vje)
    return found


@pytest.mark.slow
def test_only_the_run_that_collapses_raises_the_alarm_and_it_goes_on(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "photos", samples=512, classes=8)
    (found,) = run_ranks(all_curves, 1, data, tmp_path, timeout_s=900)
    for name in HEALTHY:
        last = found[name][-1][1]
        assert [step for step, _ in found[name]] == [40, 60], name
        assert all(metrics["collapse_alarm"] == 0 for _, metrics in found[name]), name
        wanted = {
            "embedding_alignment",
            "embedding_uniformity",
            "alignment_cos",
            "grad_norm_backbone",
        }
        wanted |= {"grad_norm_head", "effective_rank", "embedding_spread"}
        wanted |= {"teacher_agreement"} if name in ("vssl", "byol", "moco_v3") else set()
        wanted |= {"sigma_min", "sigma_mean", "kl_per_dim"} if name in ("vje", "vssl") else set()
        assert wanted <= set(last), name
        parts = [last[f"grad_norm{part}"] for part in ("", "_backbone", "_head")]
        assert parts[0] ** 2 == pytest.approx(parts[1] ** 2 + parts[2] ** 2, rel=1e-4), name
    gone = found["collapsing"]
    first = next(step for step, metrics in gone if metrics["collapse_alarm"])
    assert first % 25 == 0
    assert first < 150
    assert gone[-1][0] == 150  # an alarm, no end
