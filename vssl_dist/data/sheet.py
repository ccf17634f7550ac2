"""A picture of what training sees: some images, and beside each of them its views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vssl_dist.config import Normalisation, RunConfig
from vssl_dist.data.backend import BackendSpec, build_backend
from vssl_dist.data.plan import Plan
from vssl_dist.data.reference import decode
from vssl_dist.data.shards import Dataset, Samples
from vssl_dist.data.substitution import read_decodable
from vssl_dist.data.views import draw

_TILE, _GAP, _HEAD = 160, 8, 20


def augmentation_sheet(cfg: RunConfig, path: Path, rows: int = 8) -> Path:
    """Write a PNG of the first images of a run, originals at the left, then view by view.

    The views are those of the first micro-step, made on the CPU by the run's own backend.

    Args:
        cfg: The run.
        path: Where to write.
        rows: Number of images; fewer if a micro-step is smaller.

    Returns:
        ``path``.

    Raises:
        DataError: The dataset cannot be read.
        ConfigError: The numbers do not divide, or the backend is not installed.
    """
    data, optim = cfg.data, cfg.optim
    dataset = Dataset.open(data.train)
    plan = Plan(
        dataset.shard_sizes,
        cfg.seed,
        data.streams,
        data.window,
        optim.global_batch,
        optim.accumulate,
    )
    ids, epochs = (column[:rows] for column in plan.micro_batch_ids(0, 0, 1))
    backend = build_backend(data.backend, BackendSpec(data.views, data.image_size, data.normalise))

    def render(samples: Samples) -> list[NDArray[np.uint8]]:
        sizes = np.stack([samples.height, samples.width], axis=1)
        draws = [draw(r, cfg.seed, v, ids, epochs, sizes) for v, r in enumerate(data.views)]
        return [_pixels(view.numpy(), data.normalise) for view in backend(samples, draws)]

    samples, views = read_decodable(dataset, ids, render)
    columns = [[decode(image) for image in samples.data]]
    columns += [[Image.fromarray(image) for image in view] for view in views]
    titles = ["original", *(f"view {number + 1}" for number in range(len(views)))]
    labels = [dataset.classes[label] for label in samples.label]
    path.parent.mkdir(parents=True, exist_ok=True)
    _compose(columns, titles, labels).save(path, format="PNG")
    return path


def _pixels(view: NDArray[np.float32], normalise: Normalisation) -> NDArray[np.uint8]:
    """``(B, 3, S, S)`` normalised to ``(B, S, S, 3)`` levels."""
    levels = 255 * (view.transpose(0, 2, 3, 1) * np.array(normalise.std) + np.array(normalise.mean))
    rounded: NDArray[np.uint8] = np.clip(np.rint(levels), 0, 255).astype(np.uint8)
    return rounded


def _compose(columns: list[list[Image.Image]], titles: list[str], labels: list[str]) -> Image.Image:
    pitch = _TILE + _GAP
    size = (_GAP + pitch * len(columns), _HEAD + pitch * len(labels))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for x, (title, column) in enumerate(zip(titles, columns, strict=True)):
        left = _GAP + pitch * x
        pen.text((left, 4), title, fill="black")
        for y, image in enumerate(column):
            sheet.paste(_tile(image), (left, _HEAD + pitch * y))
    for y, label in enumerate(labels):
        corner = (_GAP, _HEAD + pitch * y)
        pen.rectangle(pen.textbbox(corner, label), fill="white")
        pen.text(corner, label, fill="black")
    return sheet


def _tile(image: Image.Image) -> Image.Image:
    """The image in a square tile; small ones enlarged by whole factors, pixels left visible."""
    longest = max(image.size)
    if longest <= _TILE:
        factor = _TILE // longest
        size, how = (image.width * factor, image.height * factor), Image.Resampling.NEAREST
    else:
        scale = _TILE / longest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        how = Image.Resampling.LANCZOS
    tile = Image.new("RGB", (_TILE, _TILE), "lightgrey")
    tile.paste(image.resize(size, how), ((_TILE - size[0]) // 2, (_TILE - size[1]) // 2))
    return tile
