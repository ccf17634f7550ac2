"""Augmentation recipes as values: what a view is, said in numbers."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vssl_dist.config.fields import Finite, Float, Model, Range, Triple

Probability = Annotated[Float, Field(ge=0, le=1)]

Spread = Annotated[Finite, Field(ge=0)]


class ViewRecipe(Model):
    """One augmented view.  The operations run in the order in which they stand here."""

    crop_scale: Range = (0.08, 1.0)
    """Share of the image's area that the random crop covers, uniform."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop, log-uniform."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of the colour jitter: brightness, contrast, saturation, hue, in this order."""
    brightness: Spread = 0.4
    """Brightness factor is uniform in [1 - x, 1 + x]; the same for the next two."""
    contrast: Spread = 0.4
    saturation: Spread = 0.2
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.1
    """Hue shift, uniform in [-x, x], in turns of the colour circle."""
    grayscale: Probability = 0.2
    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, uniform."""
    solarize: Probability = 0.0
    """Probability of inverting every value of at least 128."""

    @model_validator(mode="after")
    def _crops_something(self) -> ViewRecipe:
        if self.crop_scale[0] <= 0 or self.crop_scale[1] > 1 or self.crop_ratio[0] <= 0:
            raise ValueError("crop_scale must lie above 0 and up to 1, crop_ratio above 0")
        return self


class Normalisation(Model):
    """Channel means and standard deviations on the scale [0, 1]."""

    mean: Triple = (0.485, 0.456, 0.406)
    std: Triple = (0.229, 0.224, 0.225)

    @field_validator("std")
    @classmethod
    def _divides(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("every standard deviation must be above 0: images are divided by it")
        return std


RECIPES: dict[str, ViewRecipe] = {
    # SimSiam and MoCo v2 on ImageNet: both views alike.
    "moco_v2": ViewRecipe(crop_scale=(0.2, 1.0), saturation=0.4),
    # BYOL's two sides (arXiv 2006.07733, table 6).
    "byol_1": ViewRecipe(blur=1.0),
    "byol_2": ViewRecipe(blur=0.1, solarize=0.2),
    # 32-pixel images: no blur; the jitter of BYOL and SimSiam.
    "cifar": ViewRecipe(saturation=0.2, blur=0.0),
    "cifar_simsiam": ViewRecipe(crop_scale=(0.2, 1.0), saturation=0.4, blur=0.0),
    "cifar_byol_2": ViewRecipe(blur=0.0, solarize=0.2),
}


def _recipe(value: Any) -> Any:
    if isinstance(value, str):
        if value not in RECIPES:
            raise ValueError(f"{value!r} is no recipe (has: {', '.join(RECIPES)})")
        return RECIPES[value]
    if isinstance(value, dict) and "recipe" in value:
        rest = dict(value)
        return _recipe(rest.pop("recipe")).model_dump() | rest
    return value


View = Annotated[ViewRecipe, BeforeValidator(_recipe)]
"""A recipe by name, ``{recipe: name, key: value}`` to change one, or all keys by hand."""
