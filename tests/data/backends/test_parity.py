"""DALI and the reference make the same views of the same draws."""

from __future__ import annotations

import colorsys
import io
import os
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from bench.parity import MAX_MEAN_DIFFERENCE, backend_difference, main, portable_folder
from bench.parity_cases import (
    ALL_OPERATIONS_RECIPE,
    LEVEL_NORMALISATION,
    OPERATION_DRAWS,
    ImageSet,
    encoded_samples,
    folder_image_set,
    identity_draws,
    photograph_patches,
    photographs,
    recipe_draws,
    standard_image_sets,
)
from vssl_dist.config import RECIPES, Normalisation, ViewRecipe
from vssl_dist.data.backends.base import (
    Backend,
    BackendSpec,
    DevicePlacement,
    UndecodableError,
)
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.render import centre_crop_boxes
from vssl_dist.data.store.dataset import Samples
from vssl_dist.data.views import Draws

BACKENDS = ["dali", "reference"]
# Views of at most 96 pixels: the tables in the docs have those of 224.
CASES = {case.name: replace(case, side=min(case.side, 96)) for case in standard_image_sets()}
PATCHES = CASES["patches of 32"]


@pytest.fixture(scope="module", params=[*CASES, "real"])
def case(request: pytest.FixtureRequest) -> ImageSet:
    if request.param != "real":
        return CASES[request.param]
    data_folder = os.environ.get("VSSL_TEST_DATA")
    if data_folder is None or not (real := Path(data_folder) / "imagenet-native").is_dir():
        pytest.skip("VSSL_TEST_DATA holds no imagenet-native")
    return replace(folder_image_set(real, limit=16), side=96)


def levels(name: str, recipes: tuple[ViewRecipe, ...], side: int, threads: int = 1) -> Backend:
    return build_backend(name, BackendSpec(recipes, side, LEVEL_NORMALISATION, threads))


def rows_of(samples: Samples, rows: NDArray[np.int64]) -> Samples:
    data = [samples.data[row] for row in rows]
    return Samples(data, samples.height[rows], samples.width[rows], samples.label[rows], [])


@pytest.mark.parametrize("operation", OPERATION_DRAWS)
def test_each_operation_agrees(operation: str, case: ImageSet) -> None:
    mean, _ = backend_difference(
        case, ALL_OPERATIONS_RECIPE, OPERATION_DRAWS[operation](identity_draws(case.samples))
    )
    assert mean < MAX_MEAN_DIFFERENCE / 2


@pytest.mark.parametrize("operation", OPERATION_DRAWS)
def test_each_operation_differs_by_at_most_a_level_where_nothing_is_resized(operation: str) -> None:
    _, greatest = backend_difference(
        PATCHES, ALL_OPERATIONS_RECIPE, OPERATION_DRAWS[operation](identity_draws(PATCHES.samples))
    )
    assert greatest < 1.001


@pytest.mark.parametrize("operation", OPERATION_DRAWS)
def test_each_operation_does_something(operation: str) -> None:
    plain = identity_draws(PATCHES.samples)
    backend = levels("dali", (ALL_OPERATIONS_RECIPE, ALL_OPERATIONS_RECIPE), 32)
    before, after = backend(PATCHES.samples, [plain, OPERATION_DRAWS[operation](plain)])
    changed = (before - after).abs().mean().item()
    assert changed == 0 if operation == "resize" else changed > 2


@pytest.mark.parametrize("name", RECIPES)
def test_whole_recipes_agree(name: str) -> None:
    case = CASES["photographs"]
    mean, _ = backend_difference(case, RECIPES[name], recipe_draws(case.samples, RECIPES[name]))
    assert mean < MAX_MEAN_DIFFERENCE / 2


def test_everything_drawn_agrees(case: ImageSet) -> None:
    mean, _ = backend_difference(
        case, ALL_OPERATIONS_RECIPE, recipe_draws(case.samples, ALL_OPERATIONS_RECIPE)
    )
    assert mean < MAX_MEAN_DIFFERENCE / 2


def test_strong_jitter_agrees_too(case: ImageSet) -> None:
    strong = ViewRecipe(brightness=1, contrast=1, saturation=1, hue=0.5, jitter=1, grayscale=0)
    mean, _ = backend_difference(case, strong, recipe_draws(case.samples, strong))
    assert mean < MAX_MEAN_DIFFERENCE


@pytest.mark.parametrize(
    "keys",
    list(product((0, 0.4), repeat=4)),
    ids=lambda keys: "".join(str(int(k > 0)) for k in keys),
)
def test_any_part_of_the_jitter_may_be_left_out(keys: tuple[float, ...]) -> None:
    strengths = dict(zip(("brightness", "contrast", "saturation", "hue"), keys, strict=True))
    recipe = ViewRecipe(jitter=0.7, grayscale=0, blur=0, **strengths)
    mean, greatest = backend_difference(PATCHES, recipe, recipe_draws(PATCHES.samples, recipe))
    assert mean < MAX_MEAN_DIFFERENCE / 2
    assert greatest < 12


