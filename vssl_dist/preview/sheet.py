"""A picture of what training sees: some images, and beside each of them its views."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vssl_dist.config import RECIPES, Normalisation, RunConfig, ViewRecipe
from vssl_dist.data.backends.base import Backend, BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.backends.reference import decode
from vssl_dist.data.damage.replace import read_decodable
from vssl_dist.data.plan import Plan
from vssl_dist.data.store.dataset import Dataset, Samples
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.data.views import Draws, draw
from vssl_dist.durable import publish_inside
from vssl_dist.preview.page import Tile, page


@dataclass(frozen=True)
class _Shown:
    """B images, what was drawn for them, and the views that came of it, as levels."""

    ids: NDArray[np.int64]
    samples: Samples
    draws: list[Draws]
    views: list[NDArray[np.uint8]]


def augmentation_sheet(cfg: RunConfig, path: Path, rows: int = 8, *, who: str) -> Path:
    """Write a PNG of the first images of a run, originals at the left, then view by view.

    The views are those of the first micro-step, made on the CPU by the run's own backend.  Each
    has its parameters below it, and the colour of its frame is that of its crop in the original.

    Args:
        cfg: The run.
        path: Where to write.
        rows: Number of images; fewer if a micro-step is smaller.
        who: Makes it; named if storage does not answer.

    Returns:
        ``path``.

    Raises:
        DataError: The dataset cannot be read, or storage does not answer.
        ConfigError: The numbers do not divide, or the backend is not installed.
    """
    data = cfg.data
    dataset = open_watched(data.train, timeout_s=data.timeout_s, who=who)
    backend = build_backend(data.backend, BackendSpec(data.views, data.image_size, data.normalise))
    work = partial(_render, cfg, dataset, backend, rows)
    shown = run_with_timeout(dataset.watch, work, timeout_s=data.timeout_s, who=who)
    heads = [("original", "with its crops")]
    heads += [
        (f"view {number + 1}", f"{_called(recipe)}, {recipe.size or data.image_size} px")
        for number, recipe in enumerate(data.views)
    ]
    tiles = [_row(shown, row, dataset.classes) for row in range(len(shown.ids))]
    facts = f"{data.train}, seed {cfg.seed}, first micro-step, backend {data.backend}"
    stream = io.BytesIO()
    page((cfg.name, facts), heads, tiles).save(stream, format="PNG")
    publish_inside(path, stream.getvalue())
    return path


def _render(cfg: RunConfig, dataset: Dataset, backend: Backend, rows: int) -> _Shown:
    data, optim = cfg.data, cfg.optim
    plan = Plan(
        dataset.shard_sizes,
        cfg.seed,
        data.streams,
        data.window,
        optim.global_batch,
        optim.accumulate,
    )
    ids, epochs = (column[:rows] for column in plan.micro_batch_ids(0, 0, 1))

    def render(samples: Samples) -> tuple[list[Draws], list[NDArray[np.uint8]]]:
        sizes = np.stack([samples.height, samples.width], axis=1)
        draws = [draw(r, cfg.seed, v, ids, epochs, sizes) for v, r in enumerate(data.views)]
        views = [_levels(view.numpy(), data.normalise) for view in backend(samples, draws)]
        return draws, views

    samples, (draws, views) = read_decodable(dataset, ids, render)
    return _Shown(ids, samples, draws, views)


def _levels(view: NDArray[np.float32], normalise: Normalisation) -> NDArray[np.uint8]:
    """``(B, 3, S, S)`` normalised to ``(B, S, S, 3)`` levels."""
    levels = 255 * (view.transpose(0, 2, 3, 1) * np.array(normalise.std) + np.array(normalise.mean))
    rounded: NDArray[np.uint8] = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return rounded


def _row(shown: _Shown, row: int, classes: tuple[str, ...]) -> list[Tile]:
    """The original with all crops, then each view with its parameters."""
    draws = [column.take(row) for column in shown.draws]
    image = decode(shown.samples.data[row])
    label = int(shown.samples.label[row])
    known = classes[label] if 0 <= label < len(classes) else "unlabelled"
    caption = [known, f"id {shown.ids[row]}, {image.width} x {image.height}"]
    tiles = [Tile(image, caption, None, [_box(drawn) for drawn in draws])]
    for number, drawn in enumerate(draws):
        view = Image.fromarray(shown.views[number][row])
        tiles.append(Tile(view, described(drawn), number, []))
    return tiles


def _box(drawn: Draws) -> tuple[int, int, int, int]:
    top, left, height, width = drawn.crop.tolist()
    return left, top, left + width, top + height


def described(drawn: Draws) -> list[str]:
    """What was drawn for one view, in words.

    Args:
        drawn: The draws of one sample: scalars, and a crop of four numbers.

    Returns:
        Four lines: geometry, light, colour, and what came after the jitter.
    """
    top, left, height, width = drawn.crop.tolist()
    geometry = f"{width} x {height} at {left}, {top}" + (", flipped" if drawn.flip else "")
    light = f"brightness {drawn.brightness:.2f}, contrast {drawn.contrast:.2f}"
    colour = f"saturation {drawn.saturation:.2f}, hue {round(360 * float(drawn.hue)):+d}°"
    if drawn.brightness == drawn.contrast == drawn.saturation == 1 and drawn.hue == 0:
        light, colour = "no colour jitter", ""
    rest = []
    if drawn.grayscale:
        rest.append("grey")
    if drawn.blur_sigma > 0:
        rest.append(f"blur {drawn.blur_sigma:.1f} px")
    if drawn.solarize:
        rest.append("solarised")
    return [line for line in (geometry, light, colour, ", ".join(rest)) if line]


def _called(recipe: ViewRecipe) -> str:
    names = [name for name, known in RECIPES.items() if known == recipe]
    return names[0] if names else "own recipe"
