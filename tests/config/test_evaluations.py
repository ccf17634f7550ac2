"""What is done with an export is refused on the login node where the method cannot give it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vssl_dist import config
from vssl_dist.config import TASKS, RunConfig
from vssl_dist.errors import ConfigError
from vssl_dist.evaluation.scores.posterior import posterior_method_names
from vssl_dist.methods import CONFIGS, build_method
from vssl_dist.models.heads import GaussianBranch

TEXT = """
data: {train: a, val: b, streams: 8, image_size: 32}
optim: {base_lr: 1e-3, global_batch: 128, epochs: 2}
"""


@pytest.mark.parametrize("method", sorted(CONFIGS))
def test_a_task_that_needs_a_posterior_is_for_methods_that_infer_one(method: str) -> None:
    raw: dict[str, Any] = {"name": method, "backbone": "resnet10_c16"}
    if method == "supervised":
        raw["classes"] = 4
    views = ["cifar"] * CONFIGS[method].model_validate(raw).views_wanted
    given = [f"method={json.dumps(raw)}", f"data.views={views}"]

    def read(tasks: str) -> RunConfig:
        return config.loads(TEXT, [*given, f"evaluations={tasks}"], methods=CONFIGS, name="x")

    cfg = read("[{task: knn}, {task: ood, ood: {svhn: c}}]")
    with torch.device("meta"):
        made = build_method(cfg.method, 32)
    branch = made.teacher if made.evaluated == "teacher" else made.student
    infers = isinstance(branch, GaussianBranch)
    assert cfg.method.has_posterior == infers == (method in posterior_method_names())
    if infers:
        assert read("[{task: uncertainty}]").evaluations[0].task == "uncertainty"
        return
    with pytest.raises(ConfigError) as error:
        read("[{task: knn}, {task: uncertainty}]")
    said = str(error.value)
    assert said.startswith("evaluations.1: task uncertainty needs a posterior")
    assert f"method {method} does not infer: leave it out" in said
    assert "\n" not in said


def test_no_other_task_needs_a_posterior() -> None:
    assert [name for name, task in TASKS.items() if task.needs_posterior] == ["uncertainty"]
