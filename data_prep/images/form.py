"""What is found out about an image file without decoding its picture."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """What a walk over a file's parts found; "" is nothing."""

    endless: str = ""
    """Why it must not be decoded at all."""
    broken: str = ""
    """What of the picture is missing or damaged, also where some decoder forgives it."""
    odd: str = ""
    """Why the file cannot stay as it is although its picture is whole."""
    plain: bool = False
    """Whether it is of the class that all decoders here are known to read alike."""
