"""Every file in ``configs/`` is read and its networks are built (without memory, on ``meta``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vssl_dist import config
from vssl_dist.methods import CONFIGS, METHODS, build_method

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_config_loads_and_its_method_builds(path: Path) -> None:
    cfg = config.load(path, methods=CONFIGS)
    assert cfg.name == path.stem
    assert len(cfg.data.views) == 2
    assert cfg.evaluations
    with torch.device("meta"):
        method = build_method(cfg.method, cfg.data.image_size)
    assert hasattr(method.student, "backbone")
    assert (method.teacher is not None) == (cfg.method.name in ("byol", "vssl"))
    assert cfg.micro_batch(64 if path.stem.startswith("in1k") else 2) > 1


def test_every_method_has_a_config_file() -> None:
    used = {config.load(path, methods=CONFIGS).method.name for path in FILES}
    assert used == set(METHODS)


def test_comment_at_the_head_says_how_to_run_it_and_what_it_costs() -> None:
    for path in FILES:
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        text = " ".join(head)
        assert "launch/submit.py" in text, path.name
        assert "GPU" in text, path.name