def test_resizing_differs_by_more_than_two_levels_at_the_border_only() -> None:
    samples = encoded_samples(photographs(), "PNG")
    recipe = ViewRecipe(jitter=0, grayscale=0, blur=0)
    actual, expected = (
        levels(n, (recipe,), 224)(samples, [identity_draws(samples)])[0] for n in BACKENDS
    )
    inner = np.s_[:, :, 1:-1, 1:-1]
    assert (actual[inner] - expected[inner]).abs().max() < 2.001


def naive(pixels: NDArray[np.uint8], d: Draws) -> NDArray[np.float64]:
    """One view at the size of the image: every operation in a line, cut to whole levels."""
    weights = np.array([0.299, 0.587, 0.114])
    contrast, saturation = float(d.contrast), float(d.saturation)
    x = np.floor(np.clip(pixels * float(d.brightness), 0, 255))
    x = np.floor(np.clip(contrast * x + (1 - contrast) * np.floor(x @ weights).mean(), 0, 255))
    grey = np.floor(x @ weights)[..., None]
    x = np.floor(np.clip(saturation * x + (1 - saturation) * grey, 0, 255))
    for pixel in np.ndindex(x.shape[:2]):
        hue, chroma, value = colorsys.rgb_to_hsv(*x[pixel] / 255)
        x[pixel] = 255 * np.array(colorsys.hsv_to_rgb((hue + float(d.hue)) % 1, chroma, value))
    if d.grayscale:
        x = np.floor(x @ weights)[..., None].repeat(3, 2)
    if d.blur_sigma > 0:
        radius = int(np.ceil(3 * float(d.blur_sigma)))
        x = ndimage.gaussian_filter(
            x, float(d.blur_sigma), mode="mirror", radius=radius, axes=(0, 1)
        )
    x = np.where(x >= 128, 255 - x, x) if d.solarize else x
    return x[:, ::-1] if d.flip else x


def test_the_operations_and_their_order_are_those_of_a_naive_loop() -> None:
    images = photograph_patches(each=1)
    samples = encoded_samples(images, "PNG")
    recipe = ViewRecipe(jitter=1, saturation=0.4, hue=0.2, grayscale=0.2, blur=0.5, solarize=0.3)
    draws = replace(recipe_draws(samples, recipe), crop=identity_draws(samples).crop)
    assert min(draws.flip.sum(), draws.grayscale.sum(), draws.solarize.sum()) > 1
    expected = np.stack(
        [naive(np.asarray(image), draws.take(row)) for row, image in enumerate(images)]
    )
    for name in BACKENDS:
        actual = levels(name, (recipe,), 32)(samples, [draws])[0].permute(0, 2, 3, 1).numpy()
        assert np.abs(actual - expected).mean(axis=(1, 2, 3)).max() < MAX_MEAN_DIFFERENCE
        assert np.abs(actual - expected).mean() < MAX_MEAN_DIFFERENCE / 2


def test_random_crops_agree(case: ImageSet) -> None:
    recipe = ViewRecipe(jitter=0, grayscale=0, blur=0)
    assert (
        backend_difference(case, recipe, recipe_draws(case.samples, recipe))[0]
        < MAX_MEAN_DIFFERENCE / 4
    )


def test_normalisation_agrees() -> None:
    case = CASES["photographs"]
    spec = BackendSpec((ALL_OPERATIONS_RECIPE,), case.side, Normalisation())
    actual, expected = (
        build_backend(name, spec)(case.samples, [identity_draws(case.samples)])[0]
        for name in BACKENDS
    )
    std = torch.tensor(spec.normalise.std).reshape(3, 1, 1)
    assert ((actual - expected) * std).abs().mean().item() * 255 < MAX_MEAN_DIFFERENCE / 4
    assert expected.mean().abs() < 1.5  # ImageNet's statistics, about which photographs scatter


@pytest.mark.parametrize("name", BACKENDS)
def test_views_of_different_sizes_are_those_that_each_size_alone_gives(name: str) -> None:
    case = CASES["photographs"]
    recipes = (
        ViewRecipe(),
        ViewRecipe(size=40, blur=0),
        ViewRecipe(size=33, blur=0),
        ALL_OPERATIONS_RECIPE,
    )
    draws = [recipe_draws(case.samples, recipe, view) for view, recipe in enumerate(recipes)]
    views = levels(name, recipes, 48)(case.samples, draws)
    assert [view.shape[1:] for view in views] == [(3, s, s) for s in (48, 40, 33, 48)]
    for recipe, draw, view in zip(recipes, draws, views, strict=True):
        alone = levels(name, (recipe.model_copy(update={"size": None}),), view.shape[-1])
        assert torch.equal(alone(case.samples, [draw])[0], view)


