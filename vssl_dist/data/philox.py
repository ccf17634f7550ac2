"""Philox 4x32-10, a counter-based random generator, over whole arrays of counters.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3
(SC 2011).  The output is a pure function of counter and key, so a draw can be addressed instead
of being the n-th of a sequence.  numpy has the 4x64 variant only, one generator object per key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW_WORD = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

UInt64 = NDArray[np.uint64]


def philox(
    counter: tuple[UInt64, UInt64, UInt64, UInt64], key: tuple[UInt64, UInt64]
) -> tuple[UInt64, UInt64, UInt64, UInt64]:
    """Return four random 32-bit words for every counter and key.

    Args:
        counter: Four words, uint64 arrays below 2**32 that broadcast with each other and ``key``.
        key: Two words of the same kind.

    Returns:
        Four uint64 arrays below 2**32.

    >>> zero = np.zeros((), np.uint64)
    >>> [f"{int(word):08x}" for word in philox((zero,) * 4, (zero,) * 2)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        left = c0 * np.uint64(_MULTIPLIERS[0])
        right = c2 * np.uint64(_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (right >> _WORD_BITS) ^ c1 ^ k0,
            right & _LOW_WORD,
            (left >> _WORD_BITS) ^ c3 ^ k1,
            left & _LOW_WORD,
        )
        k0 = (k0 + np.uint64(_WEYL[0])) & _LOW_WORD
        k1 = (k1 + np.uint64(_WEYL[1])) & _LOW_WORD
    return c0, c1, c2, c3


def uniforms(
    seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], view: int, count: int
) -> NDArray[np.float64]:
    """Return ``count`` numbers in (0, 1) for each sample, addressed by seed, epoch, id and view.

    Args:
        seed: Below 2**32.
        epochs: ``(B,)``, each below 2**32.
        ids: ``(B,)``.
        view: Number of the view.
        count: Numbers per sample; asking for more leaves the first ones as they are.

    Returns:
        ``(B, count)`` float64; a row depends on nothing but its own address.
    """
    wide_ids = ids.astype(np.uint64)[:, None]
    # Each counter yields four numbers; the last block may yield some too many.
    blocks = np.arange(-(-count // 4), dtype=np.uint64)[None, :]
    words = philox(
        (wide_ids & _LOW_WORD, wide_ids >> _WORD_BITS, np.full((1, 1), view, np.uint64), blocks),
        (np.full((1, 1), seed, np.uint64), epochs.astype(np.uint64)[:, None]),
    )
    flat = np.stack(words, axis=-1).reshape(len(ids), -1)[:, :count]
    # Half a unit up: 0 and 1 themselves never occur.
    return (flat.astype(np.float64) + 0.5) / 2.0**32
