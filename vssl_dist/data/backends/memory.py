"""Whether memory ran out while an image was decoded, of which libraries say that it is damaged."""

from __future__ import annotations

import re

import numpy as np

_OF_MEMORY = re.compile(
    r"bad_alloc|[Oo]ut of memory|[Ii]nsufficient memory|[Cc]an('t|not) allocate"
)
_PER_PIXEL, _BESIDES = 16, 64 << 20
"""Bytes that decoders take at most: pixels twice over, coefficients of a JPEG, copies."""
_MOST = 1 << 28
"""Pixels of an image that is decoded at all; headers may claim any number."""


def ran_out(error: Exception, pixels: int = 0) -> bool:
    """Whether an error tells of memory, or comes where too little is left to decode with.

    Several libraries call an image damaged, in no other words, when they are given no memory.

    Args:
        error: What decoding failed with.
        pixels: Of the image, as far as its header could be read.

    >>> ran_out(MemoryError()), ran_out(ValueError("damaged"), 1000)
    (True, False)
    """
    if isinstance(error, MemoryError) or _OF_MEMORY.search(brief(error)):
        return True
    try:
        np.empty(_PER_PIXEL * min(pixels, _MOST) + _BESIDES, np.uint8)  # no page of it is touched
    except MemoryError:
        return True
    return False


def brief(error: Exception) -> str:
    """In one line, what DALI's report says is wrong, without where in whose code.

    >>> brief(RuntimeError("Error in\\n  dali.py, line 8\\nencountered:\\n\\nno\\nimage"))
    'no image'
    """
    _, _, cause = str(error).rpartition("encountered:")
    cause, _, _ = cause.partition("Current pipeline object")
    return " ".join(cause.split()) or type(error).__name__