def test_frames_are_the_centre_of_the_resized_image_in_both_backends() -> None:
    samples = encoded_samples(photographs(), "JPEG")
    boxes = centre_crop_boxes(samples, 64)
    expected = []
    for row, data in enumerate(samples.data):
        image = Image.open(io.BytesIO(data.tobytes())).convert("RGB")
        scale = 73 / min(image.size)  # 64 * 256 / 224, rounded
        size = tuple(73 if side == min(image.size) else int(side * scale) for side in image.size)
        left, top = (round((side - 64) / 2) for side in size)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        expected.append(np.array(resized.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1))
        assert boxes[row, 0] + boxes[row, 2] <= samples.height[row]
    for name in BACKENDS:
        actual = levels(name, (), 64).frame(samples, boxes)
        assert np.abs(actual.numpy() - np.stack(expected)).mean() < MAX_MEAN_DIFFERENCE / 4


def test_frames_of_images_that_fit_are_untouched() -> None:
    expected = np.stack([np.asarray(image).transpose(2, 0, 1) for image in photograph_patches()])
    for name in BACKENDS:
        actual = levels(name, (), 32).frame(PATCHES.samples, centre_crop_boxes(PATCHES.samples, 32))
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("name", BACKENDS)
def test_pixels_do_not_depend_on_the_batch_or_on_threads(name: str, case: ImageSet) -> None:
    samples, side = case.samples, min(case.side, 96)
    draws = recipe_draws(samples, ALL_OPERATIONS_RECIPE)
    whole = levels(name, (ALL_OPERATIONS_RECIPE,), side)(samples, [draws])[0]
    backend = levels(name, (ALL_OPERATIONS_RECIPE,), side, threads=3)
    order = np.random.default_rng(0).permutation(len(samples.data))
    for rows in (order[:1], order[1:8], order[8:], order[[3, 3, 3]]):
        view = backend(rows_of(samples, rows), [draws.take(rows)])[0]
        assert torch.equal(view, whole[torch.from_numpy(rows)])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_undecodable_are_named_and_the_backend_goes_on(name: str) -> None:
    samples = encoded_samples(photographs()[:8], "JPEG")
    recipe = ViewRecipe()
    backend, draws = levels(name, (recipe,), 48), recipe_draws(samples, recipe)
    good = backend(samples, [draws])[0]
    intact = list(samples.data)
    samples.data[2] = np.frombuffer(b"<html>no image</html>", np.uint8)
    samples.data[5] = np.zeros(0, np.uint8)
    with pytest.raises(UndecodableError) as caught:
        backend(samples, [draws])
    assert sorted(caught.value.reasons) == [2, 5]
    assert all(caught.value.reasons.values())
    assert "\n" not in "".join(caught.value.reasons.values())
    samples.data[:] = intact
    assert torch.equal(backend(samples, [draws])[0], good)


def test_an_exif_orientation_is_ignored_by_both() -> None:
    samples = encoded_samples(photographs()[:4], "JPEG")
    plain = [levels(n, (), 48).frame(samples, centre_crop_boxes(samples, 48)) for n in BACKENDS]
    for row in range(4):
        image = Image.open(io.BytesIO(samples.data[row].tobytes()))
        exif, stream = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        image.save(stream, "JPEG", quality="keep", exif=exif)
        samples.data[row] = np.frombuffer(stream.getvalue(), np.uint8)
    for name, expected in zip(BACKENDS, plain, strict=True):
        actual = levels(name, (), 48).frame(samples, centre_crop_boxes(samples, 48))
        assert (actual - expected).abs().mean() < MAX_MEAN_DIFFERENCE / 4


def test_the_certificate_in_the_docs_is_of_today(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "parity.md").read_text()
    cells = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert cells == ["operation", "---", *OPERATION_DRAWS, "recipe", "---", *RECIPES]
    assert "**" not in text.partition("## ")[2]  # nothing beyond what is promised
    assert main(["--images", str(tmp_path / "absent")]) == 2
    assert "no JPEG or PNG" in capsys.readouterr().err


def test_the_command_in_the_docs_can_be_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (Path(__file__).parents[3] / "docs" / "parity.md").read_text()
    monkeypatch.setenv("VSSL_TEST_DATA", str(tmp_path))
    assert f"--images {portable_folder(tmp_path / 'imagenet-native')}`" in text
    assert portable_folder(tmp_path / "a" / "b") == '"$VSSL_TEST_DATA"/a/b'
    assert portable_folder(Path("photographs")) == "photographs"


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["simclr", "byol_2", "dino_local"])
def test_the_graph_on_a_gpu_agrees_with_the_reference(recipe: str, case: ImageSet) -> None:
    mean, _ = backend_difference(
        case, RECIPES[recipe], recipe_draws(case.samples, RECIPES[recipe]), "cuda"
    )
    assert mean < MAX_MEAN_DIFFERENCE


@pytest.mark.gpu
def test_on_a_gpu_pixels_do_not_depend_on_the_place_in_the_batch() -> None:
    samples = rows_of(CASES["photographs"].samples, np.zeros(64, np.int64))
    draws = recipe_draws(samples, ALL_OPERATIONS_RECIPE).take(np.zeros(64, np.int64))
    backend = build_backend(
        "dali", BackendSpec((ALL_OPERATIONS_RECIPE,), 96, LEVEL_NORMALISATION, 2, "cuda")
    )
    view = backend(samples, [draws])[0]
    assert view.device == DevicePlacement("cuda").device
    assert (view == view[:1]).all()
