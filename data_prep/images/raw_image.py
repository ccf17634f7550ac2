"""An image as a source has it, before anything has judged it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RawImage:
    """An image as the source has it."""

    data: bytes | NDArray[np.uint8]
    """A file's bytes, or ``(H, W, 3)`` pixels that no file needs to be decoded for."""
    name: str = ""
    """Name for messages, such as that the image has changed since it was surveyed."""
    flaw: str = ""
    """Why the image must not even be read, or could not be; "" if it may be used."""
    may_be_read_later: bool = False
    """Whether the flaw is one of the storage, which may be gone the next time."""
