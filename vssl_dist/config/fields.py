"""Field types that read what YAML writes, and nothing looser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _float(value: Any) -> Any:
    # YAML 1.1, hence PyYAML, reads 1e-6 (no dot) as a string.
    if isinstance(value, str) and (_NUMBER.fullmatch(value) or value == "inf"):
        return float(value)
    return float(value) if type(value) is int else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


Float = Annotated[float, BeforeValidator(_float)]
"""A float that may be written ``1``, ``0.1``, ``1e-6`` or ``inf``."""
Pair = Annotated[tuple[Float, Float], BeforeValidator(_tuple)]
"""Two floats, written as a YAML list."""
Triple = Annotated[tuple[Float, Float, Float], BeforeValidator(_tuple)]
"""Three floats, written as a YAML list."""
Ints = Annotated[tuple[int, ...], BeforeValidator(_tuple)]
"""Integers, written as a YAML list."""
Floats = Annotated[tuple[Float, ...], BeforeValidator(_tuple)]
"""Floats, written as a YAML list."""
FilePath = Annotated[Path, BeforeValidator(_path)]
"""A path, written as a non-empty string."""


class Model(BaseModel):
    """A block of the configuration: frozen, strictly typed, and no key it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class MethodConfig(Model):
    """What every method's own block has; each method file adds its keys."""

    views_wanted: ClassVar[int] = 2

    name: str
    backbone: str = "resnet50"
    """A torchvision or timm name, or ``resnet10_c16`` (narrow); CIFAR stem by image size."""
