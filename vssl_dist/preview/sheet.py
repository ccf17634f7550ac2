"""Writes a sheet of what training sees: some images, and beside each of them its views."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vssl_dist.config import RECIPES, Normalisation, RunConfig, ViewRecipe
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.backends.reference import decode
from vssl_dist.data.plan import sample_order_of_run
from vssl_dist.data.render import RenderedViews, ViewRenderer
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.data.store.manifest import Manifest
from vssl_dist.data.store.opening import open_watched, run_with_timeout
from vssl_dist.data.views import Draws
from vssl_dist.durable import write_inside_folder
from vssl_dist.preview.page import Tile, draw_page


def write_augmentation_sheet(
    cfg: RunConfig, path: Path, rows: int = 8, *, who: str, manifest: Manifest | None = None
) -> Path:
    """Write a PNG of the first images of a run, originals at the left, then view by view.

    The views are those of the first micro-step, made on the CPU by the run's own backend.  Each
    has its parameters below it, and the colour of its frame is that of its crop in the original.

    Args:
        cfg: The run.
        path: Where to write.
        rows: Number of images; fewer if a micro-step is smaller.
        who: Who makes the sheet, for the message if storage does not answer.
        manifest: That of the training set if it is known already: files are then not looked at
            that the first images do not lie in.

    Returns:
        ``path``.

    Raises:
        DataError: The dataset cannot be read, or storage does not answer.
        ConfigError: The numbers do not divide, or the backend is not installed.
    """
    data = cfg.data
    dataset = open_watched(data.train, timeout_s=data.timeout_s, who=who, manifest=manifest)
    backend = build_backend(data.backend, BackendSpec(data.views, data.image_size, data.normalise))
    renderer = ViewRenderer(dataset, backend, data.views, cfg.seed)
    rendered_views = run_with_timeout(
        dataset.watch,
        partial(_render_first_rows, cfg, renderer, rows),
        timeout_s=data.timeout_s,
        who=who,
    )
    headings = [("original", "with its crops")]
    headings += [
        (f"view {number + 1}", f"{_recipe_name(recipe)}, {recipe.size or data.image_size} px")
        for number, recipe in enumerate(data.views)
    ]
    tiles = _make_tile_rows(rendered_views, dataset, data.normalise)
    subtitle = f"{data.train}, seed {cfg.seed}, first micro-step, backend {data.backend}"
    stream = io.BytesIO()
    draw_page((cfg.name, subtitle), headings, tiles).save(stream, format="PNG")
    write_inside_folder(path, stream.getvalue())
    return path


def _render_first_rows(cfg: RunConfig, renderer: ViewRenderer, rows: int) -> RenderedViews:
    """Render the first rows of the micro-step that the run begins with."""
    sample_order = sample_order_of_run(cfg, renderer.dataset.shard_sizes)
    ids, epochs = sample_order.micro_batch_ids(0, rank=0, world_size=1)
    return renderer.render_augmented(ids[:rows], [epochs[:rows]])


def _to_uint8_levels(view: NDArray[np.float32], normalise: Normalisation) -> NDArray[np.uint8]:
    """Turn ``(B, 3, S, S)`` normalised values into ``(B, S, S, 3)`` levels from 0 to 255."""
    float_levels = 255 * (
        view.transpose(0, 2, 3, 1) * np.array(normalise.std) + np.array(normalise.mean)
    )
    uint8_levels: NDArray[np.uint8] = np.clip(np.rint(float_levels), 0, 255).astype(np.uint8)
    return uint8_levels


def _make_tile_rows(
    rendered_views: RenderedViews, dataset: Dataset, normalise: Normalisation
) -> list[list[Tile]]:
    """Return one row per image: the original with all crops, then each view with its parameters."""
    views = [_to_uint8_levels(view.numpy(), normalise) for view in rendered_views.views]
    tile_rows = []
    for row, sample_id in enumerate(rendered_views.ids.tolist()):
        draws_of_views = [draws.take(row) for draws in rendered_views.draws]
        image = decode(rendered_views.samples.data[row])
        label = int(rendered_views.samples.label[row])
        is_labelled = 0 <= label < len(dataset.classes)
        class_name = dataset.classes[label] if is_labelled else "unlabelled"
        caption = [class_name, f"id {sample_id}, {image.width} x {image.height}"]
        tiles_of_image = [
            Tile(image, caption, None, [_crop_box_edges(draws) for draws in draws_of_views])
        ]
        for number, (view, draws) in enumerate(zip(views, draws_of_views, strict=True)):
            tiles_of_image.append(
                Tile(Image.fromarray(view[row]), describe_draws(draws), number, [])
            )
        tile_rows.append(tiles_of_image)
    return tile_rows


def _crop_box_edges(draws: Draws) -> tuple[int, int, int, int]:
    top, left, height, width = draws.crop.tolist()
    return left, top, left + width, top + height


def describe_draws(draws: Draws) -> list[str]:
    """Describe in words what was drawn for one view.

    Args:
        draws: The draws of one sample: scalars, and a crop of four numbers.

    Returns:
        Four lines: geometry, light, colour, and what came after the jitter.
    """
    top, left, height, width = draws.crop.tolist()
    geometry_text = f"{width} x {height} at {left}, {top}" + (", flipped" if draws.flip else "")
    light_text = f"brightness {draws.brightness:.2f}, contrast {draws.contrast:.2f}"
    colour = f"saturation {draws.saturation:.2f}, hue {round(360 * float(draws.hue)):+d}°"
    if draws.brightness == draws.contrast == draws.saturation == 1 and draws.hue == 0:
        light_text, colour = "no colour jitter", ""
    effect_words = []
    if draws.grayscale:
        effect_words.append("grey")
    if draws.blur_sigma > 0:
        effect_words.append(f"blur {draws.blur_sigma:.1f} px")
    if draws.solarize:
        effect_words.append("solarised")
    return [line for line in (geometry_text, light_text, colour, ", ".join(effect_words)) if line]


def _recipe_name(recipe: ViewRecipe) -> str:
    recipe_names = [name for name, shipped_recipe in RECIPES.items() if shipped_recipe == recipe]
    return recipe_names[0] if recipe_names else "own recipe"
