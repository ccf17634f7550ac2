"""Philox 4x32-10, a counter-based random generator, over whole arrays of counters.

J. K. Salmon, M. A. Moraes, R. O. Dror, D. E. Shaw: Parallel random numbers: as easy as 1, 2, 3
(SC 2011).  The output is a pure function of counter and key, so a draw can be addressed instead
of being the n-th of a sequence.  numpy has the 4x64 variant only, one generator object per key.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_LOW_WORD_MASK = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)

UInt64 = NDArray[np.uint64]


def philox_words(
    counter_words: tuple[UInt64, UInt64, UInt64, UInt64], key_words: tuple[UInt64, UInt64]
) -> tuple[UInt64, UInt64, UInt64, UInt64]:
    """Return four random 32-bit words for every counter and key.

    Args:
        counter_words: Four words, uint64 arrays below 2**32 that broadcast with each other and the
            key.
        key_words: Two words of the same kind.

    Returns:
        Four uint64 arrays below 2**32.

    >>> zero = np.zeros((), np.uint64)
    >>> [f"{int(word):08x}" for word in philox_words((zero,) * 4, (zero,) * 2)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter_words
    k0, k1 = key_words
    for _ in range(_NUM_ROUNDS):
        first_product = c0 * np.uint64(_PHILOX_MULTIPLIERS[0])
        second_product = c2 * np.uint64(_PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = (
            (second_product >> _WORD_BITS) ^ c1 ^ k0,
            second_product & _LOW_WORD_MASK,
            (first_product >> _WORD_BITS) ^ c3 ^ k1,
            first_product & _LOW_WORD_MASK,
        )
        k0 = (k0 + np.uint64(_WEYL_INCREMENTS[0])) & _LOW_WORD_MASK
        k1 = (k1 + np.uint64(_WEYL_INCREMENTS[1])) & _LOW_WORD_MASK
    return c0, c1, c2, c3


def addressed_uniforms(
    seed: int, epochs: NDArray[np.int64], ids: NDArray[np.int64], view: int, numbers_per_sample: int
) -> NDArray[np.float64]:
    """Return numbers in (0, 1) for each sample, addressed by seed, epoch, id and view.

    Args:
        seed: Below 2**32.
        epochs: ``(B,)``, each below 2**32.
        ids: ``(B,)``.
        view: Number of the view.
        numbers_per_sample: Numbers per sample; asking for more leaves the first ones as they are.

    Returns:
        ``(B, numbers_per_sample)`` float64; a row depends on nothing but its own address.
    """
    ids_as_uint64 = ids.astype(np.uint64)[:, None]
    # Each counter yields four numbers; the last block may yield some too many.
    block_numbers = np.arange(-(-numbers_per_sample // 4), dtype=np.uint64)[None, :]
    random_words = philox_words(
        (
            ids_as_uint64 & _LOW_WORD_MASK,
            ids_as_uint64 >> _WORD_BITS,
            np.full((1, 1), view, np.uint64),
            block_numbers,
        ),
        (np.full((1, 1), seed, np.uint64), epochs.astype(np.uint64)[:, None]),
    )
    sample_words = np.stack(random_words, axis=-1).reshape(len(ids), -1)[:, :numbers_per_sample]
    # Half a unit up: 0 and 1 themselves never occur.
    return (sample_words.astype(np.float64) + 0.5) / 2.0**32
