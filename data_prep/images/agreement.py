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

UNREAD = "Pillow decodes it and DALI does not"
DIFFERENT = "Pillow and DALI show it differently"
JUDGE, PILLOW = "judged_by", "Pillow alone"
"""What a manifest states of its source where DALI, which had a say, was not there."""
_LEVELS = 2
"""Mean difference, of 255, up to which two pictures are the same; tests of parity allow it."""
_STRIP = 256

Decode = Callable[[bytes], NDArray[np.uint8]]


def judge(alone: bool) -> dict[str, str]:
    """What a manifest has to state of its source: nothing where DALI had its say.

    Args:
        alone: Whether it could not be asked about some image.
    """
    return {JUDGE: PILLOW} if alone or not has_dali() else {}


@cache
def dali() -> Decode | None:
    """DALI's decoder on the CPU, None where it cannot be imported or does not start.

    Imported by the process that meets the first file that needs it: most datasets have none.

    Raises:
        MemoryError: It does not start for lack of memory, which another call may have.
    """
    try:
        from vssl_dist.data.backends.dali_decoder import Decoder
    except ImportError:
        return None
    try:
        return Decoder()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise MemoryError("DALI") from error
        return None


def objection(data: bytes, pixels: NDArray[np.uint8], decode: Decode) -> str:
    """Why a file must not be trained on as it is ("" = nothing).

    Args:
        data: The file, with all that stands in it.
        pixels: ``(H, W, 3)`` or ``(H, W)``, as Pillow decodes its picture.
        decode: The other decoder.

    Raises:
        MemoryError: There is none left to decode it with.
    """
    with _hushed():
        try:
            theirs = decode(data)
        except ValueError as error:
            if is_out_of_memory(error, pixels.shape[0] * pixels.shape[1]):
                raise MemoryError("DALI") from error
            return UNREAD
    ours = pixels if pixels.ndim == 3 else pixels[..., None]
    if theirs.shape[:2] != ours.shape[:2]:
        return DIFFERENT
    total = 0
    for row in range(0, len(ours), _STRIP):
        strip = slice(row, row + _STRIP)
        total += int(np.abs(theirs[strip].astype(np.int16) - ours[strip]).sum(dtype=np.int64))
    return DIFFERENT if total > _LEVELS * theirs.size else ""


@contextmanager
def _hushed() -> Iterator[None]:
    """Without what C libraries print of each file, past Python, to where errors are told."""
    try:
        before = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
