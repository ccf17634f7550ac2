"""Tells a failed device from a damaged image, for which DALI raises the same exception."""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vssl_dist.data.backends.memory import error_cause, is_out_of_memory

# In the words of DALI, torch, nvJPEG, nvImageCodec and C++.  Words that only say that decoding
# failed are not here: damaged images cause them, too.
_DEVICE_FAILURE_PATTERN = re.compile(
    r"\bCUDA|\bcuda(Error| call)|\b(NVML|[Nn]vml)\b|[Aa]lloc|ALLOC|[Mm]emory|ARCH_MISMATCH"
    # nvImageCodec's numbers for allocators (5, 15), architectures (7, 16) and calls of CUDA (21).
    r"|nvImageCodec failure: '#(5|7|15|16|21)'"
)


class DeviceError(RuntimeError):
    """The device that makes the views failed, or has no memory left: no image is to blame."""

    def __init__(self, device: torch.device, reason: str) -> None:
        super().__init__(f"{device}: {reason} (the device or its memory failed, not the images)")


def is_device_failure(error: Exception, num_pixels: int = 0) -> bool:
    """Whether an error reports a failed device or a lack of memory, and not a damaged image.

    Args:
        error: What decoding failed with.
        num_pixels: Size of the image, as far as its header could be read.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    return bool(_DEVICE_FAILURE_PATTERN.search(error_cause(error))) or is_out_of_memory(
        error, num_pixels
    )


def make_intact_jpeg() -> NDArray[np.uint8]:
    """Encode a small JPEG that every working decoder accepts."""
    jpeg_buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(jpeg_buffer, "JPEG")
    return np.frombuffer(jpeg_buffer.getvalue(), np.uint8)
