"""Every file in ``configs/`` is read, built, and takes two real steps on a CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.plain import photographs
from tests.support.ranks import run_ranks
from vssl_dist import config
from vssl_dist.data.loader import Batch
from vssl_dist.engine import Engine
from vssl_dist.methods import CONFIGS, METHODS, build_method

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEACHERS = {"byol", "dino", "moco_v3", "vssl"}
IMAGES, SIZE = 4, 32
BIG = "in1k_"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_config_loads_and_its_method_builds(path: Path) -> None:
    cfg = config.load(path, methods=CONFIGS)
    assert cfg.name == path.stem
    assert len(cfg.data.views) == cfg.method.views_wanted
    assert cfg.evaluations
    with torch.device("meta"):
        method = build_method(cfg.method, cfg.data.image_size)
    assert hasattr(method.student, "backbone")
    assert (method.teacher is not None) == (cfg.method.name in TEACHERS)
    assert cfg.micro_batch(64 if path.stem.startswith(BIG) else 2) > 1


def test_every_method_has_a_config_file() -> None:
    used = {config.load(path, methods=CONFIGS).method.name for path in FILES}
    assert used == set(METHODS)


def test_comment_at_the_head_says_how_to_run_it_and_what_it_costs() -> None:
    for path in FILES:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = " ".join(head)
        assert "launch/submit.py" in text, path.name
        assert f"configs/{path.name}" in text, path.name
        assert "GPU" in text, path.name


def two_steps(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Loss and change of the weights of each config in the real engine, on photographs."""
    return {path.stem: _two_steps(path) for path in paths}


def _two_steps(path: Path) -> dict[str, Any]:
    small = {
        "data.image_size": SIZE,
        "data.streams": 1,
        "optim.global_batch": IMAGES,
        "optim.warmup_epochs": 0,
        "engine.autocast": "none",
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in small.items()]
    cfg = config.load(path, overrides, methods=CONFIGS)
    torch.manual_seed(0)
    method = build_method(cfg.method, SIZE)
    engine = Engine(cfg, method, total_steps=10, steps_per_epoch=5.0, device="cpu")
    before = [p.detach().clone() for p in engine.student.parameters() if p.requires_grad]
    outs = [engine.train_step([batch(cfg, step)]) for step in range(2)]
    moved = [p for p in engine.student.parameters() if p.requires_grad]
    changed = [not torch.equal(p, old) for p, old in zip(moved, before, strict=True)]
    found = {
        "losses": [out.loss.item() for out in outs],
        "skipped": outs[-1].metrics["skipped_steps"].item(),
        "changed": sum(changed) / len(changed),
        "finite": all(bool(p.isfinite().all()) for p in moved),
    }
    engine.ds.destroy()
    gc.collect()  # the next network takes the room of this one
    return found


def batch(cfg: config.RunConfig, step: int) -> Batch:
    """Photographs, their views of the sizes that the recipes ask for, halved to fit."""
    whole = photographs(SIZE, count=2 * IMAGES)[step * IMAGES : (step + 1) * IMAGES]
    views = []
    for number, recipe in enumerate(cfg.data.views):
        size = SIZE // 2 if recipe.size else SIZE
        views.append((whole * (1 + 0.1 * number))[..., :size, :size].contiguous())
    ids = torch.arange(IMAGES)
    return Batch(ids, views, ids)


def assert_trained(found: dict[str, dict[str, Any]], files: list[Path]) -> None:
    assert set(found) == {path.stem for path in files}
    for name, run in found.items():
        assert run["skipped"] == 0, name
        assert run["finite"], name
        assert all(loss == loss for loss in run["losses"]), name
        assert run["losses"][0] != run["losses"][1], name
        # Norms inside a branch that starts as zero hardly move before its last one has.
        assert run["changed"] > 0.75, name


@pytest.mark.slow
def test_small_configs_take_two_real_steps() -> None:
    files = [path for path in FILES if not path.stem.startswith(BIG)]
    assert_trained(run_ranks(two_steps, 1, files, timeout_s=900)[0], files)


@pytest.mark.slow
def test_imagenet_configs_take_two_real_steps() -> None:
    files = [path for path in FILES if path.stem.startswith(BIG)]
    assert_trained(run_ranks(two_steps, 1, files, timeout_s=1200)[0], files)
