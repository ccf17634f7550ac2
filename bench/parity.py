"""How far DALI's views are from the reference's, from the same drawn parameters.

    python -m bench.parity --out docs/parity.md
    python -m bench.parity --images FOLDER --device cuda

Differences are of levels from 0 to 255 before the normalisation: the mean over all pixels of
a set, and the greatest of any pixel.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if __name__ == "__main__":  # before what a bare Python cannot import
    from vssl_dist.installed import require_packages

    require_packages()

import numpy as np
import torch
from numpy.typing import NDArray

from bench.parity_cases import (
    ALL_OPERATIONS_RECIPE,
    LEVEL_NORMALISATION,
    OPERATION_DRAWS,
    ImageSet,
    folder_image_set,
    identity_draws,
    recipe_draws,
    standard_image_sets,
)
from vssl_dist.config import RECIPES, ViewRecipe
from vssl_dist.config.paths import path_argument
from vssl_dist.data.backends.base import BackendSpec
from vssl_dist.data.backends.build import build_backend
from vssl_dist.data.views import Draws, blur_window
from vssl_dist.durable import write_durably
from vssl_dist.errors import ConfigError
from vssl_dist.text import say

MAX_MEAN_DIFFERENCE = 2.0
"""The mean difference that no operation and no recipe may exceed."""
_PAGE_HEAD = """# DALI against the reference

Both backends make views from the same drawn parameters (`vssl_dist/data/views.py`); the
reference is PIL and torchvision's v2 functions. A cell is the mean difference over all pixels of
the views and the greatest one of any pixel, on the scale 0 to 255. The tests allow a mean
of {promised:g}.

Made by `{command}`, DALI on {device},
with {versions}.

{sets}

{note}
"""
_REMAINING_DIFFERENCE_NOTE = """\
What remains is rounding, and the border: where an outermost pixel of a view mixes in what lies
beyond the crop, DALI repeats the border and PIL leaves it out. DALI rounds the grey image where
torchvision truncates it, and here the hue turns by whole levels. A sequence of operations can
carry such a level further: contrast and saturation up to 1.8 nearly double it, and hue, on a
pixel that is nearly grey, may pass it on to another channel."""


def backend_difference(
    case: ImageSet, recipe: ViewRecipe, draws: Draws, device: str = "cpu"
) -> tuple[float, float]:
    """Mean and greatest difference between the two backends' views.

    Args:
        case: B images.
        recipe: What the graph is built for.
        draws: B draws of it.
        device: Where DALI works; the reference is always on the CPU.

    Raises:
        ConfigError: DALI is not installed, or the views are too small for the blur.
    """
    dali_views, reference_views = (
        build_backend(
            name, BackendSpec((recipe,), case.side, LEVEL_NORMALISATION, 2, backend_device)
        )(case.samples, [draws])[0].cpu()
        for name, backend_device in (("dali", device), ("reference", "cpu"))
    )
    difference = (dali_views - reference_views).abs()
    return difference.mean().item(), difference.max().item()


def operation_rows(cases: Sequence[ImageSet], device: str) -> list[list[str]]:
    """One row per operation: its name, and a cell per case."""
    return [
        [
            name,
            *(
                _difference_cell(
                    backend_difference(
                        c, ALL_OPERATIONS_RECIPE, make(identity_draws(c.samples)), device
                    )
                )
                for c in cases
            ),
        ]
        for name, make in OPERATION_DRAWS.items()
    ]


def recipe_rows(cases: Sequence[ImageSet], device: str) -> list[list[str]]:
    """One row per shipped recipe; a cell is empty where its blur does not fit the views."""
    rows = []
    for name, recipe in RECIPES.items():
        row = [name]
        for case in cases:
            blur_radius = int(blur_window(recipe.blur_sigma[1])) // 2 if recipe.blur else 0
            blur_fits = blur_radius < (recipe.size or case.side)
            draws = recipe_draws(case.samples, recipe)
            row.append(
                _difference_cell(backend_difference(case, recipe, draws, device))
                if blur_fits
                else ""
            )
        rows.append(row)
    return rows


def _difference_cell(difference: tuple[float, float]) -> str:
    mean, greatest = difference
    bold = "**" * (mean > MAX_MEAN_DIFFERENCE)
    return f"{bold}{mean:.3f} / {greatest:.0f}{bold}"


def markdown_page(cases: Sequence[ImageSet], device: str, command: str) -> str:
    """The whole certificate as Markdown."""
    names = [case.name for case in cases]
    sets = [
        f"* **{case.name}**: {len(case.samples.data)} images of "
        f"{_length_range(case.samples.height)} by "
        f"{_length_range(case.samples.width)} pixels, views of {case.side} (or the recipe's own "
        "size)."
        for case in cases
    ]
    head = _PAGE_HEAD.format(
        promised=MAX_MEAN_DIFFERENCE,
        command=command,
        device=torch.cuda.get_device_name() if device == "cuda" else "the CPU",
        versions=", ".join(
            f"{name} {_version(name)}"
            for name in ("nvidia-dali-cuda130", "torchvision", "pillow", "torch")
        ),
        sets="\n".join(sets),
        note=_REMAINING_DIFFERENCE_NOTE,
    )
    tables = [
        "## Operations, each alone over its range\n\n"
        + _table(["operation", *names], operation_rows(cases, device)),
        "## Recipes, as drawn\n\n" + _table(["recipe", *names], recipe_rows(cases, device)),
    ]
    return "\n".join([head, *tables])


def portable_folder(images: Path) -> str:
    """The folder as any reader can type it, where it is one of the test data."""
    data = os.environ.get("VSSL_TEST_DATA")
    if data and images.resolve().is_relative_to(Path(data).resolve()):
        return f'"$VSSL_TEST_DATA"/{images.resolve().relative_to(Path(data).resolve())}'
    return str(images)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _length_range(lengths: NDArray[np.int64]) -> str:
    low, high = lengths.min(), lengths.max()
    return f"{low}" if low == high else f"{low} to {high}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("--:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 (nothing could be compared)."""
    top = argparse.ArgumentParser(
        prog="parity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument(
        "--out", type=path_argument, help="write the tables here instead of printing them"
    )
    top.add_argument(
        "--images", type=path_argument, help="a folder of images to compare on as well"
    )
    top.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where DALI works")
    args = top.parse_args(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: there is no CUDA device")
        cases = standard_image_sets() + ([folder_image_set(args.images)] if args.images else [])
        words = ["python -m bench.parity"]
        words += [f"--images {portable_folder(args.images)}"] if args.images else []
        words += ["--device cuda"] if args.device == "cuda" else []
        text = markdown_page(cases, args.device, " ".join(words))
        if args.out is None:
            say(*text.splitlines())
        else:
            write_durably(args.out, text.encode())
    except (ConfigError, OSError) as error:
        say(f"error: {error}", to_stderr=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
