"""DALI and the reference make the same views of the same draws."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.support.photos import crop
from vssl_dist.config import RECIPES, Normalisation, ViewRecipe
from vssl_dist.data.backend import (
    Backend,
    BackendSpec,
    Placement,
    UndecodableError,
    build_backend,
)
from vssl_dist.data.evaluation import centre_boxes
from vssl_dist.data.shards import Samples
from vssl_dist.data.views import Draws, draw

COUNT = 24
TOLERANCE = 2.0  # mean absolute difference, of 255
LEVELS = Normalisation(mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
# Everything can be drawn, so every operation is in DALI's graph even where a draw is identity.
EVERYTHING = ViewRecipe(jitter=1, grayscale=0.5, blur=0.5, solarize=0.5)


def encoded(suffix: str, sides: tuple[int, int], count: int = COUNT) -> Samples:
    data, sizes = [], []
    for number in range(count):
        pixels = crop(number, 16, sides)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, suffix, quality=95)
        data.append(np.frombuffer(stream.getvalue(), np.uint8))
        sizes.append(pixels.shape[:2])
    height, width = np.array(sizes, np.int64).T
    return Samples(data, height, width, np.zeros(count, np.int64), [])


# The size of CIFAR, and photographs larger and smaller than the view.
KINDS = {"32": ("PNG", (32, 32), 32), "96": ("JPEG", (60, 150), 96)}


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> tuple[Samples, int]:
    suffix, sides, image_size = KINDS[request.param]
    return encoded(suffix, sides), image_size


def identity(samples: Samples) -> Draws:
    """The whole image, and nothing else."""
    count, zero = len(samples.data), np.zeros(len(samples.data), np.float32)
    boxes = np.stack([0 * samples.height, 0 * samples.width, samples.height, samples.width], 1)
    off, one = np.zeros(count, np.bool_), np.ones(count, np.float32)
    return Draws(boxes.astype(np.int32), off, one, one, one, zero, off, zero, off)


def levels(name: str, recipes: tuple[ViewRecipe, ...], side: int, threads: int = 1) -> Backend:
    return build_backend(name, BackendSpec(recipes, side, LEVELS, threads))


def difference(samples: Samples, draws: Draws, side: int, recipe: ViewRecipe = EVERYTHING) -> float:
    got, want = (
        levels(name, (recipe,), side)(samples, [draws])[0] for name in ("dali", "reference")
    )
    assert got.shape == want.shape == (len(samples.data), 3, side, side)
    assert got.dtype == want.dtype == torch.float32
    return (got - want).abs().mean().item()


def spread(low: float, high: float) -> NDArray[np.float32]:
    return np.linspace(low, high, COUNT, dtype=np.float32)


ON = np.ones(COUNT, np.bool_)
OPERATIONS: dict[str, Callable[[Draws], Draws]] = {
    "resize": lambda d: d,
    "flip": lambda d: replace(d, flip=ON),
    "brightness": lambda d: replace(d, brightness=spread(0.6, 1.4)),
    "contrast": lambda d: replace(d, contrast=spread(0.6, 1.4)),
    "saturation": lambda d: replace(d, saturation=spread(0.6, 1.4)),
    "hue": lambda d: replace(d, hue=spread(-0.5, 0.5)),
    "grayscale": lambda d: replace(d, grayscale=ON),
    "blur": lambda d: replace(d, blur_sigma=spread(0.1, 2.0)),
    "solarize": lambda d: replace(d, solarize=ON),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_agrees(operation: str, kind: tuple[Samples, int]) -> None:
    samples, side = kind
    assert difference(samples, OPERATIONS[operation](identity(samples)), side) < TOLERANCE


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_does_something(operation: str, kind: tuple[Samples, int]) -> None:
    samples, side = kind
    plain = identity(samples)
    backend = levels("dali", (EVERYTHING, EVERYTHING), side)
    before, after = backend(samples, [plain, OPERATIONS[operation](plain)])
    changed = (before - after).abs().mean().item()
    assert changed < 0.1 if operation == "resize" else changed > TOLERANCE


def drawn(samples: Samples, recipe: ViewRecipe, view: int = 0) -> Draws:
    ids = np.arange(len(samples.data), dtype=np.int64)
    return draw(recipe, 7, view, ids, 0 * ids, np.stack([samples.height, samples.width], 1))


@pytest.mark.parametrize("name", RECIPES)
def test_whole_recipes_agree(name: str, kind: tuple[Samples, int]) -> None:
    samples, side = kind
    recipe = RECIPES[name]
    assert difference(samples, drawn(samples, recipe), side, recipe) < TOLERANCE


def test_random_crops_agree(kind: tuple[Samples, int]) -> None:
    samples, side = kind
    recipe = ViewRecipe(jitter=0, grayscale=0, blur=0)
    assert difference(samples, drawn(samples, recipe), side, recipe) < TOLERANCE / 4


def test_normalisation_agrees(kind: tuple[Samples, int]) -> None:
    samples, side = kind
    spec = BackendSpec((EVERYTHING,), side, Normalisation())
    got, want = (
        build_backend(name, spec)(samples, [identity(samples)])[0] for name in ("dali", "reference")
    )
    std = torch.tensor(spec.normalise.std).reshape(3, 1, 1)
    assert ((got - want) * std).abs().mean().item() * 255 < TOLERANCE / 4
    assert want.mean().abs() < 1.5  # ImageNet's statistics, about which photographs scatter


def test_frames_are_the_centre_of_the_resized_image_in_both_backends() -> None:
    samples = encoded("JPEG", (90, 150))
    boxes = centre_boxes(samples, 64)
    want = []
    for row, data in enumerate(samples.data):
        image = Image.open(io.BytesIO(data.tobytes()))
        scale = 73 / min(image.size)  # 64 * 256 / 224, rounded
        size = tuple(73 if side == min(image.size) else int(side * scale) for side in image.size)
        left, top = (round((side - 64) / 2) for side in size)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        want.append(np.array(resized.crop((left, top, left + 64, top + 64))).transpose(2, 0, 1))
        assert boxes[row, 0] + boxes[row, 2] <= samples.height[row]
    for name in ("dali", "reference"):
        got = levels(name, (), 64).frame(samples, boxes)
        assert np.abs(got.numpy() - np.stack(want)).mean() < TOLERANCE / 4


def test_frames_of_images_that_fit_are_untouched() -> None:
    samples = encoded("PNG", (32, 32))
    want = np.stack([crop(number, 16).transpose(2, 0, 1) for number in range(COUNT)])
    for name in ("dali", "reference"):
        got = levels(name, (), 32).frame(samples, centre_boxes(samples, 32))
        np.testing.assert_allclose(got.numpy(), want, atol=1e-3)


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_pixels_do_not_depend_on_the_batch_or_on_threads(
    name: str, kind: tuple[Samples, int]
) -> None:
    samples, side = kind
    draws = drawn(samples, EVERYTHING)
    whole = levels(name, (EVERYTHING,), side)(samples, [draws])[0]
    backend = levels(name, (EVERYTHING,), side, threads=3)
    order = np.random.default_rng(0).permutation(COUNT)
    for rows in (order[:1], order[1:8], order[8:]):
        some = Samples(
            [samples.data[row] for row in rows],
            samples.height[rows],
            samples.width[rows],
            samples.label[rows],
            [],
        )
        assert torch.equal(backend(some, [draws.take(rows)])[0], whole[torch.from_numpy(rows)])


@pytest.mark.parametrize("name", ["dali", "reference"])
def test_the_undecodable_are_named_and_the_backend_goes_on(name: str) -> None:
    samples = encoded("JPEG", (60, 90), count=8)
    recipe = ViewRecipe()
    backend, draws = levels(name, (recipe,), 48), drawn(samples, recipe)
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
    samples = encoded("JPEG", (60, 90), count=4)
    plain = [
        levels(n, (), 48).frame(samples, centre_boxes(samples, 48)) for n in ("dali", "reference")
    ]
    for row in range(4):
        image = Image.open(io.BytesIO(samples.data[row].tobytes()))
        exif, stream = Image.Exif(), io.BytesIO()
        exif[0x0112] = 6
        image.save(stream, "JPEG", quality="keep", exif=exif)
        samples.data[row] = np.frombuffer(stream.getvalue(), np.uint8)
    for name, want in zip(("dali", "reference"), plain, strict=True):
        got = levels(name, (), 48).frame(samples, centre_boxes(samples, 48))
        assert (got - want).abs().mean() < TOLERANCE / 4


@pytest.mark.gpu
def test_the_graph_on_a_gpu_agrees_with_the_graph_on_the_cpu(kind: tuple[Samples, int]) -> None:
    samples, side = kind
    recipe = EVERYTHING
    draws = drawn(samples, recipe)
    cpu = levels("dali", (recipe,), side)(samples, [draws])[0]
    gpu = build_backend("dali", BackendSpec((recipe,), side, LEVELS, 2, "cuda"))(samples, [draws])[
        0
    ]
    assert gpu.device == Placement("cuda").device
    assert (gpu.cpu() - cpu).abs().mean() < TOLERANCE
