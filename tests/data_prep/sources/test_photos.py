"""The photograph patches: no pixel and no image in both splits, and what they cost."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import shard
from data_prep.sources.photos import PATCH_SIDE, PHOTOGRAPH_NAMES, choose_patch_corners
from tests.support.photos import picture
from vssl_dist.data.store.dataset import Dataset


def test_no_pixel_is_in_a_training_and_a_validation_patch() -> None:
    for number, file in enumerate(PHOTOGRAPH_NAMES):
        full_photograph = picture(file)
        covered_pixels = {}
        for split in ("train", "val"):
            covered_pixels[split] = np.zeros(full_photograph.shape[:2], bool)
            corners = choose_patch_corners(number, full_photograph, split)
            assert len({tuple(corner) for corner in corners.tolist()}) == len(corners)
            for _, y, x in corners.tolist():
                patch = covered_pixels[split][y : y + PATCH_SIDE, x : x + PATCH_SIDE]
                assert patch.shape == (PATCH_SIDE, PATCH_SIDE)
                patch[:] = True
        assert covered_pixels["train"].any()
        assert covered_pixels["val"].any()
        assert not (covered_pixels["train"] & covered_pixels["val"]).any()


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    assert shard.main(["photos", "--out", str(folder)]) == 0
    return folder


def load(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    dataset = Dataset.open(folder)
    samples = dataset.read_checked(np.arange(dataset.samples))
    images = [np.asarray(Image.open(io.BytesIO(image.tobytes()))) for image in samples.data]
    return np.stack(images), samples.label


def test_the_default_is_16_photographs_of_400_and_100_distinct_patches(out: Path) -> None:
    (train, label), (val, val_label) = load(out / "train"), load(out / "val")
    assert train.shape == (6400, 32, 32, 3)
    assert val.shape == (1600, 32, 32, 3)
    assert np.bincount(label).tolist() == [400] * 16
    assert np.bincount(val_label).tolist() == [100] * 16
    assert len({image.tobytes() for image in (*train, *val)}) == 8000


def test_a_patch_is_a_part_of_the_photograph_of_its_class(out: Path) -> None:
    images, label = load(out / "val")
    for image, name in list(zip(images, (PHOTOGRAPH_NAMES[n] for n in label), strict=True))[:50]:
        full_photograph = picture(name)
        windows = np.lib.stride_tricks.sliding_window_view(
            full_photograph, (PATCH_SIDE, PATCH_SIDE), axis=(0, 1)
        )
        matches = np.argwhere((windows[..., 0, 0] == image[0, 0]).all(-1))
        assert any(
            (full_photograph[y : y + PATCH_SIDE, x : x + PATCH_SIDE] == image).all()
            for y, x in matches
        )


def test_photos_refuses_a_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shard.main(["photos", "--root", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert "photos has no --root" in capsys.readouterr().err
