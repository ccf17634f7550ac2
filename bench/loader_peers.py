"""What others use to feed two views of each image, on the same files and the same cores."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from nvidia.dali import fn, pipeline_def, types

from vssl_dist.config.recipes import RECIPES, Normalisation
from vssl_dist.data.store.dataset import Dataset
from vssl_dist.vision import torchvision

VIEW_SIDE, RECIPE_NAME = 224, "moco_v2"
Batches = Iterator[Any]


class PillowBlur:
    """Pillow's blur by a sigma that is drawn: boxes that come near a Gaussian, and much faster."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(
            ImageFilter.GaussianBlur(random.uniform(*RECIPES[RECIPE_NAME].blur_sigma))
        )


def torchvision_recipe(uses_pillow_blur: bool) -> Any:
    """The recipe as torchvision users write it, with its own blur or with Pillow's."""
    torchvision()
    from torchvision.transforms import v2

    recipe, norm = RECIPES[RECIPE_NAME], Normalisation()
    jitter = v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue)
    blur = PillowBlur() if uses_pillow_blur else v2.GaussianBlur(23, recipe.blur_sigma)
    return v2.Compose(
        [
            v2.RandomResizedCrop(VIEW_SIDE, recipe.crop_scale, recipe.crop_ratio),
            v2.RandomHorizontalFlip(recipe.flip),
            v2.RandomApply([jitter], recipe.jitter),
            v2.RandomGrayscale(recipe.grayscale),
            v2.RandomApply([blur], recipe.blur),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(norm.mean, norm.std),
        ]
    )


class TwoViews:
    """The recipe, twice; picklable for worker processes."""

    def __init__(self, pillow: bool) -> None:
        self.transform = torchvision_recipe(pillow)

    def __call__(self, image: Any) -> tuple[torch.Tensor, torch.Tensor]:
        rgb = image.convert("RGB")
        return self.transform(rgb), self.transform(rgb)


def imagefolder_batches(
    root: Path, views: TwoViews, batch: int, cores: int, device: str
) -> Batches:
    """ImageFolder in a DataLoader with a worker per core."""
    torchvision()
    from torchvision.datasets import ImageFolder

    loader = torch.utils.data.DataLoader(
        ImageFolder(str(root), views),
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=cores,
        persistent_workers=True,
        pin_memory=device == "cuda",
    )
    return chain.from_iterable(repeat(loader))


def webdataset_batches(shards: Path, views: TwoViews, batch: int, cores: int) -> Batches:
    """webdataset in a WebLoader with a worker per core."""
    urls = sorted(str(path) for path in shards.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg;png", "cls")
        .map_tuple(views, int)
        .batched(batch, partial=False)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=cores))


def decoded_batches(
    shards: Path, batch: int, cores: int, device: str = "cpu", *, uses_jpeg_engine: bool = True
) -> Batches:
    """Nothing but DALI's decoder, on bytes that are in memory.

    Args:
        shards: Where they are read from.
        batch: Images of each batch.
        cores: Decoding threads.
        device: ``"cuda"`` decodes with nvJPEG.
        uses_jpeg_engine: Whether a GPU's JPEG engine may take a share, as DALI has it by default.
    """
    dataset = Dataset.open(shards)
    encoded_images = dataset.read_checked(np.arange(min(dataset.samples, batch))).data
    on_gpu = device == "cuda"
    options: dict[str, Any] = {} if uses_jpeg_engine else {"hw_decoder_load": 0.0}

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=len(encoded_images), num_threads=cores, device_id=0 if on_gpu else None
    )
    def decoding_pipeline() -> Any:
        encoded = fn.external_source(source=lambda: encoded_images, batch=True)
        decoder_device = "mixed" if on_gpu else "cpu"
        return fn.decoders.image(encoded, device=decoder_device, output_type=types.RGB, **options)

    pipeline = decoding_pipeline()
    pipeline.build()
    while True:
        yield pipeline.run()
