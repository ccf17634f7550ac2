"""Augmentation recipes as values: what a view is, said in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vssl_dist.config.fields import Float, Model, Range, Side, Triple

Probability = Annotated[Float, Field(ge=0, le=1)]

Spread = Annotated[Float, Field(ge=0, le=1)]


class ViewRecipe(Model):
    """One augmented view.  The operations run in the order in which they stand here."""

    shorthands: ClassVar[Mapping[str, type]] = {"recipe": str, "count": int}
    """Keys that an entry of ``data.views`` may have besides."""

    crop_scale: Range = (0.08, 1.0)
    """Share of the image's area that the random crop covers, drawn uniformly."""
    crop_ratio: Range = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop, drawn log-uniformly."""
    size: Side | None = None
    """Side of this view in pixels; null: ``data.image_size``."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of the colour jitter: brightness, contrast, saturation and hue, in this order."""
    brightness: Spread = 0.4
    """Largest change x of the brightness, whose factor is uniform in [1 - x, 1 + x]."""
    contrast: Spread = 0.4
    """Largest change x of the contrast, whose factor is uniform in [1 - x, 1 + x]."""
    saturation: Spread = 0.2
    """Largest change x of the saturation, whose factor is uniform in [1 - x, 1 + x]."""
    hue: Annotated[Float, Field(ge=0, le=0.5)] = 0.1
    """Largest shift x of the hue, uniform in [-x, x], in turns of the colour circle."""
    grayscale: Probability = 0.2
    """Probability of turning the view grey."""
    blur: Probability = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: Range = (0.1, 2.0)
    """Standard deviation of the blur in pixels, drawn uniformly."""
    solarize: Probability = 0.0
    """Probability of inverting every colour value of at least 128."""

    @model_validator(mode="after")
    def _crops_something(self) -> ViewRecipe:
        if self.crop_scale[0] <= 0 or self.crop_scale[1] > 1 or self.crop_ratio[0] <= 0:
            raise ValueError("crop_scale must lie above 0 and up to 1, crop_ratio above 0")
        return self


def _change(recipe: ViewRecipe, **keys: Any) -> ViewRecipe:
    return ViewRecipe.model_validate(recipe.model_dump() | keys)


class Normalisation(Model):
    """Channel means and standard deviations on the scale [0, 1]."""

    mean: Triple = (0.485, 0.456, 0.406)
    """Means of red, green and blue that are subtracted, on the scale [0, 1]."""
    std: Triple = (0.229, 0.224, 0.225)
    """Standard deviations of red, green and blue that are divided by, on the scale [0, 1]."""

    @field_validator("std")
    @classmethod
    def _divides(cls, std: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(std) <= 0:
            raise ValueError("every standard deviation must be above 0: images are divided by it")
        return std


# What is the same everywhere, whatever a paper did: bilinear resizing with antialiasing (BYOL and
# DINO: bicubic), the jitter's four parts in one fixed order (SimCLR, torchvision: a random one),
# and a blur whose window follows its sigma (SimCLR: a tenth of the image, which cuts off less).
_SIMCLR = ViewRecipe(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
_BYOL = ViewRecipe(saturation=0.2)
_CIFAR = ViewRecipe(saturation=0.2, blur=0.0)
_GLOBAL, _LOCAL = (0.4, 1.0), (0.05, 0.4)

RECIPES: dict[str, ViewRecipe] = {
    # SimCLR (arXiv 2002.05709, appendix A): strength 1, blur of half of the views.
    "simclr": _SIMCLR,
    # Its appendix on CIFAR-10: strength 0.5, no blur.
    "cifar_simclr": ViewRecipe(saturation=0.4, blur=0.0),
    # MoCo v2 (arXiv 2003.04297; its code for the numbers) and SimSiam on ImageNet, both views.
    "moco_v2": ViewRecipe(crop_scale=(0.2, 1.0), saturation=0.4),
    # BYOL's two sides (arXiv 2006.07733, table 6).
    "byol_1": _change(_BYOL, blur=1.0),
    "byol_2": _change(_BYOL, blur=0.1, solarize=0.2),
    # MoCo v3's two sides (arXiv 2104.02057): BYOL's, but crops from a fifth of the area on, as its
    # code has for ResNet-50 (for ViT: crop_scale: [0.08, 1]).
    "moco_v3_1": _change(_BYOL, crop_scale=(0.2, 1.0), blur=1.0),
    "moco_v3_2": _change(_BYOL, crop_scale=(0.2, 1.0), blur=0.1, solarize=0.2),
    # DINO (arXiv 2104.14294; its code's defaults for the numbers): two global views and eight local
    # ones of 96 pixels beside 224.  For ResNet-50 it has [0.14, 1] and [0.05, 0.14].
    "dino_global_1": _change(_BYOL, crop_scale=_GLOBAL, blur=1.0),
    "dino_global_2": _change(_BYOL, crop_scale=_GLOBAL, blur=0.1, solarize=0.2),
    "dino_local": _change(_BYOL, crop_scale=_LOCAL, size=96),
    # 32-pixel images: solo-learn's for BYOL and others, symmetric and its second side.
    "cifar": _CIFAR,
    "cifar_byol_2": _change(_CIFAR, solarize=0.2),
    # SimSiam on CIFAR-10 (arXiv 2011.10566, appendix D): MoCo v2's without blur.
    "cifar_simsiam": ViewRecipe(crop_scale=(0.2, 1.0), saturation=0.4, blur=0.0),
    # Ours: DINO's crops at 32 pixels, half the side for the local ones, no blur.
    "cifar_dino_global_1": _change(_CIFAR, crop_scale=_GLOBAL),
    "cifar_dino_global_2": _change(_CIFAR, crop_scale=_GLOBAL, solarize=0.2),
    "cifar_dino_local": _change(_CIFAR, crop_scale=_LOCAL, size=16),
    # STL-10: W-MSE's (arXiv 2007.06346, appendix).  It resizes to 64 pixels; with
    # data.image_size=96, the size in which the images are published, the rest is the same: ours.
    "stl10": ViewRecipe(crop_scale=(0.2, 1.0), saturation=0.4, grayscale=0.1, blur=0.0),
}

_MOST_VIEWS = 64


def _recipe(value: Any) -> Any:
    if isinstance(value, str):
        if value not in RECIPES:
            raise ValueError(f"{value!r} is no recipe (has: {', '.join(RECIPES)})")
        return RECIPES[value]
    if isinstance(value, dict) and "recipe" in value:
        changes = dict(value)
        return _recipe(changes.pop("recipe")).model_dump() | changes
    return value


def _counted(raw: Any) -> Any:
    """A list of views in which ``{.., count: n}`` stands n times."""
    if not isinstance(raw, list):
        return raw
    views: list[Any] = []
    for number, entry in enumerate(raw):
        count = entry.get("count", 1) if isinstance(entry, dict) else 1
        if type(count) is not int or not 1 <= count <= _MOST_VIEWS:
            raise ValueError(
                f"count of entry {number} must be a whole number from 1 to {_MOST_VIEWS}, "
                f"got {count!r}"
            )
        if isinstance(entry, dict):
            entry = {key: value for key, value in entry.items() if key != "count"}
        views += [entry] * count
    return tuple(views)


View = Annotated[ViewRecipe, BeforeValidator(_recipe)]
"""A recipe by name, ``{recipe: name, key: value}`` to change one, or all keys by hand."""
Views = Annotated[
    tuple[View, ...],
    BeforeValidator(_counted),
    Field(min_length=1, max_length=_MOST_VIEWS),
]
"""One `View` per view; ``{recipe: name, count: n}`` is n of them."""
