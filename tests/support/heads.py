"""Exports of variational methods, as a training writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.exports import NORMALISE
from vssl_dist.config import RECIPES
from vssl_dist.exports.card import (
    CARD_FORMAT,
    ConfigBlock,
    ExportDescription,
)
from vssl_dist.exports.write import write_export
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.models.heads import GaussianBranch

SMALL: dict[str, dict[str, Any]] = {
    "vje": {"name": "vje", "hidden": 24},
    "vje, all learnt": {"name": "vje", "variances": "separate", "learn_radial_scale": True},
    "vssl teacher": {"name": "vssl", "hidden": 24, "dim": 8},
    "vssl student": {"name": "vssl", "hidden": 24, "dim": 8, "evaluated": "student"},
}


def exported_branch(
    folder: Path, data: Path, raw: dict[str, Any], *, step: int = 40
) -> tuple[Path, GaussianBranch]:
    """The evaluated branch of a method with lived-in batch norms, and its export."""
    torch.manual_seed(3)
    cfg = CONFIGS[raw["name"]].model_validate(raw | {"backbone": "resnet18_c16"})
    method = build_method(cfg, 32)
    branch = method.teacher if method.evaluated == "teacher" else method.student
    assert isinstance(branch, GaussianBranch)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(3):
            branch.train()(torch.randn(64, 3, 32, 32))
    views = [RECIPES["cifar"].model_dump(mode="json")] * 2
    config = {
        "method": cfg.model_dump(mode="json"),
        "data": {"backend": "reference", "views": views},
    }
    card = ExportDescription(
        format=CARD_FORMAT,
        run="tiny",
        step=step,
        method=cfg.name,
        backbone=cfg.backbone,
        branch=method.evaluated,
        image_size=32,
        normalise=NORMALISE,
        train=data / "train",
        val=data / "val",
        config=ConfigBlock.model_validate(config),
    )
    path = folder / f"backbone-{step:08d}.safetensors"
    write_export(path, branch.eval(), card)
    return path, branch
