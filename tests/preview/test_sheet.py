"""The sheet shows what training sees: the same crops, the same pixels, the same parameters."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.support.photos import crop, tiny_dataset
from vssl_dist.config import (
    DataConfig,
    MethodConfig,
    Normalisation,
    OptimConfig,
    RunConfig,
    ViewRecipe,
)
from vssl_dist.data.loader import Loader, build_loader
from vssl_dist.data.views import Draws
from vssl_dist.errors import DataError
from vssl_dist.preview.page import (
    HEADINGS_HEIGHT,
    PAGE_MARGIN,
    TILE_GAP,
    TILE_SIDE,
    TITLE_HEIGHT,
    Tile,
    draw_page,
    fit_to_tile,
    tile_corner,
)
from vssl_dist.preview.sheet import describe_draws, write_augmentation_sheet

PLAIN = Normalisation(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


class ThreeViews(MethodConfig):
    views_wanted: ClassVar[int] = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"), samples=24, shard_size=12)


def config(folder: Path, backend: str) -> RunConfig:
    data = DataConfig(
        train=folder,
        backend=backend,
        image_size=32,
        views=(ViewRecipe(), ViewRecipe(blur=0.1, solarize=1), ViewRecipe(size=16, blur=0)),
        normalise=PLAIN,
        streams=4,
        threads=1,
    )
    optim = OptimConfig(base_lr=0.1, global_batch=8)
    return RunConfig(name="seen", seed=5, method=ThreeViews(name="three"), data=data, optim=optim)


def tile(sheet: NDArray[np.uint8], x: int, y: int, pitch: int) -> NDArray[np.uint8]:
    left, top = tile_corner(x, y, pitch)
    return sheet[top : top + TILE_SIDE, left : left + TILE_SIDE]


@pytest.mark.parametrize("backend", ["dali", "reference"])
def test_a_sheet_shows_originals_beside_the_views_of_the_loader(
    folder: Path, tmp_path: Path, backend: str
) -> None:
    cfg = config(folder, backend)
    path = write_augmentation_sheet(cfg, tmp_path / "new" / "sheet.png", rows=3, who="test")
    sheet = np.array(Image.open(path))
    pitch = (sheet.shape[0] - PAGE_MARGIN - TITLE_HEIGHT - HEADINGS_HEIGHT) // 3
    assert sheet.shape[1] == 2 * PAGE_MARGIN + 4 * TILE_SIDE + 3 * TILE_GAP

    source: Loader = build_loader(cfg, rank=0, world_size=1, device="cpu")
    batch = next(iter(source))
    source.close()
    for row in range(3):
        original = tile(sheet, 0, row, pitch)[2::6, 2::6]  # every pixel is 6 x 6
        same = (original == crop(int(batch.ids[row]), 4)).all(axis=2)
        assert same.mean() > 0.5  # the lines of the crops are drawn over the rest
        for number, factor in enumerate((6, 6, 12)):
            pixels = tile(sheet, number + 1, row, pitch)[2::factor, 2::factor]
            levels = (255 * batch.views[number][row].permute(1, 2, 0)).round().numpy()
            assert np.array_equal(pixels, levels)


def test_a_sheet_of_no_dataset_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        write_augmentation_sheet(
            config(tmp_path / "nowhere", "reference"), tmp_path / "a" / "sheet.png", who="test"
        )
    assert list(tmp_path.iterdir()) == []


def draws(**changed: object) -> Draws:
    plain = {
        "crop": np.array([3, 4, 20, 30]),
        "flip": np.bool_(False),
        "brightness": np.float32(1),
        "contrast": np.float32(1),
        "saturation": np.float32(1),
        "hue": np.float32(0),
        "grayscale": np.bool_(False),
        "blur_sigma": np.float32(0),
        "solarize": np.bool_(False),
    }
    return Draws(**(plain | changed))  # type: ignore[arg-type]


def test_a_caption_says_what_was_drawn_and_nothing_else() -> None:
    assert describe_draws(draws()) == ["30 x 20 at 4, 3", "no colour jitter"]
    lines = describe_draws(
        draws(
            flip=np.bool_(True),
            brightness=np.float32(1.2),
            hue=np.float32(-0.1),
            grayscale=np.bool_(True),
            blur_sigma=np.float32(1.26),
            solarize=np.bool_(True),
        )
    )
    assert lines == [
        "30 x 20 at 4, 3, flipped",
        "brightness 1.20, contrast 1.00",
        "saturation 1.00, hue -36°",
        "grey, blur 1.3 px, solarised",
    ]


@pytest.mark.parametrize("size", [(1, 1), (500, 1), (1, 500), (32, 32), (193, 192), (96, 64)])
def test_every_picture_fits_its_tile_and_keeps_its_shape(size: tuple[int, int]) -> None:
    picture, scale = fit_to_tile(Image.new("RGB", size))
    assert max(picture.size) <= TILE_SIDE
    assert picture.size == tuple(max(1, round(scale * side)) for side in size)
    assert scale == int(scale) or max(size) > TILE_SIDE


def test_a_page_marks_crops_thinner_than_a_line_and_cuts_long_captions() -> None:
    wide = Tile(Image.new("RGB", (900, 3)), ["a" * 400, "é ü 漢"], None, [(10, 0, 11, 1)])
    sheet = draw_page(("t" * 400, ""), [("h" * 400, "")], [[wide]])
    assert sheet.width == 2 * PAGE_MARGIN + TILE_SIDE
    right = np.array(sheet)[:, PAGE_MARGIN + TILE_SIDE :]
    assert (right == 255).all()  # nothing reaches into the margin
