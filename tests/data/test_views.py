"""Draws are addressed, not sequenced, and have the distributions that recipes name."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from vssl_dist.config import RECIPES, ViewRecipe
from vssl_dist.data.philox import addressed_uniforms, philox_words
from vssl_dist.data.views import Draws, draw
from vssl_dist.vision import torchvision

RECIPE = ViewRecipe(solarize=0.2)


def drawn(
    recipe: ViewRecipe, count: int, *, size: tuple[int, int] = (375, 500), **address: Any
) -> Draws:
    ids = address.get("ids", np.arange(count))
    epochs = np.full(count, address.get("epoch", 0))
    sizes = np.tile(size, (count, 1))
    return draw(recipe, address.get("seed", 0), address.get("view", 0), ids, epochs, sizes)


def same(a: Draws, b: Draws) -> bool:
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Draws))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the known answers published with the generator (Random123, philox4x32, 10 rounds)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (np.array([word], np.uint64) for word in counter)
    k0, k1 = (np.array([word], np.uint64) for word in key)
    assert tuple(int(word[0]) for word in philox_words((c0, c1, c2, c3), (k0, k1))) == expected


def test_a_draw_depends_on_its_own_address_only() -> None:
    whole = drawn(RECIPE, 1000)
    order = np.random.default_rng(0).permutation(1000)
    for rows in (order[:1], order[1:30], order[30:]):
        assert same(drawn(RECIPE, len(rows), ids=rows), whole.take(rows))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"epoch": 1}, {"view": 1}, {"ids": np.arange(1000) + 1000}]
)
def test_every_part_of_the_address_matters(change: dict[str, Any]) -> None:
    draws, other_draws = drawn(RECIPE, 1000), drawn(RECIPE, 1000, **change)
    for name in ("brightness", "contrast", "saturation", "hue"):
        a, b = getattr(draws, name), getattr(other_draws, name)
        jittered_in_both = (a != a[0] * 0 + (name != "hue")) & (b != (name != "hue"))
        assert abs(np.corrcoef(a[jittered_in_both], b[jittered_in_both])[0, 1]) < 0.15
    assert (draws.crop != other_draws.crop).any(axis=1).mean() > 0.95
    assert 0.4 < (draws.flip != other_draws.flip).mean() < 0.6


def test_ids_beyond_32_bits_are_different_ids() -> None:
    ids = np.arange(100)
    assert not same(drawn(RECIPE, 100, ids=ids), drawn(RECIPE, 100, ids=ids + 2**32))


def test_uniforms_are_uniform_and_longer_draws_extend_shorter_ones() -> None:
    ids = np.arange(20_000)
    u = addressed_uniforms(1, 0 * ids, ids, 0, 6)
    assert u.min() > 0
    assert u.max() < 1
    histogram = np.stack([np.histogram(column, 20, (0, 1))[0] for column in u.T])
    assert np.abs(histogram - 1000).max() < 150  # five standard deviations
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.04
    assert np.array_equal(addressed_uniforms(1, 0 * ids, ids, 0, 30)[:, :6], u)


def test_probabilities_and_ranges_are_those_of_the_recipe() -> None:
    recipe = ViewRecipe(flip=0.3, jitter=0.7, grayscale=0.1, blur=0.6, solarize=0.25)
    draws = drawn(recipe, 20_000)
    near = pytest.approx
    assert draws.flip.mean() == near(0.3, abs=0.02)
    assert draws.grayscale.mean() == near(0.1, abs=0.02)
    assert draws.solarize.mean() == near(0.25, abs=0.02)
    assert (draws.blur_sigma > 0).mean() == near(0.6, abs=0.02)
    sigma = draws.blur_sigma[draws.blur_sigma > 0]
    assert (sigma.min(), sigma.max(), sigma.mean()) == near((0.1, 2.0, 1.05), abs=0.02)
    jittered = draws.brightness != 1
    assert jittered.mean() == near(0.7, abs=0.02)
    for name, middle, half in (
        ("brightness", 1, 0.4),
        ("contrast", 1, 0.4),
        ("saturation", 1, 0.2),
        ("hue", 0, 0.1),
    ):
        values = getattr(draws, name)
        assert (values[~jittered] == middle).all()
        factors = values[jittered]
        assert factors.min() == near(middle - half, abs=0.01)
        assert factors.max() == near(middle + half, abs=0.01)
        assert factors.std() == near(half / 3**0.5, rel=0.03)


def test_what_a_recipe_never_does_is_the_identity() -> None:
    draws = drawn(ViewRecipe(flip=0, jitter=0, grayscale=0, blur=0, solarize=0), 1000)
    for name in ("flip", "grayscale", "solarize", "hue", "blur_sigma"):
        assert not getattr(draws, name).any()
    assert (np.stack([draws.brightness, draws.contrast, draws.saturation]) == 1).all()


def test_one_probability_leaves_the_other_decisions_alone() -> None:
    a, b = drawn(RECIPE, 500), drawn(RECIPE.model_copy(update={"blur": 0.0, "flip": 1.0}), 500)
    assert np.array_equal(a.crop, b.crop)
    assert np.array_equal(a.hue, b.hue)
    assert np.array_equal(a.solarize, b.solarize)


def test_the_size_of_a_view_changes_no_draw() -> None:
    assert same(drawn(RECIPE, 500), drawn(RECIPE.model_copy(update={"size": 96}), 500))


def test_local_crops_of_one_recipe_are_different_crops() -> None:
    crops = [drawn(RECIPES["dino_local"], 500, view=view) for view in range(2, 10)]
    for a, b in pairwise(crops):
        assert (a.crop != b.crop).any(axis=1).mean() > 0.99
    area = np.stack([c.crop[:, 2] * c.crop[:, 3] for c in crops]) / (375 * 500)
    assert area.min() == pytest.approx(0.05, abs=0.005)
    assert area.max() == pytest.approx(0.4, abs=0.005)


@pytest.mark.parametrize("size", [(375, 500), (32, 32), (40, 400), (400, 40), (1, 1)])
@pytest.mark.parametrize("recipe", ["byol_1", "moco_v2"])
def test_crops_are_distributed_as_torchvision_draws_them(
    recipe: str, size: tuple[int, int]
) -> None:
    torchvision()
    from torchvision.transforms.v2 import RandomResizedCrop

    chosen = RECIPES[recipe]
    crops = drawn(chosen, 4000, size=size).crop
    assert (crops[:, :2] >= 0).all()
    assert (crops[:, 2:] > 0).all()
    assert (crops[:, :2] + crops[:, 2:] <= size).all()

    torch.manual_seed(0)
    reference = RandomResizedCrop(8, scale=chosen.crop_scale, ratio=chosen.crop_ratio)
    image = torch.zeros(3, *size)
    boxes = [reference.make_params([image]) for _ in range(4000)]
    expected = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in boxes])
    for column, reference_column in zip(crops.T, expected.T, strict=True):
        # Kolmogorov and Smirnov's distance; one draw in 10,000 exceeds this bound by chance.
        grid = np.arange(max(size) + 1)
        below = [
            np.searchsorted(np.sort(edges), grid, side="right")
            for edges in (column, reference_column)
        ]
        assert np.abs(below[0] - below[1]).max() / 4000 < 2.2 * (2 / 4000) ** 0.5
    assert abs(
        (crops[:, 2] * crops[:, 3]).mean() - (expected[:, 2] * expected[:, 3]).mean()
    ) < 0.03 * (size[0] * size[1])


def test_an_image_no_crop_fits_into_gets_the_centre() -> None:
    wide = drawn(ViewRecipe(crop_scale=(0.9, 1.0)), 50, size=(30, 300)).crop
    assert (wide == [0, 130, 30, 40]).all()  # ratio 4/3
    tall = drawn(ViewRecipe(crop_scale=(0.9, 1.0)), 50, size=(300, 30)).crop
    assert (tall == [130, 0, 40, 30]).all()
