"""Whatever a training draws is explained on the page of the curves, under the name that it has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.views import NoNoise, two_views
from vssl_dist.curves import EPOCH, current_curve, training_curves
from vssl_dist.methods import CONFIGS, MicroStep, build_method, monitors

ROOT = Path(__file__).parents[1]
SMALL: dict[str, dict[str, Any]] = {
    "vje": {"variances": "separate", "learn_radial_scale": True, "target": "ema"},
    "vssl": {"hidden": 32, "dim": 16},
    "simclr": {"hidden": 32, "dim": 16},
    "moco_v3": {"hidden": 32, "dim": 16},
    "barlow_twins": {"hidden": 32, "dim": 16},
    "vicreg": {"hidden": 32, "dim": 16},
    "dino": {"local_crops": 0, "hidden": 32, "bottleneck": 16, "prototypes": 24},
    "supervised": {"classes": 3},
}


def explained() -> str:
    """The first column of the page's tables, a pattern for each name."""
    page = (ROOT / "docs" / "monitors.md").read_text()
    cells = re.findall(r"^\| (`[^|]*`) \|", page, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return "|".join(re.escape(name).replace(r"\*", r"\w+") for name in names)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_figure_of_a_method_is_explained_as_a_curve(name: str) -> None:
    cfg = CONFIGS[name](backbone="resnet10_c16", **SMALL.get(name, {}))
    views = two_views(8)[: cfg.views_wanted]
    out = build_method(cfg, 32).loss(views, MicroStep(NoNoise(), 5.0, torch.arange(8) % 3))
    figures = dict.fromkeys([*out.metrics, *monitors.embedding(out.embedding)], 0.0)
    curves = training_curves(figures)
    assert [curve for curve in curves if not re.fullmatch(explained(), curve)] == []
    assert name == "supervised" or "train/alignment_cos" in curves


def test_what_else_a_training_draws_is_explained_under_its_present_name() -> None:
    lines = (ROOT / "tests" / "tracker" / "spool_of_7dc44c1" / "train.jsonl").read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    written = {name for record in records if "step" in record for name in record["values"]}
    curves = {current_curve(name, of_training=True) for name in written} | {EPOCH}
    assert {"train/lr", "train/online_top1", "train/data_wait_share"} <= curves
    assert [curve for curve in sorted(curves) if not re.fullmatch(explained(), curve)] == []
