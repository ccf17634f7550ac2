"""Result of inspecting an image file without decoding its picture."""

from __future__ import annotations

from typing import NamedTuple


class StructureReport(NamedTuple):
    """What an inspection of a file's structure found; "" is nothing."""

    refusal: str = ""
    """Why the file must not be decoded at all."""
    damage: str = ""
    """What of the picture is missing or damaged, also where some decoder forgives it."""
    remake_reason: str = ""
    """Why the file cannot stay as it is although its picture is whole."""
    is_plain: bool = False
    """Whether the file is of the class that all decoders here are known to read alike."""
