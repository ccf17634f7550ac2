"""Field types that read what YAML writes, and nothing looser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from vssl_dist.config.scalars import as_float


def _float(value: Any) -> Any:
    # Files hold numbers in quotes, too: other programs that write YAML 1.1 quote 1e-6.
    if isinstance(value, str) and (number := as_float(value)) is not None:
        return number
    # By its text, of which one beyond all floats is infinite, as 1e400 is.
    return float(str(value)) if type(value) is int else value


def as_tuple(value: Any) -> Any:
    """A YAML list as a tuple; anything else as it is, for the type to refuse."""
    return tuple(value) if isinstance(value, list) else value


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    low, high = value
    if not 0 <= low <= high:
        raise ValueError(f"[{low:g}, {high:g}] must be two numbers from 0 on, the lesser one first")
    return value


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _no_share(value: Any) -> Any:
    if as_float(str(value)) is not None:
        raise ValueError(
            f"{value} is a share of each batch, and an image's pixels would depend on its place in "
            "the batch: give none or all"
        )
    return value


Float = Annotated[float, BeforeValidator(_float)]
"""A float that may be written ``1``, ``0.1``, ``1e-6`` or ``inf``."""
Finite = Annotated[Float, Field(allow_inf_nan=False)]
"""A float that is a number and not infinite."""
Positive = Annotated[int, Field(gt=0)]
"""A whole number above 0."""
Side = Annotated[Positive, Field(le=8192)]
"""Height and width of a picture in pixels, of which a batch must find room in memory."""
Many = Annotated[Positive, Field(le=2**24)]
"""A number of images, of which that many have to be counted at once."""
Pair = Annotated[tuple[Finite, Finite], BeforeValidator(as_tuple)]
"""Two floats, written as a YAML list."""
Range = Annotated[Pair, AfterValidator(_ascending)]
"""Least and greatest value, at least 0, written as a YAML list."""
Triple = Annotated[tuple[Finite, Finite, Finite], BeforeValidator(as_tuple)]
"""Three floats, written as a YAML list."""
Counts = Annotated[tuple[Positive, ...], BeforeValidator(as_tuple), Field(min_length=1)]
"""Whole numbers above 0, written as a YAML list."""
Temperatures = Annotated[
    tuple[Annotated[Float, Field(gt=0)], ...], BeforeValidator(as_tuple), Field(min_length=1)
]
"""Floats above 0, ``inf`` among them, written as a YAML list."""
JpegEngine = Annotated[Literal["none", "all"], BeforeValidator(_no_share)]
"""Which JPEGs a GPU's own decoding engine takes."""
FilePath = Annotated[Path, BeforeValidator(_path)]
"""A path, written as a non-empty string."""


class Model(BaseModel):
    """A block of the configuration: frozen, strictly typed, and no key it does not know."""

    shorthands: ClassVar[Mapping[str, type]] = {}
    """Keys that a file may have besides the block's own, and the type of each."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        # Temperatures and degrees of freedom may be infinite; null, the default, is not a number.
        ser_json_inf_nan="constants",
    )

    def __setstate__(self, state: dict[Any, Any]) -> None:
        """Unpickle, also what an earlier version pickled, which had fewer keys."""
        super().__setstate__(state)
        for name, field in type(self).model_fields.items():
            if name not in self.__dict__ and not field.is_required():
                self.__dict__[name] = field.get_default(call_default_factory=True)


class MethodConfig(Model):
    """Keys common to all methods' own blocks; each method file adds its own."""

    has_posterior: ClassVar[bool] = False
    """Whether the method infers a distribution for each image."""
    has_embedding_density: ClassVar[bool] = False
    """Whether the method has likelihoods of an embedding, by the density that a task asks for."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Keys and values by the preset's name, where the method has a key ``preset``."""
    global_views: ClassVar[int] = 2
    """Views of each image that ``data.views`` lists first."""
    local_views_key: ClassVar[str | None] = None
    """Key of the number of smaller views that follow the global ones; None: there are none."""

    name: str
    backbone: str = "resnet50"
    """A torchvision ResNet, any timm model, or ``resnet10_c16`` (narrow); up to 64 pixels ResNets
    get a CIFAR stem."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, raw: Any) -> Any:
        # A name that no preset has is left to the key's own type to refuse.
        name = raw.get("preset") if isinstance(raw, dict) else None
        preset = cls.presets.get(name, {}) if isinstance(name, str) else {}
        for key, value in preset.items():
            if raw.get(key, value) != value:
                raise ValueError(
                    f"{key}={raw[key]} contradicts preset={name}, which is {key}={value}: leave "
                    f"out {key}, or choose each key by itself (preset=null)"
                )
        return {**preset, **raw} if preset else raw

    @property
    def has_teacher(self) -> bool:
        """Whether there is a moving average of the student, which ``engine.ema_decay`` steers."""
        return False

    @property
    def views_wanted(self) -> int:
        """Number of views of each image that the method compares."""
        return self.global_views + (getattr(self, self.local_views_key or "", None) or 0)

    @property
    def classes_wanted(self) -> int | None:
        """Number of classes that the training set must have; None: labels are never seen."""
        return None

    def wrong_sizes(self, sides: Sequence[int]) -> str | None:
        """Say why views of these sides, in the order of ``data.views``, do not fit; None: they do.

        Where there are local views, the global ones come first, all of one side; so are the local
        ones, and no larger.
        """
        if self.local_views_key is None:
            return None
        global_sides, local_sides = sides[: self.global_views], sides[self.global_views :]
        if max(sides) > max(global_sides):
            return "list the two global crops first, the smaller ones after"
        for crops, size in ((global_sides, "global"), (local_sides, "local")):
            if len(set(crops)) > 1:
                pixels = ", ".join(str(side) for side in sorted(set(crops)))
                return f"{size} crops of {pixels} pixels: give all {size} crops one size"
        return None
