"""Whether the decoders that trainings use show an image file alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray

from vssl_dist.data.backends.memory import is_out_of_memory
from vssl_dist.installed import has_dali

UNREAD_BY_DALI_REASON = "Pillow decodes it and DALI does not"
SHOWN_DIFFERENTLY_REASON = "Pillow and DALI show it differently"
JUDGED_BY_KEY = "judged_by"
"""Key in a manifest's source: which decoders judged, where DALI was not among them."""
JUDGED_BY_PILLOW_ALONE = "Pillow alone"
"""Value under `JUDGED_BY_KEY` where DALI should have been asked and was not installed."""
_TOLERATED_MEAN_LEVELS = 2
"""Mean difference, of 255, up to which two pictures are the same; tests of parity allow it."""
_STRIP_ROWS = 256

DecodeFunction = Callable[[bytes], NDArray[np.uint8]]


def make_judged_by_entry(pillow_only: bool) -> dict[str, str]:
    """Make the manifest entry that says that DALI was not asked; empty if it was.

    Args:
        pillow_only: Whether some image had to be judged without DALI.
    """
    return {JUDGED_BY_KEY: JUDGED_BY_PILLOW_ALONE} if pillow_only or not has_dali() else {}


@cache
def dali_decoder() -> DecodeFunction | None:
    """Start DALI's decoder on the CPU; None where it cannot be imported or does not start.

    Imported by the process that meets the first file that needs it: most datasets have none.

    Raises:
        MemoryError: It does not start for lack of memory, which another call may have.
    """
    try:
        from vssl_dist.data.backends.dali_decoder import DaliDecoder
    except ImportError:
        return None
    try:
        return DaliDecoder()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError("DALI") from error
        return None


def find_decoder_disagreement(
    data: bytes, pixels: NDArray[np.uint8], dali_decode: DecodeFunction
) -> str:
    """Say how DALI's picture of a file differs from Pillow's; "" if it does not.

    Args:
        data: The file, with all that stands in it.
        pixels: ``(H, W, 3)`` or ``(H, W)``, as Pillow decodes its picture.
        dali_decode: DALI's decoder.

    Raises:
        MemoryError: DALI ran out of memory, which says nothing about the file.
    """
    with _stderr_silenced():
        try:
            dali_pixels = dali_decode(data)
        except ValueError as error:
            if is_out_of_memory(error, pixels.shape[0] * pixels.shape[1]):
                raise MemoryError("DALI") from error
            return UNREAD_BY_DALI_REASON
    pillow_pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    if dali_pixels.shape[:2] != pillow_pixels.shape[:2]:
        return SHOWN_DIFFERENTLY_REASON
    total_difference = 0
    # In strips, as int16 copies of two whole pictures would take several times their memory.
    for row in range(0, len(pillow_pixels), _STRIP_ROWS):
        rows_of_strip = slice(row, row + _STRIP_ROWS)
        total_difference += int(
            np.abs(dali_pixels[rows_of_strip].astype(np.int16) - pillow_pixels[rows_of_strip]).sum(
                dtype=np.int64
            )
        )
    return (
        SHOWN_DIFFERENTLY_REASON
        if total_difference > _TOLERATED_MEAN_LEVELS * dali_pixels.size
        else ""
    )


@contextmanager
def _stderr_silenced() -> Iterator[None]:
    """Silence what C libraries write to stderr by themselves, past `sys.stderr`."""
    try:
        stderr_copy = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    null_device = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null_device, 2)
    os.close(null_device)
    try:
        yield
    finally:
        os.dup2(stderr_copy, 2)
        os.close(stderr_copy)
