"""Tells a lack of memory from a damaged image, for which libraries report the same error."""

from __future__ import annotations

import re

import numpy as np

_NO_MEMORY_PATTERN = re.compile(
    r"bad_alloc|[Oo]ut of memory|[Ii]nsufficient memory|[Cc]an('t|not) allocate"
)
_DECODER_BYTES_PER_PIXEL = 16
"""What decoders take at most: pixels twice over, coefficients of a JPEG, copies."""
_DECODER_FIXED_BYTES = 64 << 20
"""What decoders take at most whatever the size of the image."""
_MAX_IMAGE_PIXELS = 1 << 28
"""Pixels of the largest image that is decoded at all; headers may claim any number."""


def is_out_of_memory(error: Exception, num_pixels: int = 0) -> bool:
    """Whether an error reports a lack of memory, or too little memory is left to decode with.

    Several libraries call an image damaged, in no other words, when they are given no memory.

    Args:
        error: What decoding failed with.
        num_pixels: Size of the image, as far as its header could be read.

    >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("damaged"), 1000)
    (True, False)
    """
    if isinstance(error, MemoryError) or _NO_MEMORY_PATTERN.search(error_cause(error)):
        return True
    try:
        # Reserved and never touched: what is asked is whether an allocation would be granted.
        np.empty(
            _DECODER_BYTES_PER_PIXEL * min(num_pixels, _MAX_IMAGE_PIXELS) + _DECODER_FIXED_BYTES,
            np.uint8,
        )
    except MemoryError:
        return True
    return False


def error_cause(error: Exception) -> str:
    """Return in one line the cause that an error of DALI reports, without its place in the code.

    >>> error_cause(RuntimeError("Error in\\n  dali.py, line 8\\nencountered:\\n\\nno\\nimage"))
    'no image'
    """
    _, _, cause = str(error).rpartition("encountered:")
    cause, _, _ = cause.partition("Current pipeline object")
    return " ".join(cause.split()) or type(error).__name__
