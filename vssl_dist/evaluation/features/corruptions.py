"""Images made worse by known amounts, the same each time (after Hendrycks & Dietterich, 2019).

Levels go from 1 to 5.  Lengths are in shares of the image's side, so that a level means alike at
32 and at 224 pixels; the amounts are ours.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

NUM_LEVELS = 5
_NOISE_STDS = (0.04, 0.08, 0.12, 0.18, 0.26)
_BLUR_SIGMAS = (0.01, 0.02, 0.03, 0.04, 0.06)
_CONTRAST_FACTORS = (0.75, 0.55, 0.4, 0.25, 0.12)
_PIXELATE_SCALES = (0.8, 0.6, 0.45, 0.3, 0.2)


def corrupt(images: Tensor, ids: Tensor, kind: str, level: int) -> Tensor:
    """Apply a corruption to images.

    Args:
        images: ``(B, 3, H, W)`` in [0, 1].
        ids: ``(B,)``; an image's noise depends on its id alone, and grows with the level.
        kind: One of `CORRUPTION_BY_KIND`.
        level: From 1 to `NUM_LEVELS`; 0 leaves the images as they are.

    Returns:
        ``(B, 3, H, W)`` in [0, 1].

    >>> grey = torch.full((1, 3, 8, 8), 0.5)
    >>> noisy = [corrupt(grey, torch.tensor([7]), "noise", level).std() for level in (0, 1, 5)]
    >>> noisy[0].item(), bool(noisy[1] < noisy[2])
    (0.0, True)
    """
    if not level:
        return images
    return CORRUPTION_BY_KIND[kind](images, ids, level - 1).clamp(0, 1)


def _add_noise(images: Tensor, ids: Tensor, level_index: int) -> Tensor:
    # Drawn on the CPU: a generator of a GPU gives other numbers from the same seed.
    noise = [
        torch.randn(images.shape[1:], generator=_noise_generator(int(noise_image_id)))
        for noise_image_id in ids
    ]
    return images + _NOISE_STDS[level_index] * torch.stack(noise).to(images)


def _noise_generator(image_id: int) -> torch.Generator:
    # Through NumPy's seeding: torch's own draws alike from seeds that are alike.
    seed = np.random.SeedSequence([image_id, 0x6E6F697365]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def _blur(images: Tensor, ids: Tensor, level_index: int) -> Tensor:
    sigma = _BLUR_SIGMAS[level_index] * images.shape[-1]
    blurred = gaussian_filter(images.cpu().numpy(), (0, 0, sigma, sigma), mode="nearest")
    return torch.from_numpy(blurred).to(images)


def _reduce_contrast(images: Tensor, ids: Tensor, level_index: int) -> Tensor:
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + _CONTRAST_FACTORS[level_index] * (images - mean)


def _pixelate(images: Tensor, ids: Tensor, level_index: int) -> Tensor:
    height, width = images.shape[-2:]
    small_size = [max(1, round(_PIXELATE_SCALES[level_index] * side)) for side in (height, width)]
    return F.interpolate(F.interpolate(images, small_size, mode="area"), (height, width))


CORRUPTION_BY_KIND: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    # Images, their ids and the index of the level among the amounts above.
    "noise": _add_noise,
    "blur": _blur,
    "contrast": _reduce_contrast,
    "pixelate": _pixelate,
}
