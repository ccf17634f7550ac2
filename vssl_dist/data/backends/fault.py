"""Whether the device failed or the image is damaged, of which DALI makes the same exception."""

from __future__ import annotations

import io
import re

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vssl_dist.data.backends.memory import brief, ran_out

# In the words of DALI, torch, nvJPEG, nvImageCodec and C++.  What only says that decoding failed is
# not here: damaged images cause that, too.
_OF_THE_DEVICE = re.compile(
    r"\bCUDA|\bcuda(Error| call)|\b(NVML|[Nn]vml)\b|[Aa]lloc|ALLOC|[Mm]emory|ARCH_MISMATCH"
    # nvImageCodec's numbers for allocators (5, 15), architectures (7, 16) and calls of CUDA (21).
    r"|nvImageCodec failure: '#(5|7|15|16|21)'"
)


class DeviceError(RuntimeError):
    """The device that makes the views failed, or has no memory left: no image is to blame."""

    def __init__(self, device: torch.device, reason: str) -> None:
        super().__init__(f"{device}: {reason} (the device or its memory failed, not the images)")


def device_failed(error: Exception, pixels: int = 0) -> bool:
    """Whether an error tells of the device or of memory, not of an image.

    Args:
        error: What decoding failed with.
        pixels: Of the image, if it is one and its header can be read.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return True
    return bool(_OF_THE_DEVICE.search(brief(error))) or ran_out(error, pixels)


def sound_image() -> NDArray[np.uint8]:
    """A small JPEG that decodes wherever anything does."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 150)).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)
