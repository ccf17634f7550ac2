"""Recipes are values: named, changed and counted in YAML, and written out whole."""

from __future__ import annotations

from typing import ClassVar

import pytest
import yaml

from vssl_dist import config
from vssl_dist.config import RECIPES, MethodConfig, RunConfig, ViewRecipe
from vssl_dist.errors import ConfigError

TEXT = """
name: run
method: {name: many}
data: {train: a, streams: 8, image_size: 224, views: [VIEWS]}
optim: {base_lr: 0.1, global_batch: 8}
"""


def read(views: str, wanted: int) -> RunConfig:
    class Many(MethodConfig):
        views_wanted: ClassVar[int] = wanted

    return config.loads(TEXT.replace("VIEWS", views), methods={"many": Many})


def test_multi_crop_is_three_entries_for_ten_views() -> None:
    cfg = read("dino_global_1, dino_global_2, {recipe: dino_local, count: 8}", 10)
    assert [view.size for view in cfg.data.views] == [None, None, *[96] * 8]
    assert cfg.data.views[2:] == (RECIPES["dino_local"],) * 8
    written = yaml.safe_load(config.dump(cfg))["data"]["views"]
    assert len(written) == 10
    assert "count" not in written[2]


def test_a_counted_view_may_be_changed_and_written_by_hand() -> None:
    cfg = read("{recipe: cifar, size: 16, count: 2}, {flip: 0, count: 1}", 3)
    assert cfg.data.views[1] == RECIPES["cifar"].model_copy(update={"size": 16})
    assert cfg.data.views[2] == ViewRecipe(flip=0)


@pytest.mark.parametrize("count", ["0", "-1", "65", "1.5", "two", "true", "null", "[1]"])
def test_a_count_that_is_none_is_refused_by_its_entry(count: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.views: count of entry 1 must be a whole number"):
        read(f"cifar, {{recipe: cifar, count: {count}}}", 2)


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ("cifar, {recipe: cifar, size: 0}", r"data\.views\.1\.size"),
        ("cifar, {recipe: cifar, contrast: 1.1}", r"data\.views\.1\.contrast"),
        ("{recipe: cifar, count: 64}, cifar", "at most 64"),
        ("{recipe: nobody, count: 2}", "'nobody' is no recipe"),
    ],
)
def test_a_view_that_cannot_be_made_is_refused_by_its_key(views: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(views, 2)


def test_two_sides_differ_in_nothing_but_blur_and_solarisation() -> None:
    for name, second in (("byol", 0.1), ("moco_v3", 0.1), ("dino_global", 0.1)):
        a, b = RECIPES[f"{name}_1"], RECIPES[f"{name}_2"]
        assert (a.blur, a.solarize, b.blur, b.solarize) == (1.0, 0.0, second, 0.2)
        assert a.model_copy(update={"blur": second, "solarize": 0.2}) == b


def test_nothing_is_blurred_at_32_pixels() -> None:
    assert {recipe.blur for name, recipe in RECIPES.items() if name.startswith("cifar")} == {0.0}
