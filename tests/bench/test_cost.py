"""What a recipe costs is counted right, and is what its head and the page say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.cost import (
    NUM_IMAGES,
    RecipeCost,
    a100_operations_per_s,
    markdown_rows,
    operations_per_image,
    recipe_cost,
    two_digits,
)
from vssl_dist import config
from vssl_dist.methods import CONFIGS
from vssl_dist.vision import torchvision

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cost.md").read_text()


def recipe(name: str) -> config.RunConfig:
    return config.load(ROOT / "configs" / f"{name}.yaml", methods=CONFIGS)


def test_a_supervised_step_is_three_forward_passes_of_what_torchvision_says_resnet50_takes() -> (
    None
):
    weights = torchvision().models.ResNet50_Weights.IMAGENET1K_V1
    forward = 2e9 * weights.meta["_ops"]  # a multiplication and an addition each
    first = 2 * 64 * 3 * 7 * 7 * 112 * 112  # images need no gradient
    assert operations_per_image(recipe("in1k_supervised")) == pytest.approx(
        3 * forward - first, rel=2e-3
    )
    assert a100_operations_per_s(ROOT / "configs") == pytest.approx(
        2470 * (3 * forward - first), rel=2e-3
    )


def test_a_second_view_is_as_much_again_and_a_teacher_adds_its_forward_passes() -> None:
    small = ["method.backbone=resnet10_c16"]
    loaded = {
        name: config.load(ROOT / "configs" / f"cifar10_{name}.yaml", small, methods=CONFIGS)
        for name in ("supervised", "vje")
    }
    one, two = operations_per_image(loaded["supervised"]), operations_per_image(loaded["vje"])
    assert two == pytest.approx(2 * one, rel=0.05)  # the inference network is small
    teacher = [*small, "method.target=ema", "method.preset=null"]
    third = operations_per_image(
        config.load(ROOT / "configs/cifar10_vje.yaml", teacher, methods=CONFIGS)
    )
    assert third - two == pytest.approx(2 * one / 3, rel=0.05)


def test_the_row_of_a_recipe_is_what_the_command_counts() -> None:
    told = re.search(r"\n([\d.]+) TFLOP/s: ", PAGE)
    assert told is not None
    assert (
        recipe_cost(recipe("stl10_supervised")).num_images
        == 5_000 * recipe("stl10_supervised").optim.epochs
    )
    (*_, row) = markdown_rows([recipe_cost(recipe("cifar10_vje"))], 1e12 * float(told[1]))
    assert row in PAGE


def test_every_recipe_of_a_dataset_has_its_hours_on_the_page_and_the_same_in_its_head() -> None:
    rows = dict(re.findall(r"\| `(\w+)` \|.*\| ([\d.,]+) \|", PAGE))
    paths = [p for p in (ROOT / "configs").glob("*.yaml") if p.stem.split("_")[0] in NUM_IMAGES]
    assert {path.stem for path in paths} == set(rows)
    for path in paths:
        assert f"# GPU-hours: about {rows[path.stem]} on an A100" in path.read_text(), path.name


def test_hours_are_operations_over_the_rate() -> None:
    one = RecipeCost("x", operations_per_image=7.2e9, num_images=1e6)
    assert one.gpu_hours(operations_per_s=1e12) == pytest.approx(2.0)
    assert two_digits(one.gpu_hours(1e12)) == "2"
